"""The columns of cells: which they are, and how they are brought together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory

# Columns of a cell in one product, and of a strip that is copied at once.
_COLUMNS = 512
_STRIP = 4096
# Elements of x up to which the columns of many cells are taken from x itself.
_STRAIGHT = 10 * 2**20


def labelled(cells: np.ndarray, n_cells: int) -> np.ndarray:
    """Labels (p,) with those of no cell, -1, as one more."""
    return cells if cells.min(initial=0) >= 0 else np.where(cells < 0, n_cells, cells)


def sort_by_cell(cells: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The neurons of all cells, one cell after the other, and where each cell starts: (C + 1,)."""
    if cells.ndim == 2:
        return np.nonzero(cells)[1], np.concatenate([[0], np.cumsum(cells.sum(1))])
    # 16 bits are sorted by radix.
    dtype = np.int16 if n_cells < 2**15 else np.int64
    labels, order = torch.from_numpy(labelled(cells, n_cells).astype(dtype)).sort(stable=True)
    offsets = np.searchsorted(labels.numpy(), np.arange(n_cells + 1, dtype=dtype))
    return order.numpy()[: offsets[-1]], offsets


def take(x: Tensor, columns: Tensor) -> Tensor:
    """The named columns of x (n, p), gathered along the memory that is contiguous."""
    if x.stride(0) < x.stride(1):
        return x.mT.index_select(0, columns).mT
    return x.gather(1, columns.expand(len(x), -1))


def iter_cell_blocks(
    x: Tensor, cells: np.ndarray, n_cells: int
) -> Iterator[tuple[slice, tuple[int, int], Tensor]]:
    """Cells in a row, how many of how many columns, and these (n, k) in float64.

    Cells that have fewer columns are filled up with zeros.
    """
    n, p = x.shape
    # Columns are gathered from a copy of many of them that is turned in memory. Of many cells it is
    # large, and takes new pages at each call: then from x, if that is not read too many times.
    few, many = memory.BLOCK // n, n_cells * max(n, _COLUMNS)
    by_rows = x.stride(0) > x.stride(1) and not x.is_cuda
    straight = by_rows and many > few and x.numel() <= _STRAIGHT
    width = p if straight else min(p, max(few, many))
    most = max(1, (memory.BLOCK // 2 if straight else memory.BLOCK) // n)
    raw, centred = (
        memory.empty_buffer(x, n * most),
        memory.empty_buffer(x, n * most, dtype=torch.float64),
    )
    turned = memory.empty_buffer(x, 0 if straight else width + 1, n)
    turned[width:] = 0
    for start in range(0, p, width):
        span = slice(start, min(start + width, p))
        if not straight:
            _copy(turned[: span.stop - start].mT, x[:, span])
        order, offsets = sort_by_cell(cells[..., span], n_cells)
        sizes = np.diff(offsets)
        for run, begin, end in _pack_cells(sizes.tolist(), most):
            present = np.arange(begin, end) < sizes[run, None]
            k, first = present.size, offsets[run.start] + begin
            if present.all():
                columns = order[first : first + k]
            else:
                columns = np.full(k, 0 if straight else width)  # the row of zeros
                columns[present.ravel()] = order[first : offsets[run.stop]]
            index = torch.from_numpy(columns).to(x.device)
            taken, c = raw[: n * k], centred[: n * k]
            if straight:
                torch.gather(x, 1, index.expand(n, k), out=taken.view(n, k))
                c = c.copy_(taken).view(n, k)
                absent = torch.from_numpy(np.flatnonzero(~present))
                c[:, absent] = 0  # a mask would be a pass over c
            else:
                torch.index_select(turned, 0, index, out=taken.view(k, n))
                c = c.copy_(taken).view(k, n).mT
            yield run, present.shape, c


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy (n, p), turned in memory or not, in strips of columns that fit a cache."""
    for a, b in zip(target.split(_STRIP, 1), source.split(_STRIP, 1), strict=True):
        a.copy_(b)


def _pack_cells(sizes: list[int], most: int) -> Iterator[tuple[slice, int, int]]:
    """Runs of cells in a row that are alike, and which of each cell's columns.

    As many columns as `most` in all: a cell that has more comes several times, alone.
    """
    start = 0
    while start < len(sizes):
        stop, largest, total = start + 1, sizes[start], sizes[start]
        for size in sizes[stop:]:
            larger = size if size > largest else largest
            padded = (stop + 1 - start) * larger
            if padded > 1.25 * (total + size) or padded > most:
                break
            stop, largest, total = stop + 1, larger, total + size
        for begin in range(0, largest, most):
            yield slice(start, stop), begin, min(begin + most, largest)
        start = stop
