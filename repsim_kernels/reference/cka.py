"""Centred kernel alignment."""

from __future__ import annotations

from typing import Any

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centered_gram, double_centre


def cka(
    x: Real,
    y: Real,
    *,
    debiased: bool = False,
    kernel: str = "linear",
    sigma: float | None = None,
    chance: bool = False,
) -> Any:
    """Return CKA of x (n, p) and y (n, q): the cosine of their Grams (Kornblith et al. 2019).

    For the kernel ``"precomputed"``, x and y are kernel matrices (n, n), which are centred here.

    ``debiased`` uses HSIC₁ of Song et al. (2012) in all three places, as the inner product of
    U-centred Grams (Székely & Rizzo 2014); it may be negative.

    ``chance`` returns a dict of the "similarity" and its mean "chance" over all permutations of the
    stimuli of y (not debiased): tr K tr L / ((n - 1) ‖K‖ ‖L‖), since the mean of the permuted L is
    tr L / (n - 1) times the centring matrix.
    """
    if kernel == "precomputed":
        k, m = double_centre(x), double_centre(y)
    else:
        k, m = (centered_gram(z, kernel=kernel, sigma=sigma) for z in (x, y))
    if debiased:
        k, m = u_centre(k), u_centre(m)
    cosine = np.sum(k * m) / np.sqrt(np.sum(k * k)) / np.sqrt(np.sum(m * m))
    similarity = np.float64(np.clip(cosine, -1, 1))
    if not chance:
        return similarity
    shares = [np.trace(g) / np.linalg.norm(g) for g in (k, m)]
    return {"similarity": similarity, "chance": np.float64(np.prod(shares) / (len(k) - 1))}


def u_centre(k: Array) -> Array:
    """U-centre k (n, n): a zero diagonal, and rows and columns that sum to zero.

    NaN if only rounding errors remain, for example if all stimuli are equally far apart, since the
    debiased similarity is then undefined.
    """
    n = len(k)
    off_diagonal = k - np.diag(np.diag(k))
    rows = off_diagonal.sum(axis=1) / (n - 2)
    u = off_diagonal - rows[:, None] - rows + rows.sum() / (n - 1)
    u -= np.diag(np.diag(u))
    rounding = n * np.finfo(np.float64).eps * np.linalg.norm(k)
    return u if np.linalg.norm(u) > rounding else np.full_like(u, np.nan)
