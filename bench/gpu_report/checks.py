"""Run the tests that need a GPU, and compute-sanitizer on every kernel with tiny inputs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from bench.common.machine import ROOT, Json
from bench.gpu_report import processes

_ARGUMENTS = ("-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider")
# More workers would spend the time on importing, and hold a context on the GPU each.
_WORKERS = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")
# Shell background jobs ignore SIGINT; pytest needs it, since it prints its counts when interrupted.
_PYTEST = """\
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))"""

# Counts the kernels that each test process loads.
_PLUGIN = ("-p", "bench.gpu_report.pytest_plugin")

TOOLS = ("memcheck", "racecheck")
_SHORT = 30.0  # seconds; with less, memcheck gets all of the time
_TARGET = (sys.executable, "-m", "bench.gpu_report.sanitizer_target")
# torch's caching allocator would hide reads past the end of a tensor.
_OWN_MEMORY = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Skip child processes (ptxas has no kernels), and API errors that PyTorch provokes on purpose.
_SANITIZE = ("--target-processes", "application-only", "--report-api-errors", "no")


def run_gpu_tests(limit: float, folder: Path = ROOT) -> Json:
    """Run the tests marked ``gpu``; files that can't be imported don't stop the rest."""
    workers = _WORKERS if importlib.util.find_spec("xdist") else ()
    arguments = [*_ARGUMENTS, *_PLUGIN, *workers, *list_gpu_test_files(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _PYTEST, *arguments]
    result = processes.run_command(command, limit, {"PYTHONPATH": path}, folder)
    output = result.pop("output")
    tail = {} if result["exit_code"] == 0 else {"tail": output.splitlines()[-80:]}
    shown = "python -m pytest " + " ".join(arguments)
    return {"command": shown, **result, "counts": count_tests(output), **tail}


def list_gpu_test_files(folder: Path = ROOT) -> list[str]:
    """Return the files with tests marked ``gpu``, since collecting the others takes long.

    The report's own tests are left out: they would run the report inside the report.
    """
    paths = [p for p in folder.rglob("test_*.py") if ".venv" not in p.parts]
    return sorted(
        str(p.relative_to(folder))
        for p in paths
        if not p.name.startswith("test_gpu_report")
        and (p.parent.name == "triton" or "mark.gpu" in p.read_text())
    )


def count_tests(output: str) -> dict[str, int]:
    """Return the counts in the last line of pytest's output; empty if there are none."""
    lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s\b", line)]
    counts = re.findall(r"(\d+) ([a-z]+)", lines[-1].rpartition(" in ")[0]) if lines else []
    return {"error" if what == "errors" else what: int(number) for number, what in counts}


def sanitize(limit: float) -> Json:
    """Run the target without a tool, which compiles the kernels, and then under each tool.

    If time is short, or that run takes too long, the first tool compiles the remaining kernels.
    """
    which = shutil.which
    binary = which("compute-sanitizer") or which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        return {"why": "compute-sanitizer not found"}
    tools: list[Json] = []
    remaining = limit
    if remaining >= _SHORT:
        tools.append(_run_tool("alone", _TARGET, remaining / 2))
        remaining -= tools[-1]["seconds"]
        if tools[-1]["exit_code"]:
            return {"tools": tools, "why": "no result: the target fails even without a tool"}
    for i, tool in enumerate(TOOLS):
        if remaining < 1:
            return {"tools": tools, "why": "no time remained"}
        share = remaining if remaining < _SHORT else remaining / (len(TOOLS) - i)
        tools.append(_run_tool(tool, (binary, "--tool", tool, *_SANITIZE, *_TARGET), share))
        remaining -= tools[-1]["seconds"]
    return {"tools": tools}


def _run_tool(tool: str, command: tuple[str, ...], limit: float) -> Json:
    result = processes.run_command(command, limit, _OWN_MEMORY)
    output = result.pop("output")
    facts = {"tool": tool, "command": " ".join(command), **result}
    return {**facts, "errors": count_errors(output), "tail": output.splitlines()[-40:]}


def count_errors(output: str) -> int | None:
    """Return a tool's count of errors or hazards; None if it printed none.

    If errors were not printed there are several counts; the first includes all.
    """
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY:\s+(\d+)", output)
    return None if summary is None else int(summary[1])
