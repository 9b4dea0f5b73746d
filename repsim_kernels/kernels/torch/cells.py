"""Class means, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram


def class_means(x: Tensor, *, labels: np.ndarray, n_classes: int) -> Tensor:
    n, p = x.shape
    member = torch.zeros(n_classes, n, dtype=torch.float64, device=x.device)
    member[torch.from_numpy(labels).to(x.device), torch.arange(n, device=x.device)] = 1
    member /= member.sum(1, keepdim=True)
    out = torch.empty(n_classes, p, dtype=torch.float64, device=x.device)
    for block in gram.blocks(p, n):
        out[:, block] = member @ x[:, block].to(torch.float64)
    return out


def selectivity_grid(
    x: Tensor, *, labels: np.ndarray, target: int, grid: tuple[int, int]
) -> Tensor:
    others, own = class_means(x, labels=(labels == target).astype(np.int64), n_classes=2)
    strip = equal_count(own - others, torch.zeros_like(own, dtype=torch.int64), 1, grid[0])
    return strip * grid[1] + equal_count(own + others, strip, *grid)


def equal_count(value: Tensor, group: Tensor, n_groups: int, parts: int) -> Tensor:
    """The part, by rank of `value` within its group, of each neuron (p,); ties by index."""
    by_value = torch.sort(value, stable=True).indices
    order = by_value[torch.sort(group[by_value], stable=True).indices]
    sizes = torch.bincount(group, minlength=n_groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=value.device) - starts[group[order]]
    return rank * parts // sizes[group]
