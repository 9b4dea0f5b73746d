"""Representational similarity analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram


def rsa(x: Tensor, y: Tensor, *, distance: str, compare: str) -> Tensor:
    return (dissimilarities(x, distance, compare) * dissimilarities(y, distance, compare)).sum()


def dissimilarities(x: Tensor, distance: str, compare: str) -> Tensor:
    """The vector (n(n - 1)/2,) of x (n, p) whose products are the comparison: unit norm.

    NaN where the distances have no correlation with anything: all equal, or all zero.
    """
    d = pair_distances(x, distance)
    if compare != "cosine":
        equal = d.amax() - d.amin() <= 1e-13 * d.amax()
        d = average_ranks(d) if compare == "spearman" else d
        d = torch.where(equal, torch.nan, d - d.mean())
    return d / torch.linalg.vector_norm(d)


def pair_distances(x: Tensor, distance: str) -> Tensor:
    """The distances between the rows of x (n, p), in the order of SciPy's pdist."""
    n, p = x.shape
    if distance == "correlation":
        # By way of the first neuron, so that a constant row has a length of exactly zero.
        first = x[:, :1].to(torch.float64)
        parts = [(x[:, block] - first).sum(1, keepdim=True) for block in gram.blocks(p, n)]
        shift = first + torch.stack(parts).sum(0) / p
    elif distance == "cosine":
        shift = torch.zeros(1, 1, dtype=torch.float64, device=x.device)
    else:
        # The first row: it leaves these distances alone, and integers stay integers.
        shift = None
    g = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    for block in gram.blocks(p, n):
        z = x[:, block].to(torch.float64)
        z = z - (z[:1] if shift is None else shift)
        g += z @ z.mT
    row, column = torch.triu_indices(n, n, 1, device=x.device)
    d = g.diagonal()
    if shift is not None:
        angular = 1 - g[row, column] / (d[row] * d[column]).sqrt()
        # Rows of one direction are at distance 0; rounding must not order them.
        return torch.where(angular.abs() < 16 * torch.finfo(torch.float64).eps, 0.0, angular)
    squared = d[row] + d[column] - 2 * g[row, column]
    # Where two stimuli are close the Gram has lost their distance: take it from the features.
    close = torch.nonzero(squared <= 1e-6 * (d[row] + d[column])).flatten()
    for some in torch.split(close, max(1, 2**20 // p)):
        difference = x[row[some]].to(torch.float64) - x[column[some]].to(torch.float64)
        squared[some] = difference.square().sum(1)
    return squared if distance == "sqeuclidean" else squared.sqrt()


def average_ranks(d: Tensor) -> Tensor:
    """Ranks from 1 of a vector, ties at the mean of theirs; all NaN if one is."""
    if d.isnan().any():
        return torch.full_like(d, torch.nan)
    _, inverse, counts = torch.unique(d, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[inverse]
