"""The delete-one jackknife of CKA and RSA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repsim_kernels.reference.cka import u_centre
from repsim_kernels.reference.gram import Array, Real, centered_gram, double_centre
from repsim_kernels.reference.rsa import compute_dissimilarities


def interval(
    xs: Sequence[Real], ys: Sequence[Real], *, metric: str, **options: Any
) -> dict[str, Array]:
    """Return similarities, their jackknife variances, and corrections of these: (L, M) each.

    The variance is (n - 1) / n Σ (rᵢ - r̄)² of the similarities rᵢ without stimulus i (Tukey 1958).
    It contains the variance of pairs of stimuli twice: the correction is 2 Σ wᵢⱼ², where wᵢⱼ is
    the influence of a pair, at most three quarters of the variance.
    """
    make, centre = _choose_matrices(metric, options)
    left, right = ([make(x) for x in side] for side in (xs, ys))
    values = np.array([[_jackknife(k, m, centre) for m in right] for k in left])
    return dict(zip(("estimate", "variance", "correction"), np.moveaxis(values, 2, 0), strict=True))


def _choose_matrices(
    metric: str, options: dict[str, Any]
) -> tuple[Callable[[Real], Array], Callable[[Array], Array]]:
    """Return how a matrix of all stimuli is made, and how it or a part of it is centred.

    The bandwidth of an RBF kernel is that of all stimuli.
    """
    if metric == "rsa":

        def make_square(x: Real) -> Array:
            d = np.zeros((len(x), len(x)))
            d[np.triu_indices(len(x), 1)] = compute_dissimilarities(x, **options)
            return d + d.T

        return make_square, _subtract_mean if options["compare"] == "pearson" else lambda d: d
    kernel, sigma = options["kernel"], options["sigma"]
    centre = u_centre if options.get("debiased", True) else double_centre
    if kernel == "precomputed":
        return double_centre, centre
    return lambda x: centered_gram(x, kernel=kernel, sigma=sigma), centre


def _subtract_mean(d: Array) -> Array:
    """Subtract the mean distance from a matrix of distances (n, n), except from its diagonal."""
    n = len(d)
    return (d - d.sum() / (n * (n - 1))) * (1 - np.eye(n))


def _jackknife(k: Array, m: Array, centre: Callable[[Array], Array]) -> tuple[float, float, float]:
    """Return the cosine of two matrices after centring, its variance, and the correction.

    NaN if without one stimulus only rounding errors remain of a matrix.
    """
    n = len(k)
    u, v = centre(k), centre(m)
    r = _compute_cosine(u, v)

    def remove(g: Array, i: int) -> Array:
        part = centre(np.delete(np.delete(g, i, axis=0), i, axis=1))
        rounding = n * np.finfo(np.float64).eps * np.linalg.norm(g)
        return part if np.linalg.norm(part) > rounding else np.full_like(part, np.nan)

    rs = np.array([_compute_cosine(remove(u, i), remove(v, i)) for i in range(n)])
    variance = (n - 1) / n * np.sum((rs - rs.mean()) ** 2)
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    moves = (u * v - r / 2 * (u * u + v * v)) * (1 - np.eye(n))
    return r, variance, np.minimum(2 * np.sum(moves**2), 0.75 * variance)


def _compute_cosine(u: Array, v: Array) -> float:
    return float(np.clip(np.sum(u * v) / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))
