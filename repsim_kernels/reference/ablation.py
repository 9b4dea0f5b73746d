"""Distances of a representation from every one of its ablations, each ablated copy formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from repsim_kernels._routes import Distances, Route
from repsim_kernels.reference.cca import cca, pwcca, svcca
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import Array, Real, membership
from repsim_kernels.reference.procrustes import procrustes_distance

RIDGED = ("pwcca", "cca", "cca_squared")


def ablation_distances(
    x: Real,
    cells: Real,
    *,
    n_cells: int | None = None,
    metrics: Sequence[str] | None = None,
    ridge: float = 0.1,
    penalty: float = 0.0,
    memory: int | None = None,
) -> dict[str, Distances]:
    """Distances of x (n, p) from x with a cell's columns set to zero, by metric, (C,) each.

    All metrics unless some are named. 1 - similarity, the original first; ``procrustes`` is the
    squared form. ``ridge``, or ``penalty`` where that is not 0, serves the CCA family except svcca.
    The zeroed columns still count among the min(n - 1, p) directions that ridge CCA averages over,
    so that cells of different sizes are on one scale.

    A cell without a column that varies gives the distance of x from itself, one with all of
    them NaN. ``memory`` has no meaning here, where one copy exists at a time.
    """
    x = np.asarray(x, dtype=np.float64)
    members = membership(cells, n_cells)
    varies = (x != x[0]).any(axis=0)
    ridge = 0.0 if penalty else ridge
    distance = distances_from(x, ridge, penalty)
    metrics = tuple(distance) if metrics is None else metrics

    def one(name: str, cell: NDArray[np.bool_]) -> np.float64:
        if not varies[cell].any():
            exact = name not in RIDGED or ridge == penalty == 0
            return np.float64(0) if exact else distance[name](x)
        if cell[varies].all():
            return np.float64(np.nan)
        return distance[name](np.where(cell, 0, x))

    return {name: by_definition([one(name, cell) for cell in members]) for name in metrics}


def distances_from(
    x: Real, ridge: float, penalty: float
) -> dict[str, Callable[[Array], np.float64]]:
    """For each metric the distance of x from another representation."""
    return {
        "cka": lambda y: 1 - cka(x, y),
        "procrustes": lambda y: procrustes_distance(x, y),
        "pwcca": lambda y: 1 - pwcca(x, y, ridge=ridge, penalty=penalty),
        "cca": lambda y: 1 - cca(x, y, ridge=ridge, penalty=penalty),
        "cca_squared": lambda y: 1 - cca(x, y, squared=True, ridge=ridge, penalty=penalty),
        "svcca": lambda y: 1 - svcca(x, y),
        "cka_debiased": lambda y: 1 - cka(x, y, debiased=True),
    }


def by_definition(values: Sequence[np.float64]) -> Distances:
    """Distances that took no steps, since the metric itself gave them."""
    n = len(values)
    return Distances(np.array(values), np.full(n, Route.DEFINITION), np.zeros(n, int))
