"""How long a run takes by more workers: the demo, measured, and a model from what units took."""

from __future__ import annotations

import heapq
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.common.machine import ROOT, Json, environment
from repsim_kernels.experiments.runs.store import Store

WORKERS = (1, 2, 4, 8, 16, 32, 64)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of some units ends, each taken, in their order, by the first free worker."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heappush(free, heapq.heappop(free) + each)
    return max(free)


def unit_seconds(folder: Path) -> list[float]:
    """What each unit of a run took, in their order."""
    store = Store(folder)
    found = [facts for facts in map(store.facts, store.units) if facts is not None]
    return [facts["seconds"] for facts in found]


def modelled(seconds: Sequence[float]) -> list[tuple[int, float, float]]:
    """Workers, wall time and efficiency, start-up aside."""
    walls = [(workers, makespan(seconds, workers)) for workers in WORKERS]
    return [(workers, wall, sum(seconds) / workers / wall) for workers, wall in walls]


def table(seconds: Sequence[float]) -> str:
    """What is `modelled`, for a terminal."""
    total = sum(seconds)
    lines = [f"{len(seconds)} units, {total:.1f} s of work, the longest {max(seconds):.1f} s", ""]
    lines += ["workers  seconds  efficiency"]
    lines += [f"{n:7}  {wall:7.1f}  {share:9.0%}" for n, wall, share in modelled(seconds)]
    return "\n".join(lines)


def demo() -> Json:
    """Run the demo's study in one process and by two workers, which share the cores."""
    record: Json = {"environment": environment("cpu"), "runs": []}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            options = ["--quiet", "--out", str(run), "--workers", str(workers)]
            command = [sys.executable, "-m", "repsim_kernels.experiments", "sweep", *options]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True)
            took = time.perf_counter() - start
            record["runs"].append({"workers": workers, "seconds": took, "units": unit_seconds(run)})
    return record
