"""The order of the report's parts, and the time for each.

The file is valid JSON at any moment, so an interrupted run keeps its results. The parts run in the
order of their value: ceilings, all kernels, the study, other packages, GPU tests and
compute-sanitizer. Kernels that were left out for lack of time are measured last.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.common import timing
from bench.common.machine import Json, describe_environment, save
from bench.gpu_report import report
from bench.gpu_report.cache import NO_LOADS, Counts, install
from bench.gpu_report.cases import list_cases
from bench.gpu_report.checks import run_gpu_tests, sanitize
from bench.gpu_report.peers import measure_peers
from bench.gpu_report.rows import (
    Make,
    describe_error,
    get_time_limit,
    is_interpreted,
    make_row,
    measure_rows,
)

# Seconds. A run ends within 8 minutes; time that a part doesn't use goes to the later ones.
WHOLE, STUDY, PEERS, TESTS, SANITIZER = 470.0, 90.0, 45.0, 80.0, 55.0
_STOPPING = 10.0  # for a part that used all of its time to stop and return its results


def measure_gpu(
    out: Path,
    device: str = "cuda",
    quick: bool = False,
    make: Make = list_cases,
    cache: Path | None = None,
) -> Json:
    """Measure a device, saving to ``out`` after each step; print a table and return the record.

    ``quick`` uses tiny shapes and leaves out the GPU tests. ``make`` returns the rows, ``cache`` is
    an archive of compiled kernels.
    """
    _check_arguments(out, device, cache)
    end = time.time() + WHOLE
    record: Json = {
        "finished": False,
        "environment": describe_environment(device),
        "interpreted": is_interpreted(),
        "cache": None,
        "ceilings": None,
        "rows": [make_row(case) for case in make(quick)],
        **dict.fromkeys(("study", "peers", "tests", "sanitizer", "verdict")),
    }
    keep = partial(save, out, record)
    try:
        keep()
    except OSError as error:
        raise RuntimeError(f"--out {out}: can't be written: {error}") from error
    counts: Counts | None = None

    def add_part(name: str, call: Callable[[], Json]) -> None:
        """Add a part to the record, or the reason why it failed."""
        try:
            record[name] = call()
        except Exception as error:
            record[name] = (record[name] or {}) | {"why": describe_error(error)}
        count_kernels(name)
        keep()

    def count_kernels(part: str) -> None:
        if counts is not None and (new := counts.count_new()) != NO_LOADS:
            record["cache"].setdefault("parts", {})[part] = new

    def study(limit: float) -> Json:
        from bench.gpu_report.study import measure_study  # its dependencies may be missing

        record["study"] = {}
        return measure_study(record["study"], keep, device, quick, time.time() + limit)

    with tempfile.TemporaryDirectory(prefix="repsim-kernels-") as folder:
        if cache is None:
            record["cache"] = {"why": "no --cache: Triton's own cache is used, and not counted"}
        else:
            add_part("cache", lambda: install(cache, Path(folder)))
            counts = Counts(Path(folder))
        add_part("ceilings", lambda: timing.measure_ceilings(device, quick, get_time_limit(quick)))
        if device == "cuda":
            torch.cuda.empty_cache()
        late = end - SANITIZER
        first = late - TESTS - PEERS - STUDY
        measure_rows(record, keep, device, quick, make, first, last=False)
        count_kernels("rows")
        add_part("study", lambda: study(_limit_part(STUDY, late - TESTS - PEERS)))
        limit = _limit_part(PEERS, late - TESTS)
        add_part("peers", lambda: measure_peers(device, quick, limit))
        why = "no GPU" if device == "cpu" else "quick" if quick else None
        add_part("tests", lambda: _run_unless(why, run_gpu_tests, _limit_part(TESTS, late)))
        most = max(SANITIZER, (end - time.time()) / 2)
        add_part("sanitizer", lambda: _run_unless(why, sanitize, _limit_part(most, end)))
        measure_rows(record, keep, device, quick, make, end)
        count_kernels("remaining rows")
    record["verdict"] = report.judge(record)
    record["finished"] = True
    keep()
    report.print_report(record)
    return record


def _check_arguments(out: Path, device: str, cache: Path | None) -> None:
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
    if cache is not None and not cache.is_file():
        raise RuntimeError(f"--cache {cache}: no such file; `make gpu-report` writes it")


def _run_unless(why: str | None, part: Callable[[float], Json], limit: float) -> Json:
    return part(limit) if why is None else {"why": f"not run: {why}"}


def _limit_part(most: float, end: float) -> float:
    """Return a part's seconds: at most ``most``, and early enough for the parts after ``end``."""
    return max(1.0, min(most, end - time.time()) - _STOPPING)
