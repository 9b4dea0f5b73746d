"""Class means, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import panels


def class_sums(x: Tensor, labels: np.ndarray, n_classes: int) -> Tensor:
    """Sum x (n, p) over the stimuli of each class: (n_classes, p), float64."""
    n, p = x.shape
    member = torch.zeros(n_classes, n, dtype=torch.float64, device=x.device)
    member[torch.from_numpy(labels).to(x.device), torch.arange(n, device=x.device)] = 1
    out = torch.empty(n_classes, p, dtype=torch.float64, device=x.device)
    for block in panels.split_neurons(p, n):
        out[:, block] = member @ x[:, block].to(torch.float64)
    return out


def class_means(x: Tensor, *, labels: np.ndarray, n_classes: int) -> Tensor:
    counts = torch.from_numpy(np.bincount(labels, minlength=n_classes)).to(x.device)
    return class_sums(x, labels, n_classes) / counts[:, None]


def selectivity_grid(
    x: Tensor, *, labels: np.ndarray, target: int, grid: tuple[int, int], edges: str
) -> Tensor:
    is_target = labels == target
    sums = class_sums(x, is_target.astype(np.int64), 2)
    return grid_from_sums(*sums, n_target=int(is_target.sum()), n=len(x), grid=grid, edges=edges)


def grid_from_sums(
    others_sum: Tensor,
    target_sum: Tensor,
    *,
    n_target: int,
    n: int,
    grid: tuple[int, int],
    edges: str,
) -> Tensor:
    """Return the cell of each neuron (p,) from its sums over other classes and over the target.

    ``n_target`` is the number of target stimuli. With edges="inclusive", returns the membership
    (C, p) of cells that share their edges. Compares the means multiplied by both counts, which is
    exact where the sums are, so that equal neurons tie.
    """
    others_sum, target_sum = others_sum * n_target, target_sum * (n - n_target)
    selectivity, magnitude = target_sum - others_sum, target_sum + others_sum
    if edges == "inclusive":
        return _find_inclusive_cells(selectivity, magnitude, grid)
    one_group = torch.zeros(len(target_sum), dtype=torch.int64, device=target_sum.device)
    strip = _split_by_value(selectivity, one_group, 1, grid[0])
    return strip * grid[1] + _split_by_value(magnitude, strip, *grid)


def _split_by_value(value: Tensor, group: Tensor, n_groups: int, parts: int) -> Tensor:
    """Split each group by value into parts of equal count, and return each neuron's part (p,).

    Ties are ordered by index.
    """
    by_value = torch.sort(value, stable=True).indices
    order = by_value[torch.sort(group[by_value], stable=True).indices]
    sizes = torch.bincount(group, minlength=n_groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=value.device) - starts[group[order]]
    return rank * parts // sizes[group]


def _find_inclusive_cells(selectivity: Tensor, magnitude: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the neurons between and on the edges of each cell, (C, p)."""
    rows, columns = grid
    cells = selectivity.new_zeros(rows * columns, len(selectivity), dtype=torch.bool)
    for strip, (low, high) in enumerate(pairwise(_find_edges(selectivity, rows))):
        inner = magnitude[(low < selectivity) & (selectivity < high)]
        if not len(inner):
            continue
        inside = (low <= selectivity) & (selectivity <= high)
        # Cell by cell, so that the comparisons need no temporary of (C, p).
        for part, (lower, upper) in enumerate(pairwise(_find_edges(inner, columns))):
            cells[strip * columns + part] = inside & (lower <= magnitude) & (magnitude <= upper)
    return cells


def _find_edges(values: Tensor, parts: int) -> Tensor:
    """Return the edges (parts + 1,) of parts of equal count, up to ties."""
    first = [part * len(values) // parts for part in range(parts)]
    return values.sort().values[[*first, -1]]
