"""Class means, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import panels


def class_sums(x: Tensor, labels: np.ndarray, n_classes: int) -> Tensor:
    """Sums of x (n, p) over the stimuli of each class: (n_classes, p), float64."""
    n, p = x.shape
    member = torch.zeros(n_classes, n, dtype=torch.float64, device=x.device)
    member[torch.from_numpy(labels).to(x.device), torch.arange(n, device=x.device)] = 1
    out = torch.empty(n_classes, p, dtype=torch.float64, device=x.device)
    for block in panels.blocks(p, n):
        out[:, block] = member @ x[:, block].to(torch.float64)
    return out


def class_means(x: Tensor, *, labels: np.ndarray, n_classes: int) -> Tensor:
    counts = torch.from_numpy(np.bincount(labels, minlength=n_classes)).to(x.device)
    return class_sums(x, labels, n_classes) / counts[:, None]


def selectivity_grid(
    x: Tensor, *, labels: np.ndarray, target: int, grid: tuple[int, int], edges: str
) -> Tensor:
    own = labels == target
    sums = class_sums(x, own.astype(np.int64), 2)
    return grid_from_sums(*sums, own=int(own.sum()), n=len(x), grid=grid, edges=edges)


def grid_from_sums(
    others_sum: Tensor, own_sum: Tensor, *, own: int, n: int, grid: tuple[int, int], edges: str
) -> Tensor:
    """The cell of each neuron (p,) from its sums over the other and over the target's stimuli.

    With edges="inclusive" the membership (C, p) of cells that share their edges. Compares the means
    times both counts: exact where the sums are, so that equal neurons tie.
    """
    others_sum, own_sum = others_sum * own, own_sum * (n - own)
    selectivity, magnitude = own_sum - others_sum, own_sum + others_sum
    if edges == "inclusive":
        return _inclusive(selectivity, magnitude, grid)
    none = torch.zeros(len(own_sum), dtype=torch.int64, device=own_sum.device)
    strip = _equal_count(selectivity, none, 1, grid[0])
    return strip * grid[1] + _equal_count(magnitude, strip, *grid)


def _equal_count(value: Tensor, group: Tensor, n_groups: int, parts: int) -> Tensor:
    """The part, by rank of `value` within its group, of each neuron (p,); ties by index."""
    by_value = torch.sort(value, stable=True).indices
    order = by_value[torch.sort(group[by_value], stable=True).indices]
    sizes = torch.bincount(group, minlength=n_groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=value.device) - starts[group[order]]
    return rank * parts // sizes[group]


def _inclusive(selectivity: Tensor, magnitude: Tensor, grid: tuple[int, int]) -> Tensor:
    """The neurons of each cell, (C, p): those between its edges and on them."""
    rows, columns = grid
    cells = selectivity.new_zeros(rows * columns, len(selectivity), dtype=torch.bool)
    for strip, (low, high) in enumerate(pairwise(_edges(selectivity, rows))):
        inner = magnitude[(low < selectivity) & (selectivity < high)]
        if not len(inner):
            continue
        inside = (low <= selectivity) & (selectivity <= high)
        # One cell at a time: what is compared is never (C, p).
        for part, (least, most) in enumerate(pairwise(_edges(inner, columns))):
            cells[strip * columns + part] = inside & (least <= magnitude) & (magnitude <= most)
    return cells


def _edges(values: Tensor, parts: int) -> Tensor:
    """The edges (parts + 1,) between which lie parts of equal count, ties aside."""
    first = [part * len(values) // parts for part in range(parts)]
    return values.sort().values[[*first, -1]]
