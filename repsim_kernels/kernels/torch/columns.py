"""Gathering the columns of x that belong to each cell."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, SparseCells
from repsim_kernels.kernels.torch import memory, panels

# Columns of a cell in one product, elements of x that are sorted by cell together (64 MiB of
# float32), most columns of a block, and columns of a strip that is copied at once.
_COLUMNS = 512
_SPAN = 2**24
_BLOCK_COLUMNS = 20_480
_STRIP = 4096
# Most elements that are gathered without further threads, and that PyTorch copies on one core.
_SMALL = 2**17
_GRAIN = 2**15


def label_unassigned(cells: np.ndarray, n_cells: int) -> np.ndarray:
    """Relabel neurons in no cell from -1 to n_cells in labels (p,)."""
    return cells if cells.min(initial=0) >= 0 else np.where(cells < 0, n_cells, cells)


def sort_by_cell(cells: Cells, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the neurons ordered by cell, and the offset of each cell in them, (C + 1,).

    ``cells`` are labels (p,), a membership (C, p) or sparse.
    """
    if isinstance(cells, SparseCells):
        return cells.indices, cells.indptr
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
    x: Tensor, cells: Cells, n_cells: int
) -> Iterator[tuple[slice, tuple[int, int], Tensor]]:
    """Yield blocks of columns of x (n, p) for runs of consecutive cells.

    Each block is a slice of cells, (number of cells, columns per cell), and those columns in
    float64, (n, cells x columns). Cells with fewer columns are padded with zeros. A cell may span
    several blocks, and each block reuses the memory of the previous one.
    """
    n, p = x.shape
    by_rows = x.stride(0) > x.stride(1) and not x.is_cuda
    max_columns = max(1, min(memory.BLOCK // n, _BLOCK_COLUMNS))
    width = min(p, max(max_columns, n_cells * max(n, _COLUMNS), _SPAN // n))
    # Padding adds at most a quarter, so that a span whose cells do not overlap is one batch.
    capacity = max(max_columns, width + width // 4) if by_rows else max_columns
    raw = memory.empty_buffer(x, n * capacity)
    block = memory.empty_buffer(x, n * max_columns, dtype=torch.float64)
    transposed = memory.empty_buffer(x, 0 if by_rows else width, n)
    for start in range(0, p, width):
        span = x[:, start : start + width]
        if not by_rows:
            _copy_in_strips(transposed[: span.shape[1]].mT, span)
        stop = start + width
        if isinstance(cells, SparseCells):
            span_cells: Cells = cells.among(start, stop)
        else:
            span_cells = cells[..., start:stop]
        for batch in _plan_batches(span_cells, n_cells, max_columns, capacity):
            index = torch.from_numpy(np.concatenate([run.columns for run in batch])).to(x.device)
            k = len(index)
            if by_rows:
                gathered = raw[: n * k].view(n, k)
                _gather_rows(span, index, gathered)
            else:
                gathered = raw[: n * k].view(k, n).mT
                torch.index_select(transposed, 0, index, out=gathered.mT)
            ends = np.cumsum([len(run.columns) for run in batch])
            for run, end in zip(batch, ends, strict=True):
                k = len(run.columns)
                c = block[: n * k].view(n, k) if by_rows else block[: n * k].view(k, n).mT
                c.copy_(gathered[:, end - k : end])
                if len(run.absent):
                    c[:, torch.from_numpy(run.absent).to(x.device)] = 0
                yield run.cells, run.shape, c


def _gather_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """Write columns of x (n, p) to out (n, k), one row after the other.

    Picking entries from a copy of the row, which is in cache, is faster than from x. PyTorch does
    it on one core, so each core takes its share of the rows.
    """

    def gather(rows: range) -> None:
        row = memory.empty_buffer(x, x.shape[1])
        for i in rows:
            for target, source in zip(row.split(_GRAIN), x[i].split(_GRAIN), strict=True):
                target.copy_(source)
            torch.index_select(row, 0, index, out=out[i])

    threads = panels.count_cores(x) if out.numel() > _SMALL else 1
    shares = [range(i, len(x), threads) for i in range(threads)]
    if threads == 1:
        gather(shares[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(gather, shares))


@dataclass(frozen=True)
class _Run:
    """Columns of consecutive cells, of equal count after padding."""

    cells: slice
    shape: tuple[int, int]  # cells, columns per cell
    columns: np.ndarray  # (cells x columns,)
    absent: np.ndarray  # positions in `columns` of padding


def _plan_batches(
    cells: Cells, n_cells: int, max_columns: int, capacity: int
) -> Iterator[list[_Run]]:
    """Group the runs of all cells in batches of at most ``capacity`` columns."""
    order, offsets = sort_by_cell(cells, n_cells)
    sizes = np.diff(offsets)
    batch: list[_Run] = []
    free = capacity
    for run, begin, end in _pack_cells(sizes.tolist(), max_columns):
        present = np.arange(begin, end) < sizes[run, None]
        first = offsets[run.start] + begin
        if present.all():
            columns = order[first : first + present.size]
        else:
            columns = np.zeros(present.size, dtype=order.dtype)
            columns[present.ravel()] = order[first : offsets[run.stop]]
        if len(columns) > free:
            yield batch
            batch, free = [], capacity
        batch.append(_Run(run, present.shape, columns, np.flatnonzero(~present)))
        free -= len(columns)
    if batch:
        yield batch


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
        while stop < len(sizes):
            size = sizes[stop]
            larger = size if size > largest else largest
            padded = (stop + 1 - start) * larger
            if padded > 1.25 * (total + size) or padded > max_columns:
                break
            stop, largest, total = stop + 1, larger, total + size
        for begin in range(0, largest, max_columns):
            yield slice(start, stop), begin, min(begin + max_columns, largest)
        start = stop
