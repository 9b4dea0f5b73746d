"""Centred kernel alignment."""

from __future__ import annotations

from typing import Any

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centered_gram


def cka(
    x: Real,
    y: Real,
    *,
    debiased: bool = False,
    kernel: str = "linear",
    sigma: float | None = None,
    chance: bool = False,
) -> Any:
    """CKA of x (n, p) and y (n, q): the cosine of their Grams (Kornblith et al. 2019).

    Debiased: HSIC₁ of Song et al. (2012) in all three places, as the inner product of
    U-centred Grams (Székely & Rizzo 2014); it may be negative.

    With ``chance`` a dict of the "similarity" and of its mean over all permutations of the stimuli
    of y (not debiased): tr K tr L / ((n - 1) ‖K‖ ‖L‖), the mean of L so permuted being
    tr L / (n - 1) times the centring matrix.
    """
    k = centered_gram(x, kernel=kernel, sigma=sigma)
    m = centered_gram(y, kernel=kernel, sigma=sigma)
    if debiased:
        k, m = u_centered(k), u_centered(m)
    cosine = np.sum(k * m) / np.sqrt(np.sum(k * k)) / np.sqrt(np.sum(m * m))
    similarity = np.float64(np.clip(cosine, -1, 1))
    if not chance:
        return similarity
    shares = [np.trace(g) / np.linalg.norm(g) for g in (k, m)]
    return {"similarity": similarity, "chance": np.float64(np.prod(shares) / (len(k) - 1))}


def u_centered(k: Array) -> Array:
    """k (n, n) with a zero diagonal and, off it, row and column sums brought to zero.

    Where only rounding is left of it, as when all stimuli are equally far apart, there is no
    debiased similarity: NaN.
    """
    n = len(k)
    off = k - np.diag(np.diag(k))
    rows = off.sum(axis=1) / (n - 2)
    u = off - rows[:, None] - rows + rows.sum() / (n - 1)
    u -= np.diag(np.diag(u))
    rounding = n * np.finfo(np.float64).eps * np.linalg.norm(k)
    return u if np.linalg.norm(u) > rounding else np.full_like(u, np.nan)
