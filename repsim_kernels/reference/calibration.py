"""Similarities under permutations of the stimuli."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repsim_kernels.reference.gram import Array, Real
from repsim_kernels.reference.pairwise import pairwise


def calibrate(
    xs: Sequence[Real],
    ys: Sequence[Real] | None,
    *,
    metric: str,
    options: dict[str, Any],
    indices: Real,
) -> tuple[Array, Array]:
    """Return metric(x, y) for all pairs (L, M), and metric(x, y[indices[a]]), (K, L, M)."""
    ys = xs if ys is None else ys
    metrics = {metric: options}
    if options.get("kernel") == "precomputed":
        permuted = ([y[np.ix_(index, index)] for y in ys] for index in indices)
    else:
        permuted = ([y[index] for y in ys] for index in indices)
    null = [pairwise(xs, side, metrics=metrics)[metric] for side in permuted]
    return pairwise(xs, ys, metrics=metrics)[metric], np.stack(null)


def permuted_products(h: Real, k: Real, indices: Real) -> Array:
    """Return the inner products of L matrices with M others, permuted, (K, L, M).

    h (L, n(n + 1)/2) are lower triangles, row by row, with doubled entries below the diagonal;
    k (n², M) are whole matrices. A row of indices (K, n) permutes rows and columns together.
    """
    n = indices.shape[1]
    i, j = np.tril_indices(n)
    matrices = np.asarray(k, dtype=np.float64).reshape(n, n, -1)
    lower = np.asarray(h, dtype=np.float64)
    return np.stack([lower @ matrices[np.ix_(index, index)][i, j] for index in indices])
