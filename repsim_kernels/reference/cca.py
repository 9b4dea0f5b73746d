"""Canonical correlations, plain, ridge, after truncation (SVCCA) and weighted (PWCCA)."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Array, Real, contrasts, shifted

EPS = np.finfo(np.float64).eps


def factors(x: Real) -> tuple[Array, Array, int]:
    """Left singular vectors (n - 1, r) and singular values (r,) of the centred x, and its rank.

    The null vector is gone. A direction counts where its squared singular value is above
    n · eps of the largest.
    """
    u, s, _ = np.linalg.svd(contrasts(len(x)).T @ shifted(x), full_matrices=False)
    return u, s, int(np.sum((s / s[0]) ** 2 > len(x) * EPS))


def _whitened(x: Real, ridge: float, penalty: float) -> tuple[Array, int]:
    """A (AᵀA + κI)^-½ in A's own directions, (n - 1, r), and the rank of A, the centred x."""
    u, s, rank = factors(x)
    kappa = penalty or ridge * np.sum(s**2) / len(x)
    if kappa == 0:
        return u[:, :rank], rank
    return u * (s / np.hypot(s, np.sqrt(kappa))), rank


def cca(
    x: Real, y: Real, *, squared: bool = False, ridge: float = 0.0, penalty: float = 0.0
) -> np.float64:
    """Mean canonical correlation ρ of x (n, p) and y (n, q), or mean ρ² if squared.

    Over min(rank x, rank y) directions; with a ridge, κ = penalty or ridge · ‖A‖²/n added to
    each side's AᵀA (Vinod 1976), over min(n - 1, p, q).
    """
    a, b = (_whitened(z, ridge, penalty)[0] for z in (x, y))
    rho = np.minimum(np.linalg.svd(a.T @ b, compute_uv=False), 1)
    return np.float64(np.mean(rho**2 if squared else rho))


def svcca(x: Real, y: Real, *, variance: float = 0.99) -> np.float64:
    """Mean canonical correlation of the leading components (Raghu et al. 2017).

    Each side keeps the fewest that explain the fraction ``variance`` of its variance.
    """
    kept = []
    for z in (x, y):
        u, s, rank = factors(z)
        explained = np.cumsum(s**2)
        count = int(np.searchsorted(explained, variance * explained[-1])) + 1
        kept.append(u[:, : min(count, rank)])
    rho = np.minimum(np.linalg.svd(kept[0].T @ kept[1], compute_uv=False), 1)
    return np.float64(np.mean(rho))


def pwcca(x: Real, y: Real, *, ridge: float = 0.0, penalty: float = 0.0) -> np.float64:
    """Canonical correlations weighted by what they stand for in x (Morcos et al. 2018).

    The weight of a correlation is Σⱼ |⟨h, aⱼ⟩|, h its variate in x and aⱼ the centred columns
    of x; the weights of the min(rank x, rank y) correlations sum to 1. With a ridge, as in
    ``cca``, the variates carry the shrinkage. Where correlations coincide their variates are not
    unique, nor are the weights: without a ridge, when p + q > n and not all correlations are 1.
    """
    (a, rank_x), (b, rank_y) = (_whitened(z, ridge, penalty) for z in (x, y))
    left, rho, _ = np.linalg.svd(a.T @ b, full_matrices=False)
    kept = min(rank_x, rank_y)
    variates = a @ left[:, :kept]
    weights = np.abs(variates.T @ (contrasts(len(x)).T @ shifted(x))).sum(axis=1)
    return np.float64(min(weights @ rho[:kept] / weights.sum(), 1.0))
