"""The order of the report's parts, and the time for each.

The file is valid JSON at any moment, so an interrupted run keeps its results. The most valuable
parts come first: the ceilings, the rows of the study's shapes, the GPU tests, the study,
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
from bench.common.machine import Json, describe_environment, save
from bench.gpu_report import report
from bench.gpu_report.cases import list_cases
from bench.gpu_report.checks import run_gpu_tests, sanitize
from bench.gpu_report.rows import (
    Make,
    describe_error,
    get_time_limit,
    is_interpreted,
    make_row,
    measure_rows,
)

# Seconds. A run ends within 8 minutes; the rows get the time that the other parts don't use, and
# compute-sanitizer may take half of what remains.
WHOLE, TESTS, STUDY, SANITIZER = 470.0, 150.0, 90.0, 60.0
_STOPPING = 10.0  # for a part that used all of its time to stop and return its results


def measure_gpu(
    out: Path, device: str = "cuda", quick: bool = False, make: Make = list_cases
) -> Json:
    """Measure a device, saving to ``out`` after each step; print a table and return the record.

    ``quick`` uses tiny shapes and leaves out the GPU tests. ``make`` returns the rows.
    """
    _check_arguments(out, device)
    end = time.time() + WHOLE
    record: Json = {
        "finished": False,
        "environment": describe_environment(device),
        "interpreted": is_interpreted(),
        "ceilings": None,
        "rows": [make_row(case) for case in make(quick)],
        "tests": None,
        "study": None,
        "sanitizer": None,
        "verdict": None,
    }
    keep = partial(save, out, record)
    try:
        keep()
    except OSError as error:
        raise RuntimeError(f"--out {out}: can't be written: {error}") from error

    def add_part(name: str, call: Callable[[], Json]) -> None:
        """Add a part to the record, or the reason why it failed."""
        try:
            record[name] = call()
        except Exception as error:
            record[name] = (record[name] or {}) | {"why": describe_error(error)}
        keep()

    def study(limit: float) -> Json:
        from bench.gpu_report.study import measure_study  # its dependencies may be missing

        record["study"] = {}
        return measure_study(record["study"], keep, device, quick, time.time() + limit)

    add_part("ceilings", lambda: timing.measure_ceilings(device, quick, get_time_limit(quick)))
    if device == "cuda":
        torch.cuda.empty_cache()
    first = end - TESTS - STUDY - SANITIZER
    measure_rows(record, keep, device, quick, make, first, last=False)
    why = "no GPU" if device == "cpu" else "quick" if quick else None
    add_part(
        "tests",
        lambda: _run_unless(why, run_gpu_tests, _limit_part(TESTS, end - STUDY - SANITIZER)),
    )
    add_part("study", lambda: study(_limit_part(STUDY, end - SANITIZER)))
    most = max(SANITIZER, (end - time.time()) / 2)
    add_part("sanitizer", lambda: _run_unless(why, sanitize, _limit_part(most, end)))
    measure_rows(record, keep, device, quick, make, end)
    record["verdict"] = report.judge(record)
    record["finished"] = True
    keep()
    report.print_report(record)
    return record


def _check_arguments(out: Path, device: str) -> None:
    """Raise at once for arguments that would fail after minutes."""
    if device not in ("cuda", "cpu"):
        raise RuntimeError(f"--device {device}: expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "--device cuda: no CUDA device; use --device cpu --quick to rehearse the report"
        )
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: kernels would not run on the GPU; unset it")
    if not out.parent.is_dir():
        raise RuntimeError(f"--out {out}: folder {out.parent} does not exist")


def _run_unless(why: str | None, part: Callable[[float], Json], limit: float) -> Json:
    return part(limit) if why is None else {"why": f"not run: {why}"}


def _limit_part(most: float, end: float) -> float:
    """Return a part's seconds: at most ``most``, and early enough for the parts after ``end``."""
    return max(1.0, min(most, end - time.time()) - _STOPPING)
