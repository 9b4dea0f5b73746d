"""The tests that need a GPU, counted."""

from __future__ import annotations

import re
import sys

from bench.common.machine import Json
from bench.gpu_report import processes

# Its own tests would run the sheet in the sheet.
_OPTIONS = ("--continue-on-collection-errors", "--ignore-glob=tests/test_gpu_report*.py")
_ARGUMENTS = ("-m", "gpu", "-q", *_OPTIONS)
# A shell's background job ignores SIGINT, and so would pytest, which counts when it is interrupted.
_PYTEST = """\
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))"""


def gpu_tests(limit: float) -> Json:
    """Run them; those whose imports fail here don't stop the rest."""
    ended = processes.run([sys.executable, "-c", _PYTEST, *_ARGUMENTS], limit)
    found: Json = {
        "command": "python -m pytest " + " ".join(_ARGUMENTS),
        "seconds": ended.seconds,
        "exit_code": ended.exit_code,
        "counts": counts(ended.output),
    }
    if ended.exit_code is None:
        found["why"] = f"stopped after {limit:.0f} s"
    if ended.exit_code != 0:
        found["tail"] = ended.output.splitlines()[-80:]
    return found


def counts(output: str) -> dict[str, int]:
    """Passed, failed, skipped … from the last line of pytest's output; empty if it has none."""
    lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s\b", line)]
    found = re.findall(r"(\d+) ([a-z]+)", lines[-1].rpartition(" in ")[0]) if lines else []
    return {"error" if what == "errors" else what: int(number) for number, what in found}
