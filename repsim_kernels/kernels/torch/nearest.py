"""The nearest other stimuli of each stimulus, without a matrix of all distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory, panels
from repsim_kernels.kernels.torch.distances import (
    BLAS_CHUNK,
    CLOSE,
    SCALING_ERROR,
    EqualRows,
    RowErrors,
    bound_rounding,
    central_row,
    check_distinct,
    row_means,
    row_norms,
)
from repsim_kernels.kernels.torch.rsa import MIN_GAP, find_ties

_TILE = 2**11  # rows and columns of a float32 tile of distances: 16 MiB
_MARGIN = 6  # candidates beyond the neighbours and the next stimulus
_GATHER = 2**19  # elements of features that are gathered together
_SORTED = 2**17  # distances of some stimuli from all others that are sorted together

# A function such as `find_candidates`.
Find = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


class Ties(NamedTuple):
    """Others that tie for the last places among the k nearest of some stimuli.

    Attributes
    ----------
    stimuli : tensor, (m,), int64
        Those of which more others tie than there are places left.
    n_closer : tensor, (m,), int64
        How many of their nearest others are closer; these come first.
    others, owners : tensors, (t,), int64
        The tied others, and for each of them a position in ``stimuli``.
    """

    stimuli: Tensor
    n_closer: Tensor
    others: Tensor
    owners: Tensor

    def resolve(self, nearest: Tensor, position: Tensor) -> Tensor:
        """Return the nearest others (n, k) if ties count in the order of new positions (n,)."""
        n, k = nearest.shape
        order = (self.owners * n + position[self.others]).argsort()
        sizes = torch.bincount(self.owners, minlength=len(self.stimuli))
        rank = (
            torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[self.owners]
        )
        column = self.n_closer[self.owners] + rank
        kept = (column < k).nonzero()[:, 0]
        nearest = nearest.clone()
        nearest[self.stimuli[self.owners[kept]], column[kept]] = self.others[order[kept]]
        return nearest


def find_nearest(
    rows: Rows, k: int, find: Find | None = None, ties: list[Ties] | None = None
) -> Tensor:
    """Return the k nearest other stimuli of each of n, (n, k) int64.

    Distances from one stimulus tie as in `rank_distances`; tied ones count in the order of their
    indices. Bounds from float32 products choose candidates. Where the bounds leave the answer open,
    float64 distances of the candidates decide, or those of all stimuli. ``find`` replaces
    `find_candidates`. Ties for the last places are added to ``ties``.
    """
    stimuli = torch.arange(rows.n, device=rows.x.device)
    count = k + 1 + _MARGIN
    if count >= rows.n:
        return find_among_all(rows, stimuli, k, ties)
    candidates, lower, upper = (find or find_candidates)(*rows.to_float32(), count)
    lower, upper = lower.double().mul_(rows.scale), upper.double().mul_(rows.scale)
    nearest = candidates[:, :k].clone()
    stimuli = stimuli[~are_apart(rows.errors, stimuli, nearest, upper[:, :k], lower[:, k])]
    if len(stimuli):
        nearest[stimuli], known = refine(rows, stimuli, candidates[stimuli], lower[stimuli, -1], k)
        stimuli = stimuli[~known]
    if len(stimuli):
        nearest[stimuli] = find_among_all(rows, stimuli, k, ties)
    return nearest


class Rows:
    """The rows of x (n, p) as a distance compares them, in float64 and made when they are needed.

    They are relative to an origin, and of unit length for "correlation" and "cosine".
    """

    def __init__(self, x: Tensor, distance: str) -> None:
        self.x, self.origin, self.length = x, None, None
        self.has_unit_length = distance in ("correlation", "cosine")
        norm = row_norms(x).double()
        if distance == "correlation":
            self.origin = row_means(x)
        elif distance != "cosine":
            self.origin = central_row(x, norm)
        length = torch.cat([torch.linalg.vector_norm(z, dim=1) for z in self.iter_blocks()])
        if self.has_unit_length:
            self.length = length
            norm, length = norm / length, length / length
        self.energy = length.square()  # NaN for a row without a direction
        self.half_ulps = torch.finfo(x.dtype).eps / 2 * norm

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def p(self) -> int:
        return self.x.shape[1]

    def take(self, index: Tensor | slice) -> Tensor:
        """Return some of the rows (m, p)."""
        rows = self.x[index].to(torch.float64, copy=True)
        if self.origin is not None:
            rows.sub_(self.origin if len(self.origin) == 1 else self.origin[index])
        return rows if self.length is None else rows.div_(self.length[index, None])

    def iter_blocks(self) -> Iterator[Tensor]:
        for block in panels.split(self.n, max(1, memory.BLOCK // self.p)):
            yield self.take(block)

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the rows, (p,)."""
        return torch.stack([z.sum(0) for z in self.iter_blocks()]).sum(0) / self.n

    @cached_property
    def spread(self) -> Tensor:
        """Squared distances of the rows from their mean, (n,)."""
        return torch.cat([z.sub_(self.mean).square_().sum(1) for z in self.iter_blocks()])

    @cached_property
    def scale(self) -> float:
        """The largest `spread`."""
        return float(self.spread.amax())

    def have_distances(self) -> bool:
        """Whether all rows are finite and have a direction, and some distance is not 0.

        Those from the first row, up to rounding.
        """
        if not bool(self.energy.isfinite().all()):
            return False
        first, others = (torch.arange(size, device=self.x.device) for size in (1, self.n))
        squared = self.measure(first, others)[0]
        pairs = self.errors.list_pairs(squared, first.expand(self.n), others)
        return bool((squared > pairs.full_tolerance()).any())

    def to_float32(self) -> tuple[Tensor, Tensor]:
        """Return the rows relative to their mean (n, p) and their squared norms (n,).

        The largest norm is 1; only the rows are rounded to float32.
        """
        z = memory.empty_buffer(self.x, *self.x.shape, dtype=torch.float32)
        start = 0
        for rows in self.iter_blocks():
            z[start : start + len(rows)] = rows.sub_(self.mean).div_(self.scale**0.5)
            start += len(rows)
        return z, self.spread / self.scale

    def measure(self, stimuli: Tensor, others: Tensor) -> Tensor:
        """Return squared distances (R, m) in float64; those that are close from differences."""
        a, e = self.take(stimuli), self.energy[stimuli, None]
        out = a.new_empty(len(stimuli), len(others))
        for part in panels.split(len(others), max(1, memory.BLOCK // self.p)):
            b, energies = self.take(others[part]), e + self.energy[others[part]]
            d2 = torch.addmm(energies, a, b.mT, alpha=-2)
            for close in (d2 <= energies.mul_(CLOSE)).nonzero().split(max(1, _GATHER // self.p)):
                i, j = close.unbind(1)
                d2[i, j] = (a[i] - b[j]).square_().sum(1)
            out[:, part] = d2
        return out

    @cached_property
    def errors(self) -> RowErrors:
        """The errors of their distances in float64."""
        return RowErrors(
            self.energy,
            self.half_ulps,
            bound_rounding(self.p),
            SCALING_ERROR if self.has_unit_length else 0.0,
            self.x.dtype == torch.float64,
        )

    def multiply_centred(self, indices: Tensor) -> Tensor:
        """Return the products of each row with others (n, k), which are relative to the mean."""
        products = []
        for block in panels.split(self.n, max(1, _GATHER // (indices.shape[1] * self.p))):
            near = indices[block]
            others = self.take(near.flatten()).sub_(self.mean).unflatten(0, near.shape)
            products.append((others @ self.take(block)[..., None])[..., 0])
        return torch.cat(products)


def find_candidates(z: Tensor, energy: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the other stimuli with the smallest lower bounds of their squared distances.

    Parameters
    ----------
    z : tensor, (n, p), float32
        The rows, of at most unit length.
    energy : tensor, (n,), float64
        Their squared norms before they were rounded to float32.
    count : int
        Number of candidates, below n.

    Returns
    -------
    indices : tensor, (n, count), int64
    lower, upper : tensors, (n, count), float32
        Bounds of their squared distances. The lower bounds ascend, so the squared distances of all
        stimuli that are not among the candidates are no smaller than the last of them.
    """
    n, p = z.shape
    # Errors of a float32 sum of p products, and of what is done to it, relative to both energies.
    slack = (min(p, BLAS_CHUNK) + p / BLAS_CHUNK + 32) * 2.0**-24
    tiny = 2 * p * torch.finfo(torch.float32).tiny
    low = (energy * (1 - slack) - tiny).to(torch.float32)
    bounds = torch.full((n, count), torch.inf, device=z.device)
    indices = torch.zeros(n, count, dtype=torch.int64, device=z.device)

    def merge(rows: slice, columns: slice, tile: Tensor) -> None:
        values, at = tile.topk(min(count, tile.shape[1]), largest=False, sorted=False)
        values = torch.cat([bounds[rows], values], 1)
        at = torch.cat([indices[rows], at + columns.start], 1)
        bounds[rows], kept = values.topk(count, largest=False)
        indices[rows] = at.gather(1, kept)

    tiles = list(panels.split(n, _TILE))
    for i, rows in enumerate(tiles):
        for columns in tiles[i:]:
            tile = torch.addmm(low[columns], z[rows], z[columns].mT, alpha=-2)
            tile.add_(low[rows, None])
            if rows == columns:
                tile.fill_diagonal_(torch.inf)
            else:
                merge(columns, rows, tile.mT)
            merge(rows, columns, tile)
    widths = 2 * slack * (energy[:, None] + energy[indices]) + 2 * tiny
    return indices, bounds, bounds + widths.to(torch.float32)


def refine(
    rows: Rows, stimuli: Tensor, candidates: Tensor, bound: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k nearest of the candidates (R, c) of some stimuli, and whether they are right.

    The squared distances of all stimuli that are not candidates are at least ``bound`` (R,).
    """
    nearest, known = [], []
    for block in panels.split(len(stimuli), max(1, _GATHER // (candidates.shape[1] * rows.p))):
        others = rows.take(candidates[block].flatten()).unflatten(0, candidates[block].shape)
        d2 = others.sub_(rows.take(stimuli[block])[:, None]).square_().sum(2)
        values, order = d2.sort(1)
        near, limit = candidates[block].gather(1, order), bound[block]
        nearest.append(near[:, :k])
        following = torch.minimum(values[:, k], limit)
        is_known = are_apart(rows.errors, stimuli[block], near[:, :k], values[:, :k], following)
        if rows.x.dtype != torch.float64:
            is_known |= are_untied(rows, stimuli[block], near, values, limit, k)
        known.append(is_known)
    return torch.cat(nearest), torch.cat(known)


def are_apart(
    errors: RowErrors, stimuli: Tensor, nearest: Tensor, upper: Tensor, following: Tensor
) -> Tensor:
    """Return for which stimuli (R,) the nearest others are closer than the rest by more than a tie.

    ``upper`` (R, k) are upper bounds of the squared distances of the nearest, ``following`` (R,)
    lower bounds of all others.
    """
    first = stimuli.repeat_interleave(nearest.shape[1])
    pairs = errors.list_pairs(upper.flatten(), first, nearest.flatten())
    last = upper.amax(1)
    apart = following - last > MIN_GAP * pairs.tolerance().view_as(upper).amax(1)
    if not pairs.input_is_float64:
        shift = pairs.twice_input_shift().view_as(upper).amax(1)
        apart &= following.clamp(min=0).sqrt() - last.sqrt() > MIN_GAP * shift
    return apart


def are_untied(
    rows: Rows, stimuli: Tensor, others: Tensor, d2: Tensor, bound: Tensor, k: int
) -> Tensor:
    """Return for which stimuli (R,) others at ascending distances are in a group too wide to tie.

    The k-th and the next squared distance of ``d2`` (R, c) must differ by more than the rounding of
    float64, and the distances around them, up to ``bound`` (R,), be close enough for one group.
    """
    first = stimuli.repeat_interleave(d2.shape[1])
    pairs = rows.errors.list_pairs(d2.flatten(), first, others.flatten())
    tolerance = pairs.tolerance().view_as(d2).amax(1)
    shift, distance = pairs.twice_input_shift().view_as(d2), d2.sqrt()
    in_group = distance.diff() <= MIN_GAP * shift.amin(1, keepdim=True)
    in_group &= d2[:, 1:] < bound[:, None]
    below = in_group[:, : k - 1].flip(1).long().cumprod(1).sum(1, keepdim=True)
    above = in_group[:, k - 1 :].long().cumprod(1).sum(1, keepdim=True)
    width = distance.gather(1, k - 1 + above) - distance.gather(1, k - 1 - below)
    is_distinct = d2[:, k] - d2[:, k - 1] > MIN_GAP * tolerance
    return is_distinct & (above[:, 0] > 0) & (width[:, 0] > shift.amax(1))


def find_among_all(rows: Rows, stimuli: Tensor, k: int, ties: list[Ties] | None = None) -> Tensor:
    """Return the k nearest of all other stimuli for some of them, (R, k); add to ``ties``."""
    columns, index = torch.arange(rows.n, device=rows.x.device), None
    try:
        check_distinct(rows.x)
    except EqualRows as equal:
        columns, index = equal.args
    nearest = []
    for block in stimuli.split(max(1, memory.BLOCK // max(rows.n, rows.p))):
        squared = rows.measure(block, columns)
        for part in panels.split(len(block), max(1, _SORTED // rows.n)):
            d2 = squared[part] if index is None else squared[part, index]
            order, groups = order_by_distance(rows.errors, block[part], d2)
            nearest.append(order[:, :k])
            if ties is not None and k < order.shape[1]:
                ties.append(_list_ties(block[part], order, groups, k))
    return torch.cat(nearest)


def order_by_distance(
    errors: RowErrors, stimuli: Tensor, d2: Tensor, starts: Tensor | int = 0
) -> tuple[Tensor, Tensor]:
    """Return all others by distance and then by index, (R, n - 1), and numbers of groups that tie.

    ``d2`` (R, n) are the squared distances of the stimuli (R,) from all n, which are numbered from
    ``starts`` (R, 1) where the rows of ``errors`` are those of several representations.
    """
    count, n = d2.shape
    numbers = torch.arange(count, device=d2.device)
    others = torch.arange(n, device=d2.device) + starts
    d2.scatter_(1, stimuli[:, None] - starts, torch.inf)  # sorted to the end, and left out there
    pairs = errors.list_pairs(
        d2.flatten(), stimuli.repeat_interleave(n), others.expand(count, n).flatten()
    )
    # NumPy sorts with vector instructions.
    xp: Any = torch if d2.is_cuda else np
    order = torch.as_tensor(xp.asarray(d2).argsort(1))[:, :-1]
    positions = (order + numbers[:, None] * n).flatten()
    tied = torch.as_tensor(find_ties(xp, pairs, xp.asarray(positions), n - 1))
    groups = (~tied[:-1]).cumsum(0).view(count, n - 1)
    ranks = (groups * n + order).sort(1).values
    return ranks % n, ranks // n


def _list_ties(stimuli: Tensor, order: Tensor, groups: Tensor, k: int) -> Ties:
    """Return the ties for the last of k places, from `order_by_distance`."""
    last = groups[:, k - 1 : k]
    has_ties = (groups[:, k : k + 1] == last)[:, 0]
    groups, order, last = groups[has_ties], order[has_ties], last[has_ties]
    owners, columns = (groups == last).nonzero(as_tuple=True)
    n_closer = (groups < last).sum(1)
    return Ties(stimuli[has_ties], n_closer, order[owners, columns], owners)


def join_ties(ties: list[Ties]) -> Ties | None:
    """Return all ties as one, or None if there are none."""
    ties = [part for part in ties if len(part.stimuli)]
    if not ties:
        return None
    starts = np.cumsum([0, *(len(part.stimuli) for part in ties)]).tolist()
    owners = [part.owners + start for part, start in zip(ties, starts, strict=False)]
    stimuli, n_closer, others = (torch.cat([part[i] for part in ties]) for i in range(3))
    return Ties(stimuli, n_closer, others, torch.cat(owners))
