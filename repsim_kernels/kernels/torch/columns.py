"""Gathering the columns of x that belong to each cell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory

# Columns of a cell in one product, and columns of a strip that is copied at once.
_COLUMNS = 512
_STRIP = 4096
# Most elements of x for which the columns of many cells are gathered from x itself.
_MAX_DIRECT = 10 * 2**20


def label_unassigned(cells: np.ndarray, n_cells: int) -> np.ndarray:
    """Relabel neurons in no cell from -1 to n_cells in labels (p,)."""
    return cells if cells.min(initial=0) >= 0 else np.where(cells < 0, n_cells, cells)


def sort_by_cell(cells: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the neurons ordered by cell, and the offset of each cell in them, (C + 1,).

    ``cells`` are labels (p,) or a membership (C, p).
    """
    if cells.ndim == 2:
        return np.nonzero(cells)[1], np.concatenate([[0], np.cumsum(cells.sum(1))])
    # 16-bit integers are sorted by radix.
    dtype = np.int16 if n_cells < 2**15 else np.int64
    unsorted = torch.from_numpy(label_unassigned(cells, n_cells).astype(dtype))
    labels, order = unsorted.sort(stable=True)
    offsets = np.searchsorted(labels.numpy(), np.arange(n_cells + 1, dtype=dtype))
    return order.numpy()[: offsets[-1]], offsets


def take(x: Tensor, columns: Tensor) -> Tensor:
    """Gather columns of x (n, p) along its contiguous dimension."""
    if x.stride(0) < x.stride(1):
        return x.mT.index_select(0, columns).mT
    return x.gather(1, columns.expand(len(x), -1))


def iter_cell_blocks(
    x: Tensor, cells: np.ndarray, n_cells: int
) -> Iterator[tuple[slice, tuple[int, int], Tensor]]:
    """Yield blocks of columns of x (n, p) for runs of consecutive cells.

    Each block is a slice of cells, (number of cells, columns per cell), and those columns in
    float64, (n, cells x columns). Cells with fewer columns are padded with zeros. A cell may span
    several blocks, and each block reuses the memory of the previous one.
    """
    n, p = x.shape
    # Columns are gathered from a transposed copy of a span of them. With many cells that copy is
    # large, and each call would fault in its pages again. Columns then come directly from x, if x
    # is small enough to be read that often.
    block_columns, span_columns = memory.BLOCK // n, n_cells * max(n, _COLUMNS)
    row_major = x.stride(0) > x.stride(1) and not x.is_cuda
    direct = row_major and span_columns > block_columns and x.numel() <= _MAX_DIRECT
    width = p if direct else min(p, max(block_columns, span_columns))
    max_columns = max(1, (memory.BLOCK // 2 if direct else memory.BLOCK) // n)
    raw = memory.empty_buffer(x, n * max_columns)
    block = memory.empty_buffer(x, n * max_columns, dtype=torch.float64)
    transposed = memory.empty_buffer(x, 0 if direct else width + 1, n)
    transposed[width:] = 0
    for start in range(0, p, width):
        span = slice(start, min(start + width, p))
        if not direct:
            _copy_in_strips(transposed[: span.stop - start].mT, x[:, span])
        order, offsets = sort_by_cell(cells[..., span], n_cells)
        sizes = np.diff(offsets)
        for run, begin, end in _pack_cells(sizes.tolist(), max_columns):
            present = np.arange(begin, end) < sizes[run, None]
            k, first = present.size, offsets[run.start] + begin
            if present.all():
                columns = order[first : first + k]
            else:
                columns = np.full(k, 0 if direct else width)  # row `width` holds zeros
                columns[present.ravel()] = order[first : offsets[run.stop]]
            index = torch.from_numpy(columns).to(x.device)
            gathered, c = raw[: n * k], block[: n * k]
            if direct:
                torch.gather(x, 1, index.expand(n, k), out=gathered.view(n, k))
                c = c.copy_(gathered).view(n, k)
                absent = torch.from_numpy(np.flatnonzero(~present))
                c[:, absent] = 0  # multiplying by a mask would be a pass over c
            else:
                torch.index_select(transposed, 0, index, out=gathered.view(k, n))
                c = c.copy_(gathered).view(k, n).mT
            yield run, present.shape, c


def _copy_in_strips(target: Tensor, source: Tensor) -> None:
    """Copy (n, p) between memory layouts, in strips of columns that fit a cache."""
    for a, b in zip(target.split(_STRIP, 1), source.split(_STRIP, 1), strict=True):
        a.copy_(b)


def _pack_cells(sizes: list[int], max_columns: int) -> Iterator[tuple[slice, int, int]]:
    """Group consecutive cells of similar size, and yield each run with a range of its columns.

    A run has at most ``max_columns`` columns after padding. A larger cell makes a run of its own,
    which is yielded once for each range.
    """
    start = 0
    while start < len(sizes):
        stop, largest, total = start + 1, sizes[start], sizes[start]
        for size in sizes[stop:]:
            larger = size if size > largest else largest
            padded = (stop + 1 - start) * larger
            if padded > 1.25 * (total + size) or padded > max_columns:
                break
            stop, largest, total = stop + 1, larger, total + size
        for begin in range(0, largest, max_columns):
            yield slice(start, stop), begin, min(begin + max_columns, largest)
        start = stop
