"""Class means, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram


def class_sums(x: Tensor, labels: np.ndarray, n_classes: int) -> Tensor:
    """Sums of x (n, p) over the stimuli of each class: (n_classes, p), float64."""
    n, p = x.shape
    member = torch.zeros(n_classes, n, dtype=torch.float64, device=x.device)
    member[torch.from_numpy(labels).to(x.device), torch.arange(n, device=x.device)] = 1
    out = torch.empty(n_classes, p, dtype=torch.float64, device=x.device)
    for block in gram.blocks(p, n):
        out[:, block] = member @ x[:, block].to(torch.float64)
    return out


def class_means(x: Tensor, *, labels: np.ndarray, n_classes: int) -> Tensor:
    counts = torch.from_numpy(np.bincount(labels, minlength=n_classes)).to(x.device)
    return class_sums(x, labels, n_classes) / counts[:, None]


def selectivity_grid(
    x: Tensor, *, labels: np.ndarray, target: int, grid: tuple[int, int]
) -> Tensor:
    own = labels == target
    return grid_of_sums(
        *class_sums(x, own.astype(np.int64), 2), own=int(own.sum()), n=len(x), grid=grid
    )


def grid_of_sums(
    others_sum: Tensor, own_sum: Tensor, *, own: int, n: int, grid: tuple[int, int]
) -> Tensor:
    """The cell of each neuron (p,) from its sums over the other and over the target's stimuli.

    Compares the means times both counts: exact where the sums are, so that equal neurons tie.
    """
    others_sum, own_sum = others_sum * own, own_sum * (n - own)
    none = torch.zeros(len(own_sum), dtype=torch.int64, device=own_sum.device)
    strip = _equal_count(own_sum - others_sum, none, 1, grid[0])
    return strip * grid[1] + _equal_count(own_sum + others_sum, strip, *grid)


def _equal_count(value: Tensor, group: Tensor, n_groups: int, parts: int) -> Tensor:
    """The part, by rank of `value` within its group, of each neuron (p,); ties by index."""
    by_value = torch.sort(value, stable=True).indices
    order = by_value[torch.sort(group[by_value], stable=True).indices]
    sizes = torch.bincount(group, minlength=n_groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=value.device) - starts[group[order]]
    return rank * parts // sizes[group]
