"""Representational similarity analysis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch.distances import Distances, pair_distances

# Tolerances from a group of equal distances to the next distance: at least so many, and for a
# group of m different numbers, which is less likely by chance the larger it is, at least
# _PAIR / (m - 1).
_APART, _PAIR = 4, 256


def rsa(x: Tensor, y: Tensor, *, distance: str, compare: str) -> Tensor:
    u, v = (dissimilarities(z, distance, compare) for z in (x, y))
    return (u * v).sum().clamp(-1, 1)


def dissimilarities(x: Tensor, distance: str, compare: str) -> Tensor:
    """The vector (n(n - 1)/2,) of x (n, p) whose products are the comparison: unit norm.

    NaN where the distances have no correlation with anything: all equal, or all zero.
    """
    found = pair_distances(x, distance)
    if compare == "spearman":
        d = _centre(average_ranks(found))
    else:
        d2 = found.squared
        least, most = d2.argmin(), d2.argmax()
        away = d2[most] - (0 if compare == "cosine" else d2[least])
        at = most if compare == "cosine" else least
        undefined = away <= found.tolerance(at[None], exact_input=False)
        d = d2.sqrt() if distance == "euclidean" else d2
        d = torch.where(undefined, torch.nan, d if compare == "cosine" else _centre(d))
    return d / torch.linalg.vector_norm(d)


def _centre(d: Tensor) -> Tensor:
    return d - d.mean()


def average_ranks(found: Distances) -> Tensor:
    """Ranks of distances from 1, those that tie at the mean of theirs; all NaN if one is.

    In order of size, groups are more than `_APART` tolerances apart. A group is one value if all
    its members are within the tolerance of the first, and it stands apart from the other groups as
    its size demands; otherwise only those of its members tie that are equal to the bit. The rule
    is applied by the tolerance of float64 arithmetic, so that numbers that the input has exactly
    tie however close other distances are, and by that of the input's own rounding.
    """
    d2 = found.squared
    # NumPy sorts by vector instructions.
    order = d2.argsort() if d2.is_cuda else torch.from_numpy(np.argsort(d2.numpy()))
    values = d2[order]
    if bool(values[-1].isnan()):
        return torch.full_like(d2, torch.nan)
    gap = values.diff()
    tied = gap == 0
    for exact_input in (True, False):
        first, last = _groups(found, order, values, gap, exact_input)
        tied[_ranges(first, last)] = True
    ranks = torch.arange(1, len(d2) + 1, dtype=torch.float64, device=d2.device)
    first, last = _runs(tied)
    members = _ranges(first, last + 1)
    ranks[members] = ((first + last).double() / 2 + 1).repeat_interleave(last - first + 1)
    out = torch.empty_like(d2)
    out[order] = ranks
    return out


def _groups(
    found: Distances, order: Tensor, values: Tensor, gap: Tensor, exact_input: bool
) -> tuple[Tensor, Tensor]:
    """The first and the last member of every group that is one value, in order of size."""
    low, high = found.tolerance_bounds(values[1:], exact_input)
    wide = gap > _APART * low
    unsure = (wide & (gap <= _APART * high)).nonzero()[:, 0]
    around = torch.stack([order[unsure], order[unsure + 1]])
    wide[unsure] = gap[unsure] > _APART * found.tolerance(around, exact_input).amax(0)
    first, last = _runs(~wide)
    tolerance = found.tolerance(order[first], exact_input)
    beyond = torch.nn.functional.pad(gap, (1, 1), value=torch.inf)
    apart = torch.minimum(beyond[first], beyond[last + 1])
    rises = torch.nn.functional.pad((gap > 0).cumsum(0), (1, 0))
    others = (rises[last] - rises[first]).clamp(min=1)
    one = values[last] - values[first] <= tolerance
    one &= apart > tolerance * _PAIR / others
    return first[one], last[one]


def _runs(joined: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last member of each run whose neighbours are joined."""
    edge = joined.new_zeros(1)
    joined = torch.cat([edge, joined, edge])
    starts, stops = joined[1:] & ~joined[:-1], joined[:-1] & ~joined[1:]
    return starts.nonzero()[:, 0], stops.nonzero()[:, 0]


def _ranges(first: Tensor, stop: Tensor) -> Tensor:
    """All numbers of the ranges [first, stop)."""
    lengths = stop - first
    starts = (first - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
    return starts + torch.arange(len(starts), device=first.device)
