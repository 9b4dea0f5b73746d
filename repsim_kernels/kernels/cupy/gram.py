"""Gram matrices of cells by the CUDA C++ kernels of cuda/cell_grams.cu.

Predicted for an H200 (not measured): n = 500 stimuli and p = 100,352 neurons in 16 cells take
n (n + 1) p = 25 · 10⁹ operations and 200 MB of float32. With tiles of 64 it is 30 · 10⁹ operations:
0.5 ms at 60 TFLOP/s for float32 without tensor cores, 0.9 ms at 34 TFLOP/s for float64 (its tensor
cores, at 67, are not used). Shared memory is the tighter bound: each thread reads 12 numbers for 32
multiplications, which takes 0.75 ms and 1.3 ms at 128 bytes per clock on each multiprocessor.
Device memory takes 0.05 ms at 4.3 TB/s, provided that the 36 blocks of a chunk find its neurons in
the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, are_partitions
from repsim_kernels.kernels._cuda import find_scale
from repsim_kernels.kernels.cupy import module
from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.columns import sort_by_cell

# As in the CUDA source.
_TILE, _THREADS = 64, 128


@dataclass(frozen=True)
class Launch:
    chunk: int  # neurons per block


def choose(n: int, columns: int) -> Launch:
    """Choose launch settings for n stimuli and a number of columns."""
    # Four blocks for each of 132 multiprocessors. With 8192 neurons, writing the tile is 1 % of a
    # block's traffic.
    chunk = columns * _count_tiles(n) // (4 * 132) // 512 * 512
    return Launch(chunk=min(max(chunk, 512), 8192))


def _count_tiles(n: int) -> int:
    """Count the tiles on and below the diagonal."""
    tiles = -(-n // _TILE)
    return tiles * (tiles + 1) // 2


def unsupported(x: Tensor) -> str | None:
    """Return why the kernels can't take x, or None if they can."""
    if x.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, not {str(x.dtype)[6:]}"
    return module.unsupported(x)


def cell_grams(x: Tensor, *, cells: Cells, n_cells: int, launch: Launch | None = None) -> Tensor:
    """Return the Gram matrix of each cell, (C, n, n) float64.

    ``cells`` are labels (p,), a membership (C, p) or sparse, or partitions (T, p), which give
    (T, C, n, n).
    """
    if are_partitions(cells):
        grams = [cell_grams(x, cells=labels, n_cells=n_cells, launch=launch) for labels in cells]
        return torch.stack(grams)
    n = len(x)
    if x.stride(1) < x.stride(0):
        # A cell's neurons are scattered along a row; neuron-major, each is read as a whole row.
        x = x.mT.contiguous().mT
    order, offsets = sort_by_cell(cells, n_cells)
    chunk = (launch or choose(n, len(order))).chunk
    counts = -(-np.diff(offsets) // chunk)
    slots = np.concatenate([[0], np.cumsum(counts)])
    cell = np.repeat(np.arange(n_cells), counts)
    first = offsets[cell] + (np.arange(len(cell)) - slots[cell]) * chunk
    last = np.minimum(first + chunk, offsets[cell + 1])
    items = np.stack([first, last, np.arange(len(cell))], 1)

    def to_device(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(x.device, dtype)

    tiles = _count_tiles(n)
    # Scaled to about 1, so that float32 products neither overflow nor vanish.
    factor = find_scale(x) if x.dtype == torch.float32 else x.new_ones(())
    partial = torch.empty(len(cell) * tiles * _TILE**2, dtype=torch.float64, device=x.device)
    g = torch.empty(n_cells, n, n, dtype=torch.float64, device=x.device)
    name = "cell_grams_f32" if x.dtype == torch.float32 else "cell_grams_f64"
    tables = (to_device(order, torch.int32), to_device(items, torch.int64))
    sizes = (np.int32(n), *map(np.int64, x.stride()))
    if len(cell):
        grid, block = (len(cell) * tiles,), (_THREADS,)
        module.launch("cell_grams", name, grid, block, x, *tables, factor, partial, *sizes)
    if n_cells:
        unit = factor.to(torch.float64).reciprocal()
        arguments = (partial, to_device(slots, torch.int64), unit, g, np.int32(n))
        module.launch("cell_grams", "cell_grams_sum", (n_cells * tiles,), (_THREADS,), *arguments)
    return gram.centre_gram(g)
