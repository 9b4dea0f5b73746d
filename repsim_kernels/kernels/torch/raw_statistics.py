"""What the raw activations of cells have in addition to their centred Gram matrices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells
from repsim_kernels.kernels.torch import columns


class RawStatistics(NamedTuple):
    """Statistics of the columns X_c (n, k) of each cell, which have means μ_c (k,).

    B_c = X_c - μ_c are the centred columns. The raw Gram matrix X_c X_cᵀ has the entries
    (B_c B_cᵀ)ᵢⱼ + shiftᵢ + shiftⱼ + squared_means.
    """

    shift: Tensor  # (C, n), B_c μ_c
    squared_means: Tensor  # (C,), ‖μ_c‖²
    row_sums: Tensor  # (C, n), X_c 1
    n_nonzero: Tensor  # (C,) int64, the number of neurons that are not 0 for all stimuli

    def select(self, cells: list[int]) -> RawStatistics:
        """Return the statistics of some cells."""
        return RawStatistics(*(values[cells] for values in self))

    def subtract(self, other: RawStatistics) -> RawStatistics:
        """Return the statistics of the remaining neurons, given those of the ones removed."""
        return RawStatistics(*(a - b for a, b in zip(self, other, strict=True)))


def raw_statistics(x: Tensor, cells: Cells, n_cells: int) -> RawStatistics:
    """Measure the cells of x (n, p) in one pass; not those of several partitions."""
    n = len(x)
    shift, row_sums = x.new_zeros(2, n_cells, n, dtype=torch.float64)
    squared_means = x.new_zeros(n_cells, dtype=torch.float64)
    n_nonzero = x.new_zeros(n_cells, dtype=torch.int64)
    for run, shape, c in columns.iter_cell_blocks(x, cells, n_cells):
        by_cell = c.unflatten(1, shape)
        row_sums[run] += by_cell.sum(2).mT
        n_nonzero[run] += (c != 0).any(0).view(shape).sum(1)
        mean = c.mean(0)
        squared_means[run] += mean.square().view(shape).sum(1)
        c.sub_(mean).mul_(mean)
        shift[run] += by_cell.sum(2).mT
    return RawStatistics(shift, squared_means, row_sums, n_nonzero)


def raw_statistics_of_all(x: Tensor) -> RawStatistics:
    """Measure all neurons of x (n, p) as one cell."""
    return raw_statistics(x, np.zeros(x.shape[1], dtype=np.int64), 1)
