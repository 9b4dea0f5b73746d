"""The Gram matrices of several layers, and the inner products of all pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import cka, features, gram, memory, panels

# Twice `cka.MAX_ENTRY`, so that few stimuli with many independent features need no float64.
_MAX_ENTRY = 4.0
# Width of the products of few stimuli: a multiple of 16, the columns that the BLAS takes together.
_WIDTH = 32


def layer_grams(xs: list[Tensor], *, debiased: bool, precision: str) -> tuple[Tensor, ...]:
    """Return the centred Grams of xs, each (n, p_i), as vectors (L, m), and their traces (L,).

    Inner products of the vectors are those of the Grams, U-centred if ``debiased``. Bounds of the
    rounding errors of their squared norms come last, (L,). All are float64, on the device of xs.
    """
    dtype = cka.product_dtype(xs, "linear", precision)
    one = _gram_of_few(xs[0], debiased) if len(xs) == 1 and _are_few(xs[0], dtype) else None
    if one is not None:
        vectors, traces = one
    else:
        vectors, _, root_halves = cka.kernel_vectors(xs, debiased, "linear", None, dtype)
        vectors.mul_(math.sqrt(2))
        traces = torch.from_numpy(math.sqrt(2) * root_halves).to(vectors.device)
    floors = cka.rounding_floor_of_trace(traces, len(xs[0])) if debiased else 0.0 * traces
    return vectors, traces, floors


def _are_few(x: Tensor, dtype: torch.dtype) -> bool:
    return x.numel() > 0 and len(x) <= panels.PANEL and dtype == torch.float32 and not x.is_cuda


def _gram_of_few(x: Tensor, debiased: bool) -> tuple[Tensor, Tensor] | None:
    """Return the Gram of at most one panel of stimuli, (1, n²), and its trace.

    As `cka.kernel_vectors` with float32 products, in a quarter less time for 2,048 neurons. None
    if float32 keeps too few digits.
    """
    n, means_squared = len(x), 0.0
    g = x.new_zeros(n, n, dtype=torch.float64)
    block = x.new_empty(n, min(x.shape[1], panels.SHORT), dtype=torch.float32)
    weights = block.new_full((n,), 1 / n)  # faster than torch.mean
    for run in panels.split(x.shape[1], panels.SHORT):
        short = x[:, run].float()
        c, mean = block[:, : short.shape[1]], weights @ short
        torch.sub(short, mean, out=c)
        for start in range(0, n, _WIDTH):
            rows = slice(start, start + _WIDTH)
            g[start:, rows] += c[start:] @ c[rows].mT
        means_squared += float(mean @ mean)
    g = g.tril() + g.tril(-1).mT
    largest = float(g.diagonal().max())
    g = gram.centre_gram(g)
    trace = g.diagonal().sum()
    if debiased:
        packed = [(slice(0, n), g)]
        gram.u_centre(packed, out=packed)
    norm, variance = float(panels.sum_squares(g.view(-1))), float(trace) / n
    if not features.keeps_digits(norm, largest, _MAX_ENTRY, means_squared, variance):
        return None
    return g.view(1, -1), trace[None]


def unpack_gram(vector: Tensor, *, n: int) -> Tensor:
    """Return the Gram (n, n), float64, that is a row of `layer_grams`."""
    return panels.unpack_vectors(vector.double() / math.sqrt(2), n)


def gram_products(h: Tensor, k: Tensor, *, n: int, debiased: bool) -> tuple[Tensor, ...]:
    """Return the inner products of all Grams h (R, m) with all k (C, m), and of each with itself.

    These are (R, C), (R,) and (C,), float64. The Grams come from `layer_grams`, which has centred
    them; float32 is converted block by block.
    """
    xy = torch.zeros(len(h), len(k), dtype=torch.float64, device=h.device)
    xx, yy = xy.new_zeros(len(h)), xy.new_zeros(len(k))
    for run in panels.split(h.shape[1], max(1, memory.BLOCK // (len(h) + len(k)))):
        a = h[:, run].double()
        b = a if k is h else k[:, run].double()
        xy += panels.multiply(a, b)
        xx += torch.linalg.vecdot(a, a)
        yy += torch.linalg.vecdot(b, b)
    return xy, xx, yy
