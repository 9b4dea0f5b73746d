"""Representational similarity analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory
from repsim_kernels.kernels.torch.distances import PairDistances, Workspace, pair_distances

# How many tolerances must separate a group of tied distances from the next distance: more than
# MIN_GAP, and for a group of m different numbers more than _PAIR_GAP / (m - 1), since large groups
# rarely form by chance.
MIN_GAP, _PAIR_GAP = 4, 256

Array = Any  # a tensor on a GPU, a NumPy array on a CPU


def rsa(x: Tensor, y: Tensor, *, distance: str, compare: str) -> Tensor:
    u, v = all_dissimilarities([x, y], distance, compare)
    return (u * v).sum().clamp(-1, 1)


def all_dissimilarities(xs: list[Tensor], distance: str, compare: str) -> Tensor:
    """Return unit vectors (L, n(n - 1)/2), one for each x (n, p), whose products compare them.

    NaN where the comparison is undefined: all distances are equal or, for "cosine", zero.
    """
    n, space = len(xs[0]), Workspace(xs)
    out = memory.empty_buffer(xs[0], len(xs), n * (n - 1) // 2, dtype=torch.float64)
    for i, x in enumerate(xs):
        compare_pairs(pair_distances(x, distance, space), distance, compare, out[i : i + 1])
    return out


def compare_pairs(pairs: PairDistances, distance: str, compare: str, out: Tensor) -> Tensor:
    """Write unit vectors as `all_dissimilarities` returns them to ``out`` (B, N), and return it.

    ``pairs`` has the distances of B representations, N each. They are overwritten.
    """
    shape = out.shape
    if compare == "spearman":
        d, undefined = rank_distances(pairs, shape[1]), None
    else:
        d, undefined = pairs.squared, _are_undefined(pairs, compare, shape)
        if distance == "euclidean":
            d.sqrt_()
    d = d.view(shape)
    if compare != "cosine":
        d.sub_(d.mean(1, keepdim=True))
    norm = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    if undefined is not None:
        norm.masked_fill_(undefined, torch.nan)
    return torch.div(d, norm, out=out)


def _are_undefined(pairs: PairDistances, compare: str, shape: tuple[int, ...]) -> Tensor:
    """Return for which of B copies (B, 1) the distances are all equal or, for "cosine", zero.

    Up to rounding. There are ``shape`` = (B, N) distances.
    """
    d2 = pairs.squared.view(shape)
    if compare == "cosine":
        at = d2.argmax(1, keepdim=True)
        spread = d2.gather(1, at)
    else:
        at = d2.argmin(1, keepdim=True)
        spread = d2.amax(1, keepdim=True) - d2.gather(1, at)
    starts = torch.arange(0, d2.numel(), shape[1], device=d2.device)
    return spread <= pairs.full_tolerance(at[:, 0] + starts)[:, None]


def rank_distances(pairs: PairDistances, row_length: int | None = None) -> Tensor:
    """Rank distances from 1, ties at their mean rank; all NaN if one distance is.

    In ascending order, a group ends where the next distance is more than `MIN_GAP` tolerances
    away. A group ties if all its members are within the tolerance of the first and the group is
    separated from its neighbours as its size requires; otherwise only exactly equal members tie.
    The rule is applied first with the tolerance of float64 arithmetic, so that distances that are
    equal in the exact input tie however close the others are, and then with the tolerance of the
    input's own rounding. With ``row_length``, each run of that length is ranked separately.
    """
    # NumPy sorts with vector instructions, and has less overhead on small arrays.
    xp: Any = torch if pairs.squared.is_cuda else np
    d2: Array = xp.asarray(pairs.squared)
    rows = d2.reshape(-1, row_length or len(d2))
    order = rows.argsort(1)
    starts = xp.arange(0, len(d2), rows.shape[1], device=d2.device)
    order = (order + starts[:, None]).reshape(-1)
    if bool(xp.isnan(d2[order[rows.shape[1] - 1 :: rows.shape[1]]]).any()):
        return torch.full_like(pairs.squared, torch.nan)
    tied = find_ties(xp, pairs, order, row_length)
    ranks = xp.arange(1, len(d2) + 1, dtype=d2.dtype, device=d2.device)
    first, last = _find_groups(xp, tied)
    size = last - first + 1
    ranks[_concatenate_ranges(xp, first, size)] = _repeat(
        xp, (ranks[first] + ranks[last]) / 2, size
    )
    ranks.reshape(rows.shape)[:] -= starts[:, None]
    out = xp.empty_like(d2)
    out[order] = ranks
    return torch.as_tensor(out)


def find_ties(xp: Any, pairs: PairDistances, order: Array, row_length: int | None = None) -> Array:
    """Return which gaps (N + 1,) before, between and after N ascending distances are inside a tie.

    ``order`` (N,) has their indices among the pairs. With ``row_length``, each run of that length
    ascends, and the rule of `rank_distances` is applied to each of them.
    """
    values: Array = xp.asarray(pairs.squared)[order]
    gaps = _find_gaps(xp, values, row_length)
    tied: Array = gaps == 0
    bounds = 0.0, pairs.largest_tolerance(float(values.max()))
    _tie_groups(
        xp, tied, values, gaps, _tolerance_by_position(xp, pairs.tolerance, order, tied), *bounds
    )
    if not pairs.input_is_float64:
        # The square root of a distance moves by no more than the rows do.
        values = xp.sqrt(values)
        bounds = 4 * float(pairs.half_ulps.amin()), 4 * float(pairs.half_ulps.amax())
        tolerance = _tolerance_by_position(xp, pairs.twice_input_shift, order, tied)
        _tie_groups(xp, tied, values, _find_gaps(xp, values, row_length), tolerance, *bounds)
    return tied


def _find_gaps(xp: Any, values: Array, row_length: int | None) -> Array:
    """Return the gaps (N + 1,) before each of the ascending values (N,), and after the last.

    With ``row_length``, each run of that length ascends, and the gaps between them are infinite.
    """
    gaps = xp.full((len(values) + 1,), np.inf, dtype=values.dtype, device=values.device)
    gaps[1:-1] = values[1:] - values[:-1]
    gaps[:: row_length or len(values)] = np.inf
    return gaps


def _find_groups(xp: Any, inside: Array) -> tuple[Array, Array]:
    """Return the first and last index of each group with several members.

    ``inside`` (N + 1,) says whether a gap lies within a group.
    """
    edges = xp.where(~inside)[0]
    has_several = edges[1:] - edges[:-1] > 1
    return edges[:-1][has_several], edges[1:][has_several] - 1


def _concatenate_ranges(xp: Any, first: Array, size: Array) -> Array:
    """Concatenate the ranges first … first + size - 1."""
    starts = _repeat(xp, first - size.cumsum(0) + size, size)
    return starts + xp.arange(len(starts), device=starts.device)


def _repeat(xp: Any, values: Array, times: Array) -> Array:
    return values.repeat_interleave(times) if xp is torch else values.repeat(times)


def _tolerance_by_position(
    xp: Any, tolerance: Callable[..., Tensor], order: Array, tied: Array
) -> Callable[[Array], Array]:
    """Make a tolerance of pairs a function of positions in ascending order of distance.

    Tied pairs get the largest of their tolerances: their rows differ in length, and their order is
    arbitrary.
    """

    def at_positions(at: Array) -> Array:
        if not bool(tied.any()):
            return xp.asarray(tolerance(torch.as_tensor(order[at])))
        values = tolerance()[torch.as_tensor(order)]
        group = torch.as_tensor((~tied[:-1]).cumsum(0) - 1)
        largest = torch.zeros_like(values).scatter_reduce_(0, group, values, "amax")
        return xp.asarray(largest[group])[at]

    return at_positions


def _tie_groups(
    xp: Any,
    tied: Array,
    values: Array,
    gaps: Array,
    tolerance: Callable[[Array], Array],
    min_tolerance: float,
    max_tolerance: float,
) -> None:
    """Set ``tied`` (N + 1,) in place for the gaps inside groups of values (N,) that tie.

    ``tolerance`` returns the tolerances at positions; the bounds hold for all of them.
    """
    # The largest tolerance makes the widest groups, and every group lies within one of them. Either
    # it fills that one, or the next value is within MIN_GAP times the largest tolerance, and then
    # only a large group can tie. So most groups are rejected before tolerances are computed.
    near = gaps <= MIN_GAP * max_tolerance
    if not bool(near.any()):
        return
    first, last = _find_groups(xp, near)
    margin, size = xp.minimum(gaps[first], gaps[last + 1]), last - first
    may_tie = margin * size > _PAIR_GAP * min_tolerance
    may_tie &= values[last] - values[first] <= max_tolerance
    may_tie |= MIN_GAP * max_tolerance * size > _PAIR_GAP * min_tolerance
    if not bool(may_tie.any()):
        return
    near = _concatenate_ranges(xp, first[may_tie] + 1, size[may_tie])
    reach = xp.full_like(gaps, -1)
    reach[near] = tolerance(near - 1)
    first, last = _find_groups(xp, gaps <= MIN_GAP * reach)
    t = reach[first + 1]
    margin = xp.minimum(gaps[first], gaps[last + 1])
    n_steps = last - first  # between different numbers
    if bool(tied.any()):
        before = tied.cumsum(0)
        n_steps = n_steps - (before[last] - before[first])
        n_steps += n_steps == 0
    ties = (values[last] - values[first] <= t) & (margin * n_steps > _PAIR_GAP * t)
    tied[_concatenate_ranges(xp, first[ties] + 1, (last - first)[ties])] = True
