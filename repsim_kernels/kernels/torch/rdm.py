"""Distances between the patterns of conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from repsim_kernels._noise import Noise
from repsim_kernels.kernels.torch import memory, panels
from repsim_kernels.kernels.torch.distances import CLOSE, pair_distances
from repsim_kernels.kernels.torch.noise import make_whitener

_GATHER_SIZE = 2**20  # elements of differences between patterns that are made together


def rdm(x: Tensor, *, distance: str, groups: Any, noise: Noise | None) -> Tensor:
    patterns = x if groups is None else average_rows(x, groups)
    if distance == "mahalanobis":
        assert noise is not None
        return mahalanobis(patterns.reshape(-1, x.shape[1]), make_whitener(noise))
    if distance == "crossnobis":
        return crossnobis(patterns, None if noise is None else make_whitener(noise))
    squared = pair_distances(patterns.reshape(-1, x.shape[1]), distance).squared
    if distance == "euclidean":
        return squared.sqrt_()
    return squared if distance == "sqeuclidean" else squared / 2


def average_rows(x: Tensor, groups: Any) -> Tensor:
    """Return the mean of each group of rows of x (n, p), (K, c, p) float64.

    ``groups`` (K, c, n) has 0 and 1. Sums of integers are exact, and so are means of equal ones.
    """
    members = torch.as_tensor(groups, device=x.device)
    counts = members.sum(2, keepdim=True)
    n, p = x.shape
    out = memory.empty_buffer(x, *members.shape[:2], p, dtype=torch.float64)
    for block in panels.split_neurons(p, n):
        out[..., block] = (members @ x[:, block].double()).div_(counts)
    return out


def mahalanobis(z: Tensor, whiten: Callable[[Tensor], Tensor]) -> Tensor:
    """Return √(δ Σ⁻¹ δᵀ) for all pairs of rows of z (n, p), (n(n - 1)/2,), float64."""
    z = z.double()
    white = whiten(z - z.mean(0))
    gram = white @ white.mT
    i, j, energies = _list_pairs(gram)
    squared = energies - 2 * gram[i, j]
    for close in _iter_close(squared, energies, z.shape[1]):
        squared[close] = whiten(z[i[close]] - z[j[close]]).square().sum(1)
    return squared.sqrt_()


def crossnobis(z: Tensor, whiten: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return crossnobis distances of all pairs of n conditions, (n(n - 1)/2,), float64.

    ``z`` (K, n, p) has their patterns in K folds; it is centred in place.
    """
    k, _, p = z.shape
    z.sub_(z.mean(1, keepdim=True))  # an offset of a fold cancels in every difference
    white = _whiten_folds(z, whiten)
    total = white.sum(0)
    within = (white @ white.mT).sum(0)
    cross = total @ total.mT - within
    i, j, energies = _list_pairs(within)
    diagonal = cross.diagonal()
    products = diagonal[i] + diagonal[j] - 2 * cross[i, j]
    for close in _iter_close(energies - 2 * within[i, j], energies, k * p):
        delta = _whiten_folds(z[:, i[close]] - z[:, j[close]], whiten)
        products[close] = delta.sum(0).square().sum(1) - delta.square().sum((0, 2))
    return products / (k * (k - 1) * p)


def _whiten_folds(z: Tensor, whiten: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Whiten the rows of all folds (K, r, p) together."""
    return z if whiten is None else whiten(z.flatten(0, 1)).view(z.shape)


def _list_pairs(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of each pair, and the sum of their squared norms, from a Gram (n, n)."""
    i, j = torch.triu_indices(len(gram), len(gram), 1, device=gram.device)
    energy = gram.diagonal()
    return i, j, energy[i] + energy[j]


def _iter_close(squared: Tensor, energies: Tensor, p: int) -> Iterator[Tensor]:
    """Yield the indices of pairs whose squared distances lost most digits, in small batches."""
    close = (squared <= CLOSE * energies).nonzero()[:, 0]
    if len(close):
        yield from close.split(max(1, _GATHER_SIZE // p))
