"""Canonical correlation: plain, with a ridge, truncated (SVCCA) and weighted (PWCCA)."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Array, Real, contrasts, subtract_first_row

EPS = np.finfo(np.float64).eps


def decompose(x: Real) -> tuple[Array, Array, int]:
    """Return left singular vectors (n - 1, r), singular values (r,) and rank of the centred x.

    The vectors are in the basis `contrasts`, which lacks the vector of ones. The rank is the number
    of squared singular values above n · eps times the largest.
    """
    u, s, _ = np.linalg.svd(contrasts(len(x)).T @ subtract_first_row(x), full_matrices=False)
    return u, s, int(np.sum((s / s[0]) ** 2 > len(x) * EPS))


def _whiten(x: Real, ridge: float, penalty: float) -> tuple[Array, int]:
    """Return A (AᵀA + κI)^-½ in the singular directions of A, the centred x, and its rank."""
    u, s, rank = decompose(x)
    kappa = penalty or ridge * np.sum(s**2) / len(x)
    if kappa == 0:
        return u[:, :rank], rank
    return u * (s / np.hypot(s, np.sqrt(kappa))), rank


def cca(
    x: Real, y: Real, *, squared: bool = False, ridge: float = 0.0, penalty: float = 0.0
) -> np.float64:
    """Return the mean canonical correlation ρ of x (n, p) and y (n, q), or mean ρ² if squared.

    The mean is over min(rank x, rank y) directions. With a ridge it is over min(n - 1, p, q), and
    κ = penalty or ridge · ‖A‖²/n is added to each side's AᵀA (Vinod 1976).
    """
    a, b = (_whiten(z, ridge, penalty)[0] for z in (x, y))
    rho = np.minimum(np.linalg.svd(a.T @ b, compute_uv=False), 1)
    return np.float64(np.mean(rho**2 if squared else rho))


def svcca(x: Real, y: Real, *, variance: float = 0.99) -> np.float64:
    """Return the mean canonical correlation of the leading components (Raghu et al. 2017).

    Each side keeps the fewest components that explain the share ``variance`` of its variance.
    """
    bases = []
    for z in (x, y):
        u, s, rank = decompose(z)
        explained = np.cumsum(s**2)
        count = int(np.searchsorted(explained, variance * explained[-1])) + 1
        bases.append(u[:, : min(count, rank)])
    rho = np.minimum(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False), 1)
    return np.float64(np.mean(rho))


def pwcca(x: Real, y: Real, *, ridge: float = 0.0, penalty: float = 0.0) -> np.float64:
    """Return the projection-weighted mean canonical correlation (Morcos et al. 2018).

    The weight of a correlation is Σⱼ |⟨h, aⱼ⟩|, with h its variate in x and aⱼ the centred columns
    of x; the weights of the min(rank x, rank y) correlations sum to 1. With a ridge, as in
    ``cca``, the variates carry the shrinkage. If correlations are equal, their variates are not
    unique, and neither are the weights; without a ridge this happens if p + q > n. It affects the
    result unless all correlations are 1.
    """
    (a, rank_x), (b, rank_y) = (_whiten(z, ridge, penalty) for z in (x, y))
    left, rho, _ = np.linalg.svd(a.T @ b, full_matrices=False)
    count = min(rank_x, rank_y)
    variates = a @ left[:, :count]
    weights = np.abs(variates.T @ (contrasts(len(x)).T @ subtract_first_row(x))).sum(axis=1)
    return np.float64(min(weights @ rho[:count] / weights.sum(), 1.0))
