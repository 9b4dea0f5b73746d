"""Distances of a representation from each of its ablations, from explicit ablated copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from repsim_kernels._cell_sets import Cells
from repsim_kernels._routes import Distances, Route
from repsim_kernels.reference.cca import cca, pwcca, svcca
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import Array, Real, membership
from repsim_kernels.reference.procrustes import procrustes_distance

RIDGE_METRICS = ("pwcca", "cca", "cca_squared")


def ablation_distances(
    x: Real,
    cells: Cells,
    *,
    n_cells: int | None = None,
    metrics: Sequence[str] | None = None,
    ridge: float = 0.1,
    penalty: float = 0.0,
    memory: int | None = None,
    grams: Real | None = None,
) -> dict[str, Distances]:
    """Return the distances of x (n, p) from x with a cell's columns set to zero, (C,) per metric.

    For partitions (T, p) they are (T, C).

    The default is all metrics. A distance is 1 - similarity, with the original first;
    ``procrustes`` is the squared form. ``ridge``, or ``penalty`` if that is not 0, applies to CCA,
    mean squared CCA and PWCCA. Zeroed columns still count among the min(n - 1, p) directions that
    ridge CCA averages over, so that cells of different sizes share a scale.

    For a cell without varying columns the result is the distance of x from itself; for a cell with
    all of them it is NaN. ``memory`` is ignored, since only one copy exists at a time,
    and so are ``grams``, since each metric is computed from the copy.
    """
    x = np.asarray(x, dtype=np.float64)
    members = membership(cells, n_cells)
    varies = (x != x[0]).any(axis=0)
    ridge = 0.0 if penalty else ridge
    distance = make_distance_functions(x, ridge, penalty)
    metrics = tuple(distance) if metrics is None else metrics

    def ablate(name: str, cell: NDArray[np.bool_]) -> np.float64:
        if not varies[cell].any():
            exact = name not in RIDGE_METRICS or ridge == penalty == 0
            return np.float64(0) if exact else distance[name](x)
        if cell[varies].all():
            return np.float64(np.nan)
        return distance[name](np.where(cell, 0, x))

    flat = members.reshape(-1, members.shape[-1])
    return {
        name: to_distances([ablate(name, cell) for cell in flat], members.shape[:-1])
        for name in metrics
    }


def make_distance_functions(
    x: Real, ridge: float, penalty: float
) -> dict[str, Callable[[Array], np.float64]]:
    """Return, for each metric, a function of y that computes the distance of x from y."""
    return {
        "cka": lambda y: 1 - cka(x, y),
        "procrustes": lambda y: procrustes_distance(x, y),
        "pwcca": lambda y: 1 - pwcca(x, y, ridge=ridge, penalty=penalty),
        "cca": lambda y: 1 - cca(x, y, ridge=ridge, penalty=penalty),
        "cca_squared": lambda y: 1 - cca(x, y, squared=True, ridge=ridge, penalty=penalty),
        "svcca": lambda y: 1 - svcca(x, y),
        "cka_debiased": lambda y: 1 - cka(x, y, debiased=True),
    }


def to_distances(values: Sequence[np.float64], shape: tuple[int, ...]) -> Distances:
    """Return values that come from the metrics themselves, without iterations, as `Distances`."""
    distances = np.reshape(values, shape)
    return Distances(distances, np.full(shape, Route.DEFINITION), np.zeros(shape, int))
