"""Gram matrices of cells by the CUDA C++ kernels of cuda/cell_grams.cu.

On an H100, n = 500 stimuli and p = 100,352 neurons in 16 cells are n (n + 1) p = 25 · 10⁹
operations and 200 MB of float32. Tiles of 64 make it 30 · 10⁹: 0.5 ms at the 60 TFLOP/s of float32
without tensor cores, 0.9 ms at 34 TFLOP/s of float64 (67 on tensor cores, which it leaves alone).
Shared memory is the tighter bound: 12 numbers a thread for 32 multiplications, at 128 bytes a clock
on each multiprocessor, are 0.75 ms and 1.3 ms. Device memory takes 0.07 ms at 3.0 TB/s, as long as
the 36 blocks of a piece find its neurons in the L2 cache. These are predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels._cuda import scale
from repsim_kernels.kernels.cupy import module
from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.columns import sort_by_cell

# What the source has, too.
_TILE, _THREADS = 64, 128


@dataclass(frozen=True)
class Launch:
    chunk: int  # neurons of a block


def choose(n: int, columns: int) -> Launch:
    # Four blocks for each of 132 multiprocessors; of 8192 neurons writing the tile is 1 %.
    chunk = columns * _pairs(n) // (4 * 132) // 512 * 512
    return Launch(chunk=min(max(chunk, 512), 8192))


def _pairs(n: int) -> int:
    """Tiles on and under the diagonal."""
    tiles = -(-n // _TILE)
    return tiles * (tiles + 1) // 2


def unsupported(x: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, not {str(x.dtype)[6:]}"
    return module.unsupported(x)


def cell_grams(
    x: Tensor, *, cells: np.ndarray, n_cells: int, launch: Launch | None = None
) -> Tensor:
    if cells.ndim == 2 and cells.dtype != np.bool_:
        parts = [cell_grams(x, cells=one, n_cells=n_cells, launch=launch) for one in cells]
        return torch.stack(parts)
    n = len(x)
    if x.stride(1) < x.stride(0):
        # Neurons of a cell are scattered: rows of them, which are then read whole.
        x = x.mT.contiguous().mT
    order, offsets = sort_by_cell(cells, n_cells)
    chunk = (launch or choose(n, len(order))).chunk
    counts = -(-np.diff(offsets) // chunk)
    slots = np.concatenate([[0], np.cumsum(counts)])
    cell = np.repeat(np.arange(n_cells), counts)
    first = offsets[cell] + (np.arange(len(cell)) - slots[cell]) * chunk
    last = np.minimum(first + chunk, offsets[cell + 1])
    items = np.stack([first, last, np.arange(len(cell))], 1)

    def sent(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(x.device, dtype)

    pairs = _pairs(n)
    # float32 products are of numbers around 1, so that they neither overflow nor vanish.
    factor = scale(x) if x.dtype == torch.float32 else x.new_ones(())
    partial = torch.empty(len(cell) * pairs * _TILE**2, dtype=torch.float64, device=x.device)
    g = torch.empty(n_cells, n, n, dtype=torch.float64, device=x.device)
    name = "cell_grams_f32" if x.dtype == torch.float32 else "cell_grams_f64"
    tables = (sent(order, torch.int32), sent(items, torch.int64))
    sizes = (np.int32(n), *map(np.int64, x.stride()))
    if len(cell):
        grid, block = (len(cell) * pairs,), (_THREADS,)
        module.launch("cell_grams", name, grid, block, x, *tables, factor, partial, *sizes)
    if n_cells:
        unit = factor.to(torch.float64).reciprocal()
        summed = (partial, sent(slots, torch.int64), unit, g, np.int32(n))
        module.launch("cell_grams", "cell_grams_sum", (n_cells * pairs,), (_THREADS,), *summed)
    return gram.centre_gram(g)
