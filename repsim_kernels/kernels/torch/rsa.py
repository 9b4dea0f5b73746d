"""Representational similarity analysis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram


def rsa(x: Tensor, y: Tensor, *, distance: str, compare: str) -> Tensor:
    return (dissimilarities(x, distance, compare) * dissimilarities(y, distance, compare)).sum()


def dissimilarities(x: Tensor, distance: str, compare: str) -> Tensor:
    """The vector (n(n - 1)/2,) of x (n, p) whose products are the comparison: unit norm.

    NaN where the distances have no correlation with anything: all equal, or all zero.
    """
    d = pair_distances(x, distance, ranked=compare == "spearman")
    if compare != "cosine":
        equal = d.amax() - d.amin() <= 1e-13 * d.amax()
        d = average_ranks(d) if compare == "spearman" else d
        d = torch.where(equal, torch.nan, d - d.mean())
    return d / torch.linalg.vector_norm(d)


def pair_distances(x: Tensor, distance: str, ranked: bool) -> Tensor:
    """The distances between the rows of x (n, p), in the order of SciPy's pdist.

    ranked: whether those that are equal must be so to the bit, as in one product they are.
    """
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
    half = gram.new_half(x, n, least=n) if ranked else gram.new_half(x, n)
    room = gram.block_room([x])
    for block in gram.blocks(p, n):
        width = block.stop - block.start
        z = room[: n * width].view(n, width).copy_(x[:, block])
        z.sub_(z[:1].clone() if shift is None else shift)
        gram.add_product(half, z, first=block.start == 0)
    d = gram.diagonal(half)
    parts = []
    for own, g in half:
        # A column from below the diagonal down is a row of the upper triangle.
        g, one, other = g.mT, d[own, None], d[None, own.start :]
        if shift is not None:
            part = 1 - g / (one * other).sqrt()
            # Rows of one direction are at distance 0; rounding must not order them.
            part[part.abs() < 16 * torch.finfo(torch.float64).eps] = 0
        else:
            both = one + other
            part = both - 2 * g
            # Where two stimuli are close the Gram has lost their distance: take it from features.
            close = torch.nonzero((part <= 1e-6 * both).triu_(1))
            for row, column in (some.T for some in close.split(max(1, 2**20 // p))):
                pair = (x[own.start + i].to(torch.float64) for i in (row, column))
                part[row, column] = torch.sub(*pair).square().sum(1)
        parts.append(part[torch.ones_like(part, dtype=torch.bool).triu_(1)])
    found = torch.cat(parts)
    return found.sqrt_() if distance == "euclidean" else found


def average_ranks(d: Tensor) -> Tensor:
    """Ranks from 1 of a vector, ties at the mean of theirs; all NaN if one is."""
    if d.isnan().any():
        return torch.full_like(d, torch.nan)
    # NumPy sorts by vector instructions.
    order = d.argsort() if d.is_cuda else torch.from_numpy(np.argsort(d.numpy()))
    values = d[order]
    edges = (values[1:] != values[:-1]).nonzero()[:, 0] + 1
    bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(d))])
    counts = bounds.diff()
    ranks = bounds[1:].to(torch.float64) - (counts - 1) / 2
    out = torch.empty_like(d)
    out[order] = ranks.repeat_interleave(counts)
    return out
