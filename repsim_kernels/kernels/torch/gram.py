"""Centring, Gram matrices, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Elements of a float64 block of neurons: 8 MiB, which stays in a last-level cache.
_BLOCK = 2**20


def centre(x: Tensor) -> Tensor:
    """x (…, n, p) in float64 less its mean over stimuli; constant columns become exactly zero."""
    x = x.to(torch.float64)
    x = x - x[..., :1, :]
    return x.sub_(x.mean(-2, keepdim=True))


def blocks(p: int, rows: int) -> Iterator[slice]:
    """Slices of p neurons that make float64 blocks of `_BLOCK` elements with `rows` rows each."""
    width = max(1, _BLOCK // rows)
    return (slice(start, min(start + width, p)) for start in range(0, p, width))


def linear(x: Tensor) -> Tensor:
    """The Gram matrix of the centred x: (…, n, p) to (…, n, n), float64."""
    n, p = x.shape[-2:]
    g = torch.zeros(*x.shape[:-1], n, dtype=torch.float64, device=x.device)
    for block in blocks(p, math.prod(x.shape[:-1])):
        c = centre(x[..., block])
        g += c @ c.mT
    return g


def squared_distances(g: Tensor) -> Tensor:
    """Squared Euclidean distances between stimuli from a Gram matrix, (…, n, n)."""
    d = g.diagonal(dim1=-2, dim2=-1)
    out = (d[..., :, None] + d[..., None, :] - 2 * g).clamp_(min=0)
    out.diagonal(dim1=-2, dim2=-1).zero_()
    return out


def rbf(x: Tensor, sigma: float) -> Tensor:
    """The RBF kernel of x (…, n, p): (…, n, n).

    The squared bandwidth is sigma² times the median of all n² squared distances, zeros included.
    """
    d = squared_distances(linear(x))
    values = d.flatten(-2)
    middle = values.shape[-1]
    low, high = (values.kthvalue(k, dim=-1).values for k in ((middle + 1) // 2, middle // 2 + 1))
    return torch.exp(-d / ((low + high)[..., None, None] * sigma**2))


def double_centre(k: Tensor) -> Tensor:
    """A kernel matrix (…, n, n) with the means of its rows and columns taken out."""
    k = k - k.mean(-1, keepdim=True)
    return k.sub_(k.mean(-2, keepdim=True))


def u_centre(k: Tensor) -> Tensor:
    """The U-centred kernel matrix: its Frobenius products are n(n - 3) times HSIC₁.

    Source: Székely & Rizzo 2014 for the centring, Song et al. 2012 for HSIC₁.
    """
    n = k.shape[-1]
    k = k.clone()
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    rows = k.sum(-1, keepdim=True) / (n - 2)
    total = rows.sum(-2, keepdim=True) / (n - 1)
    k.sub_(rows).sub_(rows.mT).add_(total)
    diagonal.zero_()
    return k


def centered_gram(x: Tensor, *, kernel: str, sigma: float | None) -> Tensor:
    if kernel == "linear":
        return linear(x)
    assert sigma is not None
    return double_centre(rbf(x, sigma))


def members(cells: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The neurons of all cells, one cell after the other, and where each cell starts: (C + 1,).

    Neurons in no cell come last.
    """
    if cells.ndim == 2:
        order, sizes = np.nonzero(cells)[1], cells.sum(1)
    else:
        labels = np.where(cells < 0, n_cells, cells)
        # NumPy sorts 16 bits by radix, 64 by comparison.
        order = np.argsort(labels.astype(np.uint16 if n_cells < 2**16 else np.int64), kind="stable")
        sizes = np.bincount(labels, minlength=n_cells + 1)[:n_cells]
    return order, np.concatenate([[0], np.cumsum(sizes)])


def take(x: Tensor, columns: Tensor) -> Tensor:
    """The named columns of x (n, p), gathered along the memory that is contiguous."""
    if x.stride(0) < x.stride(1):
        return x.mT.index_select(0, columns).mT
    return x.gather(1, columns.expand(len(x), -1))


def cell_grams(x: Tensor, *, cells: np.ndarray, n_cells: int) -> Tensor:
    order, offsets = members(cells, n_cells)
    return cell_sums(x, order[: offsets[-1]], offsets)[0]


def cell_sums(
    x: Tensor, order: np.ndarray, offsets: np.ndarray, shifts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the cells' neurons: their Grams, live neurons and, if asked for, shifts.

    Returns ``g`` (C, n, n); ``live`` (C,), how many columns of a cell are not constant; ``shift``
    (C, n), B_c μ_c with B_c the centred columns of a cell and μ_c their means, or zeros.
    """
    n, n_cells = x.shape[0], len(offsets) - 1
    g = torch.zeros(n_cells, n, n, dtype=torch.float64, device=x.device)
    shift = torch.zeros(n_cells, n, dtype=torch.float64, device=x.device)
    columns = torch.from_numpy(order).to(x.device)
    alive = torch.empty(len(order), dtype=torch.bool, device=x.device)
    cell = 0
    for block in blocks(len(order), n):
        raw = take(x, columns[block])
        c = centre(raw)
        alive[block] = _live(c)
        start = block.start
        while start < block.stop:
            while offsets[cell + 1] <= start:
                cell += 1
            stop = min(int(offsets[cell + 1]), block.stop)
            part = c[:, start - block.start : stop - block.start]
            g[cell].addmm_(part, part.mT)
            if shifts:
                means = raw[0, start - block.start : stop - block.start].to(torch.float64) - part[0]
                shift[cell].addmv_(part, means)
            start = stop
    count = torch.cat([alive.new_zeros(1, dtype=torch.int64), alive.cumsum(0)])
    ends = torch.from_numpy(offsets).to(x.device)
    return g, count[ends[1:]] - count[ends[:-1]], shift


def _live(c: Tensor) -> Tensor:
    """Which centred columns are not all zero; one value shows it for nearly every one."""
    alive = c[0] != 0
    rest = torch.nonzero(~alive).flatten()
    alive[rest] = (c[:, rest] != 0).any(0)
    return alive
