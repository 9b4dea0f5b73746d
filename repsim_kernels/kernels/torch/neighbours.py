"""Overlap of nearest neighbours between representations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from repsim_kernels.kernels.torch.distances import SCALING_ERROR
from repsim_kernels.kernels.torch.nearest import Find, Rows, Ties, find_nearest, join_ties

METRICS = ("mutual_knn", "jaccard_knn", "cknna")


class Neighbours(NamedTuple):
    """The k nearest other stimuli of each of n stimuli."""

    indices: Tensor  # (n, k) int64
    # (n, k), their entries in the centred kernel, scaled to unit length together; NaN if they are
    # all zero, and empty if no metric needs them
    entries: Tensor
    has_distances: bool  # whether each stimulus has a direction, and they are not all the same
    ties: Ties | None = None  # for the last places; tied neighbours have equal entries

    def defines(self, metric: str) -> bool:
        """Whether a metric has a value for this representation."""
        is_nan = metric == "cknna" and bool(self.entries[0, 0].isnan())
        return self.has_distances and not is_nan


def mutual_knn(x: Tensor, y: Tensor, find: Find | None = None, **options: Any) -> Tensor:
    return all_pairs([x], [y], {"mutual_knn": options}, find)["mutual_knn"][0, 0]


def jaccard_knn(x: Tensor, y: Tensor, find: Find | None = None, **options: Any) -> Tensor:
    return all_pairs([x], [y], {"jaccard_knn": options}, find)["jaccard_knn"][0, 0]


def cknna(x: Tensor, y: Tensor, find: Find | None = None, **options: Any) -> Tensor:
    return all_pairs([x], [y], {"cknna": options}, find)["cknna"][0, 0]


def all_pairs(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    metrics: dict[str, dict[str, Any]],
    find: Find | None = None,
) -> dict[str, Tensor]:
    """Return metrics of every x (n, p_i) with every y (n, q_j), (L, M) each; ys default to xs.

    ``metrics`` maps their names to their options. NaN where one is not defined. ``find`` replaces
    `nearest.find_candidates`.
    """
    same = torch.arange(len(xs[0]), device=xs[0].device)[None]
    out, sides = {}, {}
    for metric, options in metrics.items():
        k, distance = options["k"], options.get("distance", "cosine")
        if (k, distance) not in sides:
            with_entries = "cknna" in metrics
            sides[k, distance] = [
                [find_neighbours(x, k, distance, with_entries, find) for x in side]
                for side in (xs, ys)
                if side is not None
            ]
        left, right = sides[k, distance][0], sides[k, distance][-1]
        out[metric] = compare_permuted(left, right, same, metric)[0]
    return out


def find_neighbours(
    x: Tensor,
    k: int,
    distance: str = "cosine",
    with_entries: bool = False,
    find: Find | None = None,
    with_ties: bool = False,
) -> Neighbours:
    """Return the k nearest other rows of each row of x (n, p).

    CKNNA needs the entries, and permutations the ties.
    """
    rows = Rows(x, distance)
    if not rows.have_distances():
        indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
        return Neighbours(indices, indices.double(), False)
    parts: list[Ties] | None = [] if with_ties else None
    indices = find_nearest(rows, k, find, parts)
    ties = join_ties(parts) if parts else None
    if not with_entries:
        return Neighbours(indices, rows.energy.new_empty(0), True, ties)
    entries = rows.multiply_centred(indices)
    length = torch.linalg.vector_norm(entries)
    is_zero = length <= SCALING_ERROR * entries.numel() ** 0.5
    return Neighbours(indices, entries / length.masked_fill(is_zero, torch.nan), True, ties)


def compare_permuted(
    left: list[Neighbours], right: list[Neighbours], indices: Tensor, metric: str
) -> Tensor:
    """Return a metric of neighbours under permutations of the stimuli, (K, L, M).

    Parameters
    ----------
    left, right : lists of L and M Neighbours
        From `find_neighbours` with the same options; for "cknna" with entries. The right ones with
        ties, unless the only permutation is the identity.
    indices : tensor, (K, n), int64
        Permutation a compares stimulus i of a left representation with stimulus ``indices[a, i]``
        of a right one: the result is that of ``metric(x, y[indices[a]])``.
    metric : {"mutual_knn", "jaccard_knn", "cknna"}

    Notes
    -----
    The neighbours of all left representations are sorted once. The M n k neighbours of the right
    ones are then searched among them for each permutation, which finds the overlaps with all left
    ones: K M n k log(L n k) operations, and one for each neighbour that two representations share.
    """
    n, k = left[0].indices.shape
    table = _NeighbourTable(left)
    stimuli = torch.arange(n, device=indices.device)
    out = table.keys.new_empty(len(indices), len(left), len(right), dtype=torch.float64)
    for permutation, values in zip(indices, out, strict=True):
        position = torch.empty_like(permutation)  # of each stimulus after the permutation
        position[permutation] = stimuli
        for m, one in enumerate(right):
            entries = one.entries[permutation] if metric == "cknna" else None
            nearest = one.ties.resolve(one.indices, position) if one.ties else one.indices
            shared = table.sum_shared(position[nearest[permutation]], entries)
            if metric == "jaccard_knn":
                shared /= 2 * k - shared
            values[:, m] = shared.sum(1)
    if metric == "cknna":
        out.clamp_(-1, 1)
    else:
        out /= n * k if metric == "mutual_knn" else n
    rows, columns = (
        torch.tensor([one.defines(metric) for one in side], device=out.device)
        for side in (left, right)
    )
    return out.masked_fill_(~(rows[:, None] & columns), torch.nan)


class _NeighbourTable:
    """The neighbours of L representations, sorted by stimulus and neighbour."""

    def __init__(self, members: list[Neighbours]) -> None:
        self.shape = torch.Size((len(members), *members[0].indices.shape))
        keys = torch.cat([_make_keys(one.indices) for one in members])
        self.order = keys.argsort()
        self.keys, self.counts = keys[self.order].unique_consecutive(return_counts=True)
        self.starts = self.counts.cumsum(0) - self.counts  # in `order`
        self.entries = torch.cat([one.entries.flatten() for one in members])

    def sum_shared(self, indices: Tensor, entries: Tensor | None) -> Tensor:
        """Return what each member shares with other neighbours (n, k), by stimulus: (L, n).

        The number of neighbours, or the sum of the products of their ``entries``, if these are
        given.
        """
        size, n, k = self.shape
        queries = _make_keys(indices)
        at = torch.searchsorted(self.keys, queries).clamp_(max=len(self.keys) - 1)
        hits = (self.keys[at] == queries).nonzero()[:, 0]
        counts, ends = self.counts[at[hits]], self.starts[at[hits]] + self.counts[at[hits]]
        steps = torch.arange(int(counts.sum()), device=hits.device)
        places = self.order[(ends - counts.cumsum(0)).repeat_interleave(counts) + steps]
        weights = None
        if entries is not None:
            weights = self.entries[places] * entries.flatten()[hits].repeat_interleave(counts)
        shared = torch.bincount(places // k, weights, minlength=size * n)
        return shared.view(size, n).to(torch.float64)


def _make_keys(indices: Tensor) -> Tensor:
    """Return one integer for each stimulus and neighbour (n, k): (n k,)."""
    n = len(indices)
    return (indices + torch.arange(0, n * n, n, device=indices.device)[:, None]).flatten()
