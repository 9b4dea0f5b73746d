"""Run time with more workers: the demo, measured, and a model from the seconds of its units."""

from __future__ import annotations

import heapq
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.common.machine import ROOT, Json, describe_environment
from repsim_kernels.experiments.runs.store import Store

WORKERS = (1, 2, 4, 8, 16, 32, 64)


def compute_makespan(seconds: Sequence[float], workers: int) -> float:
    """Return when the last unit ends if each goes, in order, to the first free worker."""
    free_at = [0.0] * workers
    for duration in seconds:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


def load_unit_seconds(folder: Path) -> list[float]:
    """Return the seconds of each finished unit of a run, in order."""
    store = Store(folder)
    facts = map(store.read_facts, store.units)
    return [unit["seconds"] for unit in facts if unit is not None]


def model_workers(seconds: Sequence[float]) -> list[tuple[int, float, float]]:
    """Return rows of workers, wall time and efficiency, without start-up."""
    walls = [(workers, compute_makespan(seconds, workers)) for workers in WORKERS]
    return [(workers, wall, sum(seconds) / workers / wall) for workers, wall in walls]


def format_table(seconds: Sequence[float]) -> str:
    """Format the rows of `model_workers` for a terminal."""
    total = sum(seconds)
    lines = [f"{len(seconds)} units, {total:.1f} s of work, the longest {max(seconds):.1f} s", ""]
    lines += ["workers  seconds  efficiency"]
    lines += [f"{n:7}  {wall:7.1f}  {share:9.0%}" for n, wall, share in model_workers(seconds)]
    return "\n".join(lines)


def measure_demo() -> Json:
    """Run the demo's study in one process, and with two workers that share the cores."""
    record: Json = {"environment": describe_environment("cpu"), "runs": []}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            options = ["--quiet", "--out", str(run), "--workers", str(workers)]
            command = [sys.executable, "-m", "repsim_kernels.experiments", "sweep", *options]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True)
            elapsed = time.perf_counter() - start
            units = load_unit_seconds(run)
            record["runs"].append({"workers": workers, "seconds": elapsed, "units": units})
    return record
