"""compute-sanitizer over every kernel on tiny inputs, where there is one."""

from __future__ import annotations

import re
import shutil
import sys

from bench.common.machine import Json
from bench.gpu_report import processes

TOOLS = ("memcheck", "racecheck")
_SHORT = 30.0  # seconds that are not shared out: memcheck has them
_HOMES = "/usr/local/cuda/bin"
_SCRIPT = (sys.executable, "-m", "bench.gpu_report.sanitizer_target")
# What torch's cache holds would hide reads behind the end of a tensor.
_OWN_MEMORY = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# ptxas, which Triton starts, has no kernels, and PyTorch makes calls that are meant to fail.
_OPTIONS = ("--target-processes", "application-only", "--report-api-errors", "no")


def sanitize(limit: float) -> Json:
    """Run the script alone, which compiles the kernels, and then under each tool.

    Where time is short, or the script alone takes too long, the first tool compiles what is left.
    """
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=_HOMES)
    if binary is None:
        return {"why": "not there: no compute-sanitizer"}
    found: Json = {"tools": []}
    left = limit
    if left >= _SHORT:
        alone = _checked("alone", _SCRIPT, left / 2)
        found["tools"].append(alone)
        left -= alone["seconds"]
        if alone["exit_code"]:
            return {**found, "why": "without a result: its script fails even alone"}
    for i, tool in enumerate(TOOLS):
        if left < 1:
            found["why"] = "no time was left"
            break
        command = (binary, "--tool", tool, *_OPTIONS, *_SCRIPT)
        share = left if left < _SHORT else left / (len(TOOLS) - i)
        found["tools"].append(_checked(tool, command, share))
        left -= found["tools"][-1]["seconds"]
    return found


def _checked(tool: str, command: tuple[str, ...], limit: float) -> Json:
    ended = processes.run(command, limit, _OWN_MEMORY)
    found: Json = {
        "tool": tool,
        "command": " ".join(command),
        "seconds": ended.seconds,
        "exit_code": ended.exit_code,
        "errors": errors(ended.output),
        "tail": ended.output.splitlines()[-40:],
    }
    if ended.exit_code is None:
        found["why"] = f"stopped after {limit:.0f} s"
    return found


def errors(output: str) -> int | None:
    """What a tool counted, hazards among it; None where it gave no count.

    Of several counts, as there are for errors that were not printed, the first has all.
    """
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY:\s+(\d+)", output)
    return None if found is None else int(found[1])
