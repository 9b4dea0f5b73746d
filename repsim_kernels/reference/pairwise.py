"""A metric over all pairs of representations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repsim_kernels.reference.cca import cca, pwcca, svcca
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import Array, Real, centered_gram
from repsim_kernels.reference.predictivity import linear_predictivity
from repsim_kernels.reference.procrustes import procrustes, procrustes_distance
from repsim_kernels.reference.rsa import rsa

METRICS: dict[str, Callable[..., Any]] = {
    "cka": cka,
    "cka_debiased": lambda x, y, **options: cka(x, y, debiased=True, **options),
    "cca": cca,
    "svcca": svcca,
    "pwcca": pwcca,
    "procrustes": procrustes,
    "procrustes_distance": procrustes_distance,
    "rsa": rsa,
    "linear_predictivity": linear_predictivity,
}


def pairwise(
    xs: Sequence[Real], ys: Sequence[Real] | None = None, *, metrics: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return metrics of every x (n, p_i) with every y (n, q_j), (L, M); ys default to xs.

    ``metrics`` maps their names to their options.
    """
    ys = xs if ys is None else ys
    return {name: _compare(METRICS[name], xs, ys, options) for name, options in metrics.items()}


def _compare(
    function: Callable[..., Any], xs: Sequence[Real], ys: Sequence[Real], options: dict[str, Any]
) -> Array | dict[str, Array]:
    values = [[function(x, y, **options) for y in ys] for x in xs]
    if not isinstance(values[0][0], dict):
        return np.array(values)
    return {key: np.array([[v[key] for v in row] for row in values]) for key in values[0][0]}


def hsic(xs: Sequence[Real], ys: Sequence[Real] | None = None) -> tuple[Array, ...]:
    """Return HSIC₁ of every x (n, p_i) with every y (n, q_j), (L, M), and of each with itself.

    Bounds of the rounding errors of the latter, (L,) and (M,), come last.
    Source: Song et al. 2012, whose formula this is, written out.
    """
    grams = [[centered_gram(x) for x in side] for side in (xs, xs if ys is None else ys)]
    ks, ms = ([gram - np.diag(np.diag(gram)) for gram in side] for side in grams)
    n = len(xs[0])
    rounding = n * np.finfo(np.float64).eps
    floors = [
        np.array([(rounding * np.trace(gram)) ** 2 for gram in side]) / (n * (n - 1) * (n - 3))
        for side in grams
    ]
    return (
        np.array([[_hsic(k, m) for m in ms] for k in ks]),
        np.array([_hsic(k, k) for k in ks]),
        np.array([_hsic(m, m) for m in ms]),
        *floors,
    )


def _hsic(k: Array, m: Array) -> float:
    """Return HSIC₁ of two kernel matrices (n, n) with zero diagonals."""
    n = len(k)
    product = k @ m
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((np.trace(product) + middle - 2 * product.sum() / (n - 2)) / (n * (n - 3)))
