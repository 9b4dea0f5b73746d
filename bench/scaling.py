"""How long a run takes by more workers, from what its units took: a model, without start-up."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

from experiments.store import Store

WORKERS = (1, 2, 4, 8, 16, 32, 64)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of some units ends, each taken, in their order, by the first free worker."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heappush(free, heapq.heappop(free) + each)
    return max(free)


def table(folder: Path) -> str:
    """Wall time and efficiency by the number of workers, for a finished run's recorded units."""
    store = Store(folder)
    found = [facts for facts in map(store.facts, store.units) if facts is not None]
    seconds = [facts["seconds"] for facts in found]
    total = sum(seconds)
    lines = [f"{len(seconds)} units, {total:.1f} s of work, the longest {max(seconds):.1f} s", ""]
    lines += ["workers  seconds  efficiency"]
    for workers in WORKERS:
        wall = makespan(seconds, workers)
        lines.append(f"{workers:7}  {wall:7.1f}  {total / workers / wall:9.0%}")
    return "\n".join(lines)
