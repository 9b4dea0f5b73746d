"""The jobs on which packages are compared, their inputs, and the expected results."""

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
class Workload:
    """One job at one size: ``layers`` representations of n stimuli and p neurons, in float32."""

    job: str  # one of JOBS
    n: int
    p: int
    metrics: tuple[str, ...] = CKA
    layers: int = 1
    cells: int = 0

    @property
    def n_comparisons(self) -> int:
        """Number of comparisons of two representations that the job consists of."""
        return {"pair": 1, "pairs": self.layers * (self.layers - 1) // 2}.get(self.job, self.cells)

    @property
    def n_inputs(self) -> int:
        """Number of representations in the input."""
        return {"pair": 2, "pairs": self.layers}.get(self.job, 1)

    def labels(self) -> NDArray[np.int64]:
        """Return the cell of each neuron."""
        return np.random.default_rng(1).permutation(np.arange(self.p) % max(self.cells, 1))

    def facts(self) -> dict[str, Any]:
        """Return the values that identify the job in a record."""
        facts = asdict(self)
        del facts["metrics"]
        return facts | {"dtype": "float32", "of": self.n_comparisons}


def list_workloads(quick: bool) -> list[Workload]:
    """Return the workloads in the order in which they run."""
    others = ("procrustes", "rsa")
    if quick:
        return [
            Workload("ablations", 20, 2000, layers=1, cells=8),
            Workload("pairs", 40, 100, layers=4),
            Workload("pair", 60, 20, (*CKA, *others, "cca")),
            Workload("pair", 60, 200, (*CKA, *others)),
        ]
    large = [Workload("ablations", 50, 193_600, cells=c) for c in (16, 100, 1000)]
    large += [Workload("pairs", 1000, 4096, (*CKA, "rsa"), layers=50)]
    large += [Workload("pair", n, p) for n, ps in _PAIRS.items() for p in ps]
    return [
        *large,
        Workload("pair", 500, 64, (*others, "cca")),
        Workload("pair", 500, 2048, others),
    ]


def write_inputs(workload: Workload, folder: Path) -> list[Path]:
    """Write rectified activations with ten shared directions, one file per representation."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((workload.n, 10), dtype=np.float32)
    paths = []
    for i in range(workload.n_inputs):
        x = shared @ rng.standard_normal((10, workload.p), dtype=np.float32)
        x /= 3
        x += rng.standard_normal(x.shape, dtype=np.float32)
        np.maximum(x, 0, out=x)
        paths.append(folder / f"{i}.npy")
        np.save(paths[-1], x)
    return paths


def sample_comparisons(workload: Workload, calls: int) -> list[int]:
    """Return the indices of an evenly spread sample of the comparisons."""
    return [workload.n_comparisons * k // calls for k in range(calls)]


def list_pairs(workload: Workload) -> list[tuple[int, int]]:
    return list(combinations(range(workload.layers), 2))


def compute_expected(
    workload: Workload, xs: Sequence[Any], metric: str, which: Sequence[int]
) -> Array:
    """Return similarities by the float64 definitions, for the comparisons ``which``."""
    if workload.job == "ablations":
        x = _centre(xs[0])
        return np.array(
            [_compute_similarity(metric, x, x * (workload.labels() != k)) for k in which]
        )
    pairs = [(0, 1)] if workload.job == "pair" else [list_pairs(workload)[k] for k in which]
    return np.array(
        [_compute_similarity(metric, *(_centre(xs[i]) for i in pair)) for pair in pairs]
    )


def _centre(x: Any) -> Array:
    c = np.asarray(x, np.float64)
    return c - c.mean(0)


def _compute_similarity(metric: str, x: Array, y: Array) -> float:
    """Return the similarity of two centred representations."""
    if metric == "cca":
        u, v = (np.linalg.svd(z, full_matrices=False)[0] for z in (x, y))
        return float(np.linalg.svd(u.T @ v, compute_uv=False).mean())
    if metric == "procrustes":
        return longdouble.procrustes(x, y)
    return float(getattr(longdouble, metric)(x @ x.T, y @ y.T))
