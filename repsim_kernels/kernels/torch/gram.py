"""Centring, Gram matrices, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Elements of a float64 block of neurons: 4 MiB, which stays in a last-level cache.
_BLOCK = 2**19
# Elements of a batch of Grams that passes through the cache together, and of one on a GPU.
_BATCH, _LARGE_BATCH = 2**17, 2**24
# Rows of a panel of a symmetric matrix, at least, and how many panels there are at most: more would
# save little beyond nearly half of a product, and fewer rows multiply more slowly.
_PANEL, _PANELS = 96, 8
# Columns of a cell in one product, and of a strip that is copied at once.
_COLUMNS = 512
_STRIP = 4096


def centre(x: Tensor) -> Tensor:
    """x (…, n, p) in float64 less its mean over stimuli; constant columns become exactly zero."""
    c = x.to(torch.float64, copy=True)
    _centre_(c)
    return c


def _centre_(c: Tensor) -> Tensor:
    """Centre c (…, n, p) in place; returns the means (…, 1, p)."""
    first = c[..., :1, :].clone()
    rest = c.sub_(first).mean(-2, keepdim=True)
    c.sub_(rest)
    return first + rest


def blocks(p: int, rows: int) -> Iterator[slice]:
    """Slices of p neurons that make float64 blocks of `_BLOCK` elements with `rows` rows each."""
    width = max(1, _BLOCK // rows)
    return (slice(start, min(start + width, p)) for start in range(0, p, width))


def batches(items: list[int], gram: Tensor) -> Iterator[list[int]]:
    """As many items at a time, each of a Gram's size, as a cache holds or a GPU is busy with."""
    size = max(1, (_BATCH if gram.device.type == "cpu" else _LARGE_BATCH) // gram.numel())
    for start in range(0, len(items), size):
        yield items[start : start + size]


def linear(x: Tensor) -> Tensor:
    """The Gram matrix of the centred x: (…, n, p) to (…, n, n), float64."""
    g = lower(x)
    for own in panels(g.shape[-1]):
        g[..., : own.start, own] = g[..., own, : own.start].mT
        block = g[..., own, own]
        block.copy_(block.tril() + block.tril(-1).mT)
    return g


def lower(x: Tensor) -> Tensor:
    """The panels of `linear`; what is right of them is zero."""
    n, p = x.shape[-2:]
    g = torch.zeros(*x.shape[:-1], n, dtype=torch.float64, device=x.device)
    for block in blocks(p, math.prod(x.shape[:-1])):
        add_product(g, centre(x[..., block]))
    return g


def panels(n: int) -> Iterator[slice]:
    """Runs of the rows of a symmetric matrix (n, n), which hold it up to their last column."""
    height = max(_PANEL, -(-n // _PANELS))
    return (slice(start, min(start + height, n)) for start in range(0, n, height))


def add_product(g: Tensor, c: Tensor) -> None:
    """Add c cᵀ of c (…, n, k) to the panels of g (…, n, n)."""
    n, k = c.shape[-2:]
    g, c = g.view(-1, n, n), c.reshape(-1, n, k)
    for own in panels(n):
        rows, before = c[:, own], c[:, : own.stop].mT
        if len(g) == 1:
            g[0, own, : own.stop].addmm_(rows[0], before[0])
        else:
            g[:, own, : own.stop].baddbmm_(rows, before)


def square_sum(g: Tensor) -> Tensor:
    """The squared Frobenius norm (…) of symmetric matrices (…, n, n), from their panels."""
    total = torch.zeros(g.shape[:-2], dtype=g.dtype, device=g.device)
    for own in panels(g.shape[-1]):
        for part, times in ((g[..., own, : own.start], 2), (g[..., own, own], 1)):
            total += times * torch.linalg.vector_norm(part, dim=(-2, -1)).square()
    return total


def packed(g: Tensor) -> Tensor:
    """The panels of symmetric matrices (…, n, n) as vectors (…, m) of the same inner products."""
    parts = []
    for own in panels(g.shape[-1]):
        before = g[..., own, : own.start] * math.sqrt(2)
        parts += [before.flatten(-2), g[..., own, own].flatten(-2)]
    return torch.cat(parts, -1)


def squared_distances(g: Tensor) -> Tensor:
    """Squared Euclidean distances between stimuli from a Gram matrix, (…, n, n)."""
    d = g.diagonal(dim1=-2, dim2=-1)
    out = (d[..., :, None] + d[..., None, :] - 2 * g).clamp_(min=0)
    out.diagonal(dim1=-2, dim2=-1).zero_()
    return out


def rbf(x: Tensor, sigma: float) -> Tensor:
    """The RBF kernel of x (…, n, p): (…, n, n)."""
    return rbf_kernel(linear(x), sigma)


def rbf_kernel(g: Tensor, sigma: float) -> Tensor:
    """The RBF kernel from a Gram matrix, centred or not: (…, n, n).

    The squared bandwidth is sigma² times the median of all n² squared distances, zeros included.
    """
    d = squared_distances(g)
    values = d.flatten(-2)
    middle = values.shape[-1]
    low, high = (values.kthvalue(k, dim=-1).values for k in ((middle + 1) // 2, middle // 2 + 1))
    return torch.exp(-d / ((low + high)[..., None, None] * sigma**2))


def double_centre(k: Tensor) -> Tensor:
    """A kernel matrix (…, n, n) with the means of its rows and columns taken out."""
    k = k - k.mean(-1, keepdim=True)
    return k.sub_(k.mean(-2, keepdim=True))


def centre_relative(g: Tensor) -> Tensor:
    """The Gram of centred stimuli from that of stimuli relative to any one; as symmetric as g."""
    mean = g.mean(-1)
    return g - (mean[..., :, None] + mean[..., None, :] - mean.mean(-1)[..., None, None])


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


def u_centre_panels(g: Tensor) -> None:
    """U-centre, in place, the panels of Grams of centred stimuli, whose rows sum to zero."""
    n = g.shape[-1]
    diagonal = g.diagonal(dim1=-2, dim2=-1)
    rows = diagonal / (n - 2)
    others = rows - rows.sum(-1, keepdim=True) / (n - 1)
    for own in panels(n):
        g[..., own, : own.stop] += rows[..., own, None] + others[..., None, : own.stop]
    diagonal.zero_()


def centered_gram(x: Tensor, *, kernel: str, sigma: float | None) -> Tensor:
    if kernel == "linear":
        return linear(x)
    assert sigma is not None
    return double_centre(rbf(x, sigma))


def members(cells: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The neurons of all cells, one cell after the other, and where each cell starts: (C + 1,)."""
    if cells.ndim == 2:
        order, sizes = np.nonzero(cells)[1], cells.sum(1)
    else:
        labels = np.where(cells < 0, n_cells, cells)
        # NumPy sorts 16 bits by radix, 64 by comparison.
        order = np.argsort(labels.astype(np.uint16 if n_cells < 2**16 else np.int64), kind="stable")
        sizes = np.bincount(labels, minlength=n_cells + 1)[:n_cells]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return order[: offsets[-1]], offsets


def take(x: Tensor, columns: Tensor) -> Tensor:
    """The named columns of x (n, p), gathered along the memory that is contiguous."""
    if x.stride(0) < x.stride(1):
        return x.mT.index_select(0, columns).mT
    return x.gather(1, columns.expand(len(x), -1))


def cell_grams(x: Tensor, *, cells: np.ndarray, n_cells: int) -> Tensor:
    if cells.ndim == 2 and cells.dtype != np.bool_:
        return torch.stack([cell_sums(x, labels, n_cells)[0] for labels in cells])
    return cell_sums(x, cells, n_cells)[0]


def cell_sums(
    x: Tensor, cells: np.ndarray, n_cells: int, shifts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over x (n, p): the cells' Grams, live neurons and, if asked for, shifts.

    Returns ``g`` (C, n, n); ``live`` (C,), how many columns of a cell are not constant; ``shift``
    (C, n), B_c μ_c with B_c the centred columns of a cell and μ_c their means, or zeros.
    """
    n, p = x.shape
    g = torch.zeros(n_cells, n, n, dtype=torch.float64, device=x.device)
    live = torch.zeros(n_cells, dtype=torch.int64, device=x.device)
    shift = torch.zeros(n_cells, n, 1, dtype=torch.float64, device=x.device)
    # Many columns of each cell at once, in buffers that do not grow with p.
    room = max(_BLOCK // n, n_cells * max(n, _COLUMNS))
    width = min(p, room)
    rows, raw = x.new_zeros(width + 1, n), x.new_empty(room, n)
    centred = torch.empty(n * room, dtype=torch.float64, device=x.device)
    for start in range(0, p, width):
        span = slice(start, min(start + width, p))
        _copy(rows[: span.stop - start].mT, x[:, span])
        order, offsets = members(cells[..., span], n_cells)
        order = np.append(order, width)  # the row of zeros
        for run, size in _runs(np.diff(offsets).tolist(), n):
            places = offsets[run, None] + np.arange(size)
            places[places >= offsets[1:][run, None]] = len(order) - 1
            columns = torch.from_numpy(order[places.ravel()]).to(x.device)
            torch.index_select(rows, 0, columns, out=raw[: places.size])
            c = centred[: n * places.size].view(places.size, n).copy_(raw[: places.size]).mT
            means = _centre_(c).view(*places.shape, 1)
            live[run] += (c.amax(0) > 0).view(places.shape).sum(1)
            parts = c.unflatten(1, places.shape).transpose(0, 1)
            g[run].baddbmm_(parts, parts.mT)
            if shifts:
                shift[run].baddbmm_(parts, means)
    return g, live, shift[..., 0]


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy (n, p), turned in memory or not, in strips of columns that fit a cache."""
    for a, b in zip(target.split(_STRIP, 1), source.split(_STRIP, 1), strict=True):
        a.copy_(b)


def _runs(sizes: list[int], n: int) -> Iterator[tuple[slice, int]]:
    """Runs of cells in a row, with their largest size: alike, and a block's worth at most."""
    start = 0
    while start < len(sizes):
        stop, largest, total = start + 1, sizes[start], sizes[start]
        for size in sizes[stop:]:
            padded = (stop + 1 - start) * max(largest, size)
            if padded > 1.25 * (total + size) or padded * n > _BLOCK:
                break
            stop, largest, total = stop + 1, max(largest, size), total + size
        if largest:
            yield slice(start, stop), largest
        start = stop
