"""Distances of a representation from each of its ablations, from explicit ablated copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels._cell_sets import Cells
from repsim_kernels._routes import Distances, Route
from repsim_kernels.reference.cca import cca, pwcca, svcca
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import Real, membership
from repsim_kernels.reference.neighbours import mutual_knn
from repsim_kernels.reference.procrustes import procrustes_distance
from repsim_kernels.reference.rsa import rsa

RIDGE_METRICS = ("pwcca", "cca", "cca_squared")
# Metrics of rows that are not centred, which constant columns change.
RAW_METRICS = ("rsa_cosine", "rsa_correlation", "mutual_knn")


def ablation_distances(
    x: Real,
    cells: Cells,
    *,
    n_cells: int | None = None,
    metrics: Sequence[str] | None = None,
    ridge: float = 0.1,
    penalty: float = 0.0,
    memory: int | None = None,
    compare: str = "spearman",
    sigma: float = 1.0,
    k: int = 10,
    grams: Real | None = None,
) -> dict[str, Distances]:
    """Return the distances of x (n, p) from x with a cell's columns set to zero, (C,) per metric.

    For partitions (T, p) they are (T, C).

    The default is all metrics. A distance is 1 - similarity, with the original first;
    ``procrustes`` is the squared form. ``ridge``, or ``penalty`` if that is not 0, applies to CCA,
    mean squared CCA and PWCCA, ``compare`` to RSA, ``sigma`` to RBF CKA and ``k`` to mutual kNN.
    Zeroed columns still count among the min(n - 1, p) directions that ridge CCA averages over, so
    that cells of different sizes share a scale.

    For a cell without varying columns the result is the distance of x from itself, except that
    metrics of cosine and correlation distances also see constant columns that are not 0; for a cell
    with all varying columns it is NaN. ``memory`` is ignored, since only one copy exists at a time,
    and so are ``grams``, since each metric is computed from the copy.
    """
    members = membership(cells, n_cells)
    varies, nonzero = (x != x[0]).any(axis=0), (x != 0).any(axis=0)
    ridge = 0.0 if penalty else ridge
    distance = make_distance_functions(x, ridge, penalty, compare, sigma, k)
    metrics = tuple(distance) if metrics is None else metrics

    def ablate(name: str, cell: NDArray[np.bool_]) -> np.float64:
        changes = nonzero if name in RAW_METRICS else varies
        if not changes[cell].any():
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
    x: Real,
    ridge: float,
    penalty: float,
    compare: str = "spearman",
    sigma: float = 1.0,
    k: int = 10,
) -> dict[str, Callable[[Real], np.float64]]:
    """Return, for each metric, a function of y that computes the distance of x from y.

    Which distances between stimuli tie depends on the dtype of x and y.
    """
    wide = np.asarray(x, dtype=np.float64)

    def widen(similarity: Callable[..., Any], **options: Any) -> Callable[[Real], np.float64]:
        return lambda y: 1 - similarity(wide, np.asarray(y, dtype=np.float64), **options)

    def compare_rows(distance: str) -> Callable[[Real], np.float64]:
        return lambda y: 1 - rsa(x, y, distance=distance, compare=compare)

    return {
        "cka": widen(cka),
        "procrustes": lambda y: procrustes_distance(wide, np.asarray(y, dtype=np.float64)),
        "pwcca": widen(pwcca, ridge=ridge, penalty=penalty),
        "cca": widen(cca, ridge=ridge, penalty=penalty),
        "cca_squared": widen(cca, squared=True, ridge=ridge, penalty=penalty),
        "svcca": widen(svcca),
        "cka_debiased": widen(cka, debiased=True),
        "rsa_euclidean": compare_rows("euclidean"),
        "rsa_cosine": compare_rows("cosine"),
        "rsa_correlation": compare_rows("correlation"),
        "cka_rbf": widen(cka, kernel="rbf", sigma=sigma),
        "mutual_knn": lambda y: 1 - mutual_knn(x, y, k=k),
    }


def to_distances(values: Sequence[np.float64], shape: tuple[int, ...]) -> Distances:
    """Return values that come from the metrics themselves, without iterations, as `Distances`."""
    distances = np.reshape(values, shape)
    return Distances(distances, np.full(shape, Route.DEFINITION), np.zeros(shape, int))
