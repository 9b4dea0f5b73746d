"""The order of the report's parts, and the time that each may take.

The file is valid JSON at any moment: a run that is cut off keeps what it has. What is worth most
comes first: the ceilings, the rows of the study's default shapes, the GPU's tests, the study,
compute-sanitizer, and then the other rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.common import timing
from bench.common.machine import Json, environment, save
from bench.gpu_report import report
from bench.gpu_report.cases import list_cases
from bench.gpu_report.checks import run_gpu_tests, sanitize
from bench.gpu_report.rows import (
    Make,
    describe,
    is_interpreted,
    limit_repeats,
    measure_rows,
    new_row,
)

# Seconds. A whole run ends within 8 minutes; the rows have what the other parts leave, of
# which compute-sanitizer may take half.
WHOLE, TESTS, STUDY, SANITIZER = 470.0, 150.0, 90.0, 60.0
_STOPPING = 10.0  # of a part, to be told that it is late and to say what it has


def gpu_report(
    out: Path, device: str = "cuda", quick: bool = False, make: Make = list_cases
) -> Json:
    """Measure a device, write ``out`` as it goes, print a table; give the record back.

    ``quick`` takes tiny shapes and leaves the GPU's tests out. ``make`` gives the rows.
    """
    _check(out, device)
    end = time.time() + WHOLE
    record: Json = {
        "finished": False,
        "environment": environment(device),
        "interpreted": is_interpreted(),
        "ceilings": None,
        "rows": [new_row(case) for case in make(quick)],
        "tests": None,
        "study": None,
        "sanitizer": None,
        "verdict": None,
    }
    keep = partial(save, out, record)
    try:
        keep()
    except OSError as error:
        raise RuntimeError(f"--out {out} can't be written: {error}") from error

    def part(name: str, call: Callable[[], Json]) -> None:
        """Put a part in the record, or why it failed."""
        try:
            record[name] = call()
        except Exception as error:
            record[name] = (record[name] or {}) | {"why": describe(error)}
        keep()

    def study(limit: float) -> Json:
        from bench.gpu_report.study import measure_study  # which needs what may not be there

        record["study"] = {}
        return measure_study(record["study"], keep, device, quick, time.time() + limit)

    part("ceilings", lambda: timing.ceilings(device, quick, limit_repeats(quick)))
    if device == "cuda":
        torch.cuda.empty_cache()
    first = end - TESTS - STUDY - SANITIZER
    measure_rows(record, keep, device, quick, make, first, last=False)
    why = "there is no GPU" if device == "cpu" else "quick" if quick else None
    part("tests", lambda: _unless(why, run_gpu_tests, _share(TESTS, end - STUDY - SANITIZER)))
    part("study", lambda: study(_share(STUDY, end - SANITIZER)))
    most = max(SANITIZER, (end - time.time()) / 2)
    part("sanitizer", lambda: _unless(why, sanitize, _share(most, end)))
    measure_rows(record, keep, device, quick, make, end)
    record["verdict"] = report.judge(record)
    record["finished"] = True
    keep()
    report.print_report(record)
    return record


def _check(out: Path, device: str) -> None:
    """Say at once what would fail after minutes."""
    if device not in ("cuda", "cpu"):
        raise RuntimeError(f"--device {device}: expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device; --device cpu --quick rehearses the report without one")
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: the kernels would not run on the GPU")
    if not out.parent.is_dir():
        raise RuntimeError(f"--out {out}: there is no folder {out.parent}")


def _unless(why: str | None, part: Callable[[float], Json], limit: float) -> Json:
    return part(limit) if why is None else {"why": f"not run: {why}"}


def _share(most: float, end: float) -> float:
    """Seconds of a part that has at most so many, and has to leave what comes after it its own."""
    return max(1.0, min(most, end - time.time()) - _STOPPING)
