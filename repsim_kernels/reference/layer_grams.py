"""The Gram matrices of several layers, and the inner products of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from repsim_kernels.reference.cka import u_centre
from repsim_kernels.reference.gram import Array, Real, centered_gram


def layer_grams(xs: Sequence[Real], *, debiased: bool) -> tuple[Array, Array, Array]:
    """Return the centred Grams of xs, each (n, p_i), as vectors (L, n²), and their traces (L,).

    The Grams are U-centred if ``debiased``, so that the inner product of two vectors is n (n - 3)
    HSIC₁. Bounds of the rounding errors of their squared norms come last, (L,).
    Source: Song et al. 2012 for HSIC₁, Székely & Rizzo 2014 for its form as an inner product.
    """
    grams = [centered_gram(x) for x in xs]
    n, traces = len(grams[0]), np.array([np.trace(gram) for gram in grams])
    floors = np.zeros(len(grams))
    if debiased:
        floors = (n * np.finfo(np.float64).eps * traces) ** 2 / (n - 1)
        # U-centring gives NaN if only rounding remains, which is 0 here.
        grams = [
            np.nan_to_num(u_centre(gram)) if np.isfinite(trace) else gram
            for gram, trace in zip(grams, traces, strict=True)
        ]
    return np.stack([gram.ravel() for gram in grams]), traces, floors


def unpack_gram(vector: Real, *, n: int) -> Array:
    """Return the Gram (n, n) that is a row of `layer_grams`."""
    return np.asarray(vector, dtype=np.float64).reshape(n, n)


def gram_products(h: Real, k: Real, *, n: int, debiased: bool) -> tuple[Array, Array, Array]:
    """Return the inner products of all Grams h (R, n²) with all k (C, n²), and of each with itself.

    These are (R, C), (R,) and (C,). The vectors are already centred, whatever ``debiased`` is.
    """
    h, k = np.asarray(h, dtype=np.float64), np.asarray(k, dtype=np.float64)
    return h @ k.T, np.sum(h * h, axis=1), np.sum(k * k, axis=1)
