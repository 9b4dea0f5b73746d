"""Representational similarity analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import panels
from repsim_kernels.kernels.torch.distances import Distances, pair_distances

# The least number of tolerances from a group of equal distances to the next distance: _APART, and
# for a group of m different numbers, _PAIR / (m - 1): chance makes large groups less often.
_APART, _PAIR = 4, 256

Array = Any  # a tensor on a GPU, a NumPy array on a CPU


def rsa(x: Tensor, y: Tensor, *, distance: str, compare: str) -> Tensor:
    u, v = all_dissimilarities([x, y], distance, compare)
    return (u * v).sum().clamp(-1, 1)


def all_dissimilarities(xs: list[Tensor], distance: str, compare: str) -> list[Tensor]:
    """The vectors (n(n - 1)/2,) of xs, each (n, p), whose products are the comparison: unit norm.

    NaN where the distances have no correlation with anything: all equal, or all zero.
    """
    room = panels.block_buffer(xs)  # fresh memory for each would cost as much as what is done in it
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
    # NumPy sorts by vector instructions, and of small arrays it has less overhead.
    xp: Any = torch if found.squared.is_cuda else np
    d2: Array = xp.asarray(found.squared)
    order = d2.argsort()
    values = d2[order]
    if bool(xp.isnan(values[-1])):
        return torch.full_like(found.squared, torch.nan)
    gaps = _gaps(xp, values)
    tied = gaps == 0
    bounds = 0.0, found.largest_tolerance(float(values[-1]))
    _join(xp, tied, values, gaps, _in_order(xp, found.tolerance, order, tied), *bounds)
    if not found.input_is_float64:
        # Roots of the distances move by no more than the rows do.
        values = xp.sqrt(values)
        bounds = 4 * float(found.half_ulps.amin()), 4 * float(found.half_ulps.amax())
        tolerance = _in_order(xp, found.twice_moved, order, tied)
        _join(xp, tied, values, _gaps(xp, values), tolerance, *bounds)

    ranks = xp.arange(1, len(d2) + 1, dtype=d2.dtype, device=d2.device)
    first, last = _groups(xp, tied)
    size = last - first + 1
    ranks[_ranges(xp, first, size)] = _repeat(xp, (ranks[first] + ranks[last]) / 2, size)
    out = xp.empty_like(d2)
    out[order] = ranks
    return torch.as_tensor(out)


def _gaps(xp: Any, values: Array) -> Array:
    """Gaps (N + 1,) around ascending values (N,): the one at k is before the k-th."""
    gaps = xp.full((len(values) + 1,), np.inf, dtype=values.dtype, device=values.device)
    gaps[1:-1] = values[1:] - values[:-1]
    return gaps


def _groups(xp: Any, inside: Array) -> tuple[Array, Array]:
    """The first and the last of groups of several members; gaps (N + 1,) are inside, or between."""
    edges = xp.where(~inside)[0]
    several = edges[1:] - edges[:-1] > 1
    return edges[:-1][several], edges[1:][several] - 1


def _ranges(xp: Any, first: Array, size: Array) -> Array:
    """The numbers of ranges, from the first of each."""
    starts = _repeat(xp, first - size.cumsum(0) + size, size)
    return starts + xp.arange(len(starts), device=starts.device)


def _repeat(xp: Any, values: Array, times: Array) -> Array:
    return values.repeat_interleave(times) if xp is torch else values.repeat(times)


def _in_order(
    xp: Any, given: Callable[..., Tensor], order: Array, tied: Array
) -> Callable[[Array], Array]:
    """What is given of pairs, by their places in the order; the largest of those that are tied.

    Pairs whose distances are equal have rows of other lengths, and come in any order.
    """

    def find(at: Array) -> Array:
        if not bool(tied.any()):
            return xp.asarray(given(torch.as_tensor(order[at])))
        values = given()[torch.as_tensor(order)]
        group = torch.as_tensor((~tied[:-1]).cumsum(0) - 1)
        most = torch.zeros_like(values).scatter_reduce_(0, group, values, "amax")
        return xp.asarray(most[group])[at]

    return find


def _join(
    xp: Any,
    tied: Array,
    values: Array,
    gaps: Array,
    tolerance: Callable[[Array], Array],
    least: float,
    most: float,
) -> None:
    """Set ``tied`` (N + 1,) between the members of groups of values (N,) that are one value.

    tolerance: of the values in some places, from ``least`` to ``most``.
    """
    # A group lies within one of those that the largest tolerance makes. It is all of that one, or
    # the next value is within _APART of the largest tolerances, and then it has many members.
    near = gaps <= _APART * most
    if not bool(near.any()):
        return
    first, last = _groups(xp, near)
    apart, size = xp.minimum(gaps[first], gaps[last + 1]), last - first
    some = (apart * size > _PAIR * least) & (values[last] - values[first] <= most)
    some |= _APART * most * size > _PAIR * least
    if not bool(some.any()):
        return
    near = _ranges(xp, first[some] + 1, size[some])
    reach = xp.full_like(gaps, -1)
    reach[near] = tolerance(near - 1)
    first, last = _groups(xp, gaps <= _APART * reach)
    t = reach[first + 1]
    apart = xp.minimum(gaps[first], gaps[last + 1])
    others = last - first  # different numbers
    if bool(tied.any()):
        before = tied.cumsum(0)
        others = others - (before[last] - before[first])
        others += others == 0
    one = (values[last] - values[first] <= t) & (apart * others > _PAIR * t)
    tied[_ranges(xp, first[one] + 1, (last - first)[one])] = True
