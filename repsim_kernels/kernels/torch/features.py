"""Inner products of Grams from products of features, for fewer neurons than stimuli."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram, memory, panels

_MIN_SHARE = 1e-4  # least share of a squared norm that must remain after U-centring
# Most that a diagonal entry of a product of features may be, relative to the norm of the product,
# for products in float32. Values that repeat round alike, so that no entry must decide alone.
_MAX_ENTRY = 0.25
# Least such entry whose terms don't underflow in float32, and most that the means may be relative
# to the standard deviation, both as root mean squares over the features.
_MIN_ENTRY, _MAX_MEAN = 1e-28, 30.0
# Multiplications up to which one whole product is fastest: each panel costs more than it saves.
_SMALL = 2**24


def are_cheaper(xs: list[Tensor], comparisons: int) -> bool:
    """Return whether products of all features cost less than Grams and their comparisons.

    In operations divided by n: half of (Σ p)², against n Σ p / 2 for the Grams and n for each
    inner product of two Grams.
    """
    n, p = xs[0].shape[-2], sum(x.shape[-1] for x in xs)
    return p * p < n * (p + 2 * comparisons)


def compare(
    xs: list[Tensor], debiased: bool, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the inner products (…, T, T) and traces (…, T) of the Grams of xs (…, n, p_i).

    Only the upper triangle is computed. ``debiased`` gives the products of the U-centred Grams,
    n(n - 3) HSIC₁. ``dtype`` is that of the products of features; if float32 keeps too few digits,
    they are computed again. None if so does float64, because U-centring cancels nearly all of a
    norm, as with one outlying stimulus: the Grams of stimuli then keep more.
    """
    if any(x.shape[:-2] != xs[0].shape[:-2] for x in xs):
        lead = torch.broadcast_shapes(*(x.shape[:-2] for x in xs))
        xs = [x.expand(*lead, *x.shape[-2:]) for x in xs]
    widths = [x.shape[-1] for x in xs]
    starts = [0, *itertools.accumulate(widths[:-1])]
    packed, means, rows = _multiply(xs, widths, starts, dtype, debiased)
    products, diagonal = _sum_squares(packed, starts)
    norms = products.diagonal(axis1=-2, axis2=-1)
    traces = np.add.reduceat(diagonal, starts, axis=-1, dtype=np.float64)
    exact: Any = True
    if debiased:
        least = norms * _MIN_SHARE
        products = products - _u_centring_terms(torch.cat(rows, -1).cpu().numpy())
        norms = products.diagonal(axis1=-2, axis2=-1)
        exact = norms > least
    if means is not None:
        largest = np.maximum.reduceat(diagonal, starts, axis=-1).astype(np.float64)
        squares = np.square(means.cpu().numpy(), dtype=np.float64)
        means_squared = np.add.reduceat(squares, starts, axis=-1)[..., 0, :]
        variance = traces / xs[0].shape[-2]
        exact = exact & keeps_digits(norms, largest, _MAX_ENTRY, means_squared, variance)
    if np.all(exact):
        return products, traces
    return compare(xs, debiased, torch.float64) if dtype == torch.float32 else None


def _multiply(
    xs: list[Tensor], widths: list[int], starts: list[int], dtype: torch.dtype, debiased: bool
) -> tuple[panels.Panels, Tensor | None, list[Tensor]]:
    """Multiply all centred features with each other, (…, Σ p_i, Σ p_i).

    Also returns the means (…, 1, Σ p_i) for float32 and, if debiased, the sums of squares of each
    stimulus (…, T, n), which are the diagonals of the Grams, in consecutive parts.
    """
    *lead, n, _ = xs[0].shape
    single = dtype == torch.float32
    if single and n <= panels.SHORT and math.prod(lead) * n * sum(widths) ** 2 <= _SMALL:
        z = torch.cat([x.float() for x in xs], -1)
        mean = z.mean(-2, keepdim=True)
        z.sub_(mean)
        sums = [_sum_rows(z.split_with_sizes(widths, -1))] if debiased else []
        return [(slice(0, sum(widths)), z.mT @ z)], mean, sums
    length = -(-n // -(-n // panels.SHORT)) if single else n  # runs of equal length
    z = memory.empty_buffer(xs[0], *lead, length, sum(widths), dtype=dtype)
    means = [x.mean(-2, keepdim=True, dtype=dtype) for x in xs] if single else []
    packed: panels.Panels = []
    rows = []
    for run in panels.split(n, length):
        block = z[..., : run.stop - run.start, :]
        parts = block.split_with_sizes(widths, -1)
        if single:
            for x, mean, part in zip(xs, means, parts, strict=True):
                torch.sub(x[..., run, :].float(), mean, out=part)
        else:
            gram.centre_into(parts, xs, block, for_products=not debiased)
        product = panels.product(block.mT, starts)
        packed = panels.add(packed, product) if packed else product
        if debiased:
            rows.append(_sum_rows(parts))
    return packed, torch.cat(means, -1) if single else None, rows


def _sum_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return the sums of squares of each stimulus (…, T, n)."""
    return torch.stack([panels.sum_squares(part) for part in parts], -2)


def _sum_squares(packed: panels.Panels, starts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of squares of the blocks that begin at ``starts``, and the diagonal.

    Only the upper triangle of the sums (…, T, T) is computed, unless one panel has all columns.
    """
    if len(packed) == 1:
        product = packed[0][1].cpu().numpy()
        rows = np.add.reduceat(np.square(product, dtype=np.float64), starts, axis=-2)
        return np.add.reduceat(rows, starts, axis=-1), product.diagonal(axis1=-2, axis2=-1)
    first = packed[0][1]
    sums = np.zeros((*first.shape[:-2], len(starts), len(starts)))
    ends = [*starts[1:], first.shape[-2]]
    i = 0
    for columns, panel in packed:
        i += columns.start >= ends[i]
        squares = panels.sum_squares(panel).cpu().numpy()
        squares[..., columns.stop - columns.start : ends[i] - columns.start] *= 2
        blocks = [0, *(start - columns.start for start in starts[i + 1 :])]
        sums[..., i, i:] += np.add.reduceat(squares, blocks, axis=-1)
    return sums, panels.diagonal(packed).cpu().numpy()


def keeps_digits(norms: Any, largest: Any, limit: float, means_squared: Any, variances: Any) -> Any:
    """Return whether float32 products kept enough digits of matrices.

    These have squared norms and largest diagonal entries, which may be at most the limit relative
    to the norm. Also passed are sums over features of the squared means and of the variances.
    """
    in_range = (largest > _MIN_ENTRY) & (largest * largest < limit**2 * norms)
    return in_range & (means_squared <= _MAX_MEAN**2 * variances)


def _u_centring_terms(d: np.ndarray) -> np.ndarray:
    """Return what U-centring subtracts from inner products of Grams (…, T, T) with diagonals d."""
    n, sums = d.shape[-1], d.sum(-1)
    product = sums[..., :, None] * sums[..., None, :]
    return (d @ d.swapaxes(-2, -1)) * n / (n - 2) - product / ((n - 1) * (n - 2))
