"""Representational similarity analysis."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.distances import Distances, pair_distances

# The least number of tolerances from a group of equal distances to the next distance: _APART, and
# for a group of m different numbers, _PAIR / (m - 1): chance makes large groups less often.
_APART, _PAIR = 4, 256


def rsa(x: Tensor, y: Tensor, *, distance: str, compare: str) -> Tensor:
    u, v = all_dissimilarities([x, y], distance, compare)
    return (u * v).sum().clamp(-1, 1)


def all_dissimilarities(xs: list[Tensor], distance: str, compare: str) -> list[Tensor]:
    """The vectors (n(n - 1)/2,) of xs, each (n, p), whose products are the comparison: unit norm.

    NaN where the distances have no correlation with anything: all equal, or all zero.
    """
    room = gram.block_room(xs)  # fresh memory for each would cost as much as what is done in it
    return [_dissimilarities(x, distance, compare, room) for x in xs]


def _dissimilarities(x: Tensor, distance: str, compare: str, room: Tensor) -> Tensor:
    found = pair_distances(x, distance, room)
    if compare == "spearman":
        d = _centre(average_ranks(found))
    else:
        d2 = found.squared
        least, most = d2.argmin(), d2.argmax()
        away = d2[most] - (0 if compare == "cosine" else d2[least])
        at = most if compare == "cosine" else least
        undefined = away <= found.full_tolerance(at[None])
        d = d2.sqrt() if distance == "euclidean" else d2
        d = torch.where(undefined, torch.nan, d if compare == "cosine" else _centre(d))
    return d / torch.linalg.vector_norm(d)


def _centre(d: Tensor) -> Tensor:
    return d - d.mean()


def average_ranks(found: Distances) -> Tensor:
    """Ranks of distances from 1, those that tie at the mean of theirs; all NaN if one is.

    In order of size, a group ends where the next distance is more than `_APART` tolerances away. A
    group is one value if all its members are within the tolerance of the first, and it stands apart
    from the other groups as its size demands; otherwise only those of its members tie that are
    equal to the bit. The rule is applied by the tolerance of float64 arithmetic, so that numbers
    that the input has exactly tie however close other distances are, and by that of the input's own
    rounding.
    """
    d2 = found.squared
    # NumPy sorts by vector instructions.
    order = d2.argsort() if d2.is_cuda else torch.from_numpy(np.argsort(d2.numpy()))
    values = d2[order]
    largest = float(values[-1])
    if math.isnan(largest):
        return torch.full_like(d2, torch.nan)
    gap = values.diff()
    tied = gap == 0

    near = (gap <= _APART * found.largest_tolerance(largest)).nonzero()[:, 0]
    if len(near):
        tolerance: Callable[[Tensor], Tensor] = lambda at: found.tolerance(order[at])  # noqa: E731
        if bool(tied.any()):
            tolerance = _largest_of_tied(tied, found.tolerances()[order]).__getitem__
        near = near[gap[near] <= _APART * tolerance(near)]
        _join(tied, near, values, gap, tolerance)
    if not found.input_is_float64:
        # Roots of the distances move by no more than the rows do.
        root, moved = values.sqrt(), _largest_of_tied(tied, found.moved()[order].mul_(2))
        gap = root.diff()
        near = (gap <= _APART * moved[:-1]).nonzero()[:, 0]
        _join(tied, near, root, gap, moved.__getitem__)

    ranks = torch.arange(1, len(d2) + 1, dtype=torch.float64, device=d2.device)
    ties = tied.nonzero()[:, 0]
    if len(ties):
        first, last, _, _ = _runs(ties)
        size = last - first + 1
        ranks[_ranges(first, size)] = ((first + last).double() / 2 + 1).repeat_interleave(size)
    out = torch.empty_like(d2)
    out[order] = ranks
    return out


def _largest_of_tied(tied: Tensor, tolerance: Tensor) -> Tensor:
    """The largest tolerance (N,) of neighbours that are tied, in the place of each of them.

    Pairs whose distances are equal have rows of other lengths, and come in any order.
    """
    if not bool(tied.any()):
        return tolerance
    which = torch.nn.functional.pad((~tied).cumsum(0), (1, 0))
    most = tolerance.new_zeros(int(which[-1]) + 1)
    return most.scatter_reduce_(0, which, tolerance, "amax")[which]


def _join(
    tied: Tensor,
    near: Tensor,
    values: Tensor,
    gap: Tensor,
    tolerance: Callable[[Tensor], Tensor],
) -> None:
    """Set ``tied`` (N - 1,) between the members of groups of values (N,) that are one value.

    near: which of the gaps between neighbours are within groups.
    """
    if not len(near):
        return
    first, last, start, stop = _runs(near)
    t = tolerance(first)
    around = torch.nn.functional.pad(gap, (1, 1), value=torch.inf)
    apart = torch.minimum(around[first], around[last + 1])
    # Few groups stand apart, even by the number of all gaps, some of which are tied already.
    one = apart * (last - first) > _PAIR * t
    if not bool(one.any()):
        return
    rises = (~tied[near]).cumsum(0)
    others = (rises[stop] - rises[start]).add_(~tied[first]).clamp_(min=1)
    one &= (values[last] - values[first] <= t) & (apart * others > _PAIR * t)
    first, last = first[one], last[one]
    tied[_ranges(first, last - first)] = True


def _runs(gaps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of consecutive numbers among ascending ones, which stand for gaps between neighbours.

    The first and the last member that the gaps of each run join, and where the run starts and
    stops in ``gaps``.
    """
    ends = (gaps.diff() > 1).nonzero()[:, 0]
    edge = gaps.new_zeros(1)
    start, stop = torch.cat([edge, ends + 1]), torch.cat([ends, edge + len(gaps) - 1])
    return gaps[start], gaps[stop] + 1, start, stop


def _ranges(first: Tensor, size: Tensor) -> Tensor:
    """The numbers of ranges, from the first of each."""
    starts = (first - size.cumsum(0) + size).repeat_interleave(size)
    return starts + torch.arange(len(starts), device=first.device)
