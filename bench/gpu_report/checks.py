"""The tests that need a GPU, counted, and compute-sanitizer over every kernel on tiny inputs."""

from __future__ import annotations

import re
import shutil
import sys

from bench.common.machine import Json
from bench.gpu_report.processes import run_command

# Its own tests would make the report in the report.
_OPTIONS = ("--continue-on-collection-errors", "--ignore-glob=tests/test_gpu_report*.py")
_ARGUMENTS = ("-m", "gpu", "-q", *_OPTIONS)
# A shell's background job ignores SIGINT, and so would pytest, which counts when it is interrupted.
_PYTEST = """\
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))"""

TOOLS = ("memcheck", "racecheck")
_SHORT = 30.0  # seconds that are not shared out: memcheck has them
_TARGET = (sys.executable, "-m", "bench.gpu_report.sanitizer_target")
# What torch's cache holds would hide reads behind the end of a tensor.
_OWN_MEMORY = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# ptxas, which Triton starts, has no kernels, and PyTorch makes calls that are meant to fail.
_SANITIZE = ("--target-processes", "application-only", "--report-api-errors", "no")


def run_gpu_tests(limit: float) -> Json:
    """Run them; those whose imports fail here don't stop the rest."""
    result = run_command([sys.executable, "-c", _PYTEST, *_ARGUMENTS], limit)
    output = result.pop("output")
    tail = {} if result["exit_code"] == 0 else {"tail": output.splitlines()[-80:]}
    command = "python -m pytest " + " ".join(_ARGUMENTS)
    return {"command": command, **result, "counts": count_tests(output), **tail}


def count_tests(output: str) -> dict[str, int]:
    """Passed, failed, skipped … from the last line of pytest's output; empty if it has none."""
    lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s\b", line)]
    counts = re.findall(r"(\d+) ([a-z]+)", lines[-1].rpartition(" in ")[0]) if lines else []
    return {"error" if what == "errors" else what: int(number) for number, what in counts}


def sanitize(limit: float) -> Json:
    """Run the target alone, which compiles the kernels, and then under each tool.

    Where time is short, or the target alone takes too long, the first tool compiles what is left.
    """
    which = shutil.which
    binary = which("compute-sanitizer") or which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        return {"why": "not there: no compute-sanitizer"}
    tools: list[Json] = []
    left = limit
    if left >= _SHORT:
        tools.append(_check("alone", _TARGET, left / 2))
        left -= tools[-1]["seconds"]
        if tools[-1]["exit_code"]:
            return {"tools": tools, "why": "without a result: its target fails even alone"}
    for i, tool in enumerate(TOOLS):
        if left < 1:
            return {"tools": tools, "why": "no time was left"}
        share = left if left < _SHORT else left / (len(TOOLS) - i)
        tools.append(_check(tool, (binary, "--tool", tool, *_SANITIZE, *_TARGET), share))
        left -= tools[-1]["seconds"]
    return {"tools": tools}


def _check(tool: str, command: tuple[str, ...], limit: float) -> Json:
    result = run_command(command, limit, _OWN_MEMORY)
    output = result.pop("output")
    facts = {"tool": tool, "command": " ".join(command), **result}
    return {**facts, "errors": count_errors(output), "tail": output.splitlines()[-40:]}


def count_errors(output: str) -> int | None:
    """What a tool counted, hazards among it; None where it gave no count.

    Of several counts, as there are for errors that were not printed, the first has all.
    """
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY:\s+(\d+)", output)
    return None if summary is None else int(summary[1])
