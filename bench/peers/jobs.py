"""The jobs that packages are compared at, their inputs, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common import longdouble

Array = NDArray[np.float64]

JOBS = ("ablations", "pairs", "pair")
CKA = ("cka", "cka_debiased")
_PAIRS = {  # n: p
    256: (64, 1024, 16_384, 131_072, 1_000_000),
    1000: (64, 4096, 100_000),
    4000: (4096,),
    10_000: (64, 1024),
}


@dataclass(frozen=True)
class Case:
    """One job at one size: ``layers`` representations of n stimuli and p neurons, in float32."""

    job: str  # of JOBS
    n: int
    p: int
    metrics: tuple[str, ...] = CKA
    layers: int = 1
    cells: int = 0

    @property
    def of(self) -> int:
        """How many comparisons the job is, for who makes them one after the other."""
        return {"pair": 1, "pairs": self.layers * (self.layers - 1) // 2}.get(self.job, self.cells)

    @property
    def count(self) -> int:
        """How many representations there are."""
        return {"pair": 2, "pairs": self.layers}.get(self.job, 1)

    def labels(self) -> NDArray[np.int64]:
        """The cell of each neuron."""
        return np.random.default_rng(1).permutation(np.arange(self.p) % max(self.cells, 1))

    def facts(self) -> dict[str, Any]:
        found = asdict(self)
        del found["metrics"]
        return found | {"dtype": "float32", "of": self.of}


def cases(quick: bool) -> list[Case]:
    """What is run, in this order."""
    others = ("procrustes", "rsa")
    if quick:
        return [
            Case("ablations", 20, 2000, layers=1, cells=8),
            Case("pairs", 40, 100, layers=4),
            Case("pair", 60, 20, (*CKA, *others, "cca")),
            Case("pair", 60, 200, (*CKA, *others)),
        ]
    found = [Case("ablations", 50, 193_600, cells=c) for c in (16, 100, 1000)]
    found += [Case("pairs", 1000, 4096, (*CKA, "rsa"), layers=50)]
    found += [Case("pair", n, p) for n, ps in _PAIRS.items() for p in ps]
    return [
        *found,
        Case("pair", 500, 64, (*others, "cca")),
        Case("pair", 500, 2048, others),
    ]


def write_inputs(case: Case, folder: Path) -> list[Path]:
    """Rectified activations with ten directions in common, a file each, for all to read."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((case.n, 10), dtype=np.float32)
    paths = []
    for i in range(case.count):
        x = shared @ rng.standard_normal((10, case.p), dtype=np.float32)
        x /= 3
        x += rng.standard_normal(x.shape, dtype=np.float32)
        np.maximum(x, 0, out=x)
        paths.append(folder / f"{i}.npy")
        np.save(paths[-1], x)
    return paths


def sample(case: Case, calls: int) -> list[int]:
    """Which of the comparisons, evenly spread, where all would take too long."""
    return [case.of * k // calls for k in range(calls)]


def pairs_of(case: Case) -> list[tuple[int, int]]:
    return list(combinations(range(case.layers), 2))


def wanted(case: Case, xs: Sequence[Any], metric: str, which: Sequence[int]) -> Array:
    """Similarities by the definitions, in float64; of ablations and pairs those named."""
    if case.job == "ablations":
        x = _centred(xs[0])
        return np.array([_similarity(metric, x, x * (case.labels() != k)) for k in which])
    pairs = [(0, 1)] if case.job == "pair" else [pairs_of(case)[k] for k in which]
    return np.array([_similarity(metric, *(_centred(xs[i]) for i in pair)) for pair in pairs])


def _centred(x: Any) -> Array:
    c = np.asarray(x, np.float64)
    return c - c.mean(0)


def _similarity(metric: str, x: Array, y: Array) -> float:
    """Of centred representations."""
    if metric == "cca":
        u, v = (np.linalg.svd(z, full_matrices=False)[0] for z in (x, y))
        return float(np.linalg.svd(u.T @ v, compute_uv=False).mean())
    if metric == "procrustes":
        return longdouble.procrustes(x, y)
    return float(getattr(longdouble, metric)(x @ x.T, y @ y.T))
