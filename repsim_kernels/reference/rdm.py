"""Distances between the patterns of conditions."""

from __future__ import annotations

from typing import Any

import numpy as np

from repsim_kernels._noise import Noise
from repsim_kernels.reference.gram import Array, Real
from repsim_kernels.reference.rsa import pair_distances


def rdm(x: Real, *, distance: str, groups: Any = None, noise: Noise | None = None) -> Array:
    """Return the distances of all pairs of conditions, (n_cond(n_cond - 1)/2,).

    ``groups`` (K, n_cond, n) says which rows of x (n, p) are averaged to the patterns of K folds.
    """
    p = x.shape[1]
    averages = None if groups is None else (groups @ x) / groups.sum(2)[..., None]
    if distance not in ("mahalanobis", "crossnobis"):
        squared = pair_distances(x if averages is None else averages[0], distance).values
        if distance == "euclidean":
            return np.sqrt(squared)
        return squared if distance == "sqeuclidean" else squared / 2
    patterns = np.asarray(x[None] if averages is None else averages, dtype=np.float64)
    precision = np.eye(p) if noise is None else invert(estimate_covariance(noise))
    n_folds, n_cond = patterns.shape[:2]
    distances = []
    for i in range(n_cond):
        for j in range(i + 1, n_cond):
            delta = patterns[:, i] - patterns[:, j]
            if distance == "mahalanobis":
                distances.append(np.sqrt(delta[0] @ precision @ delta[0]))
                continue
            products = [
                delta[f] @ precision @ delta[g]
                for f in range(n_folds)
                for g in range(n_folds)
                if f != g
            ]
            distances.append(np.mean(products) / p)
    return np.array(distances)


def estimate_covariance(noise: Noise) -> Array:
    """Return the covariance of the noise (p, p)."""
    if noise.covariance is not None:
        return np.asarray(noise.covariance)
    if noise.variances is not None:
        return np.diag(noise.variances)
    return noise.scale * shrink_covariance(noise.residuals)


def shrink_covariance(residuals: Array) -> Array:
    """Return the covariance of centred residuals (m, p), shrunk as Ledoit & Wolf 2004 do.

    The weight of the identity minimises the expected squared error: the mean squared distance of
    the rows' own products from their average S, divided by m and by the squared distance of S from
    the identity times the mean variance.
    """
    m, p = residuals.shape
    s = residuals.T @ residuals / m
    identity = np.trace(s) / p * np.eye(p)
    error = np.mean([np.sum((np.outer(r, r) - s) ** 2) for r in residuals]) / m
    spread = np.sum((s - identity) ** 2)
    share = min(error / spread, 1) if spread > 0 else 0.0
    return np.asarray(share * identity + (1 - share) * s)


def invert(covariance: Array) -> Array:
    """Return the inverse of a covariance (p, p); NaN if it is not positive definite."""
    values = np.linalg.eigvalsh(covariance)
    if values[0] <= len(values) * np.finfo(np.float64).eps * values[-1]:
        return np.full_like(covariance, np.nan)
    return np.asarray(np.linalg.inv(covariance))
