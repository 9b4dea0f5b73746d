"""Distances between the stimuli of a representation, and how far rounding may have moved each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import panels

_EPS = torch.finfo(torch.float64).eps
# Below this share of the squared norms that cancel in it, a distance is taken from the features;
# and the same where products are of float32.
_CLOSE, _CLOSE_FLOAT32 = 1e-6, 1e-2
_GATHERED = 2**20  # elements of features gathered at a time
_SMALL = 1e-15  # of a norm whose squares float32 holds with most of their digits
_SAMPLE = 8  # neurons that tell most different stimuli apart
_SUMMED = 512  # products that a BLAS adds to one sum in a row, at most


@dataclass(frozen=True)
class Distances:
    """Squared distances of all pairs of n stimuli, in the order of SciPy's ``pdist``.

    For "correlation" and "cosine", between rows of unit length: twice SciPy's distances.
    """

    squared: Tensor  # (n(n - 1)/2,)
    energy: Tensor  # (n,) squared norms of the rows that were multiplied
    half_ulps: Tensor  # (n,) how far half an ulp of each input entry moves a row, at most
    rounding: float  # relative error of a product of two rows
    scaled: float  # how far rounding moved each row when it was scaled to unit length
    input_is_float64: bool

    def tolerance(self, pairs: Tensor | None = None) -> Tensor:
        """How far apart float64 arithmetic may leave squared distances that are equal in truth.

        For some of the pairs, or all: twice the error of one distance. Includes half an ulp of each
        input entry where that is of float64 as well.
        """
        return self._tolerance(pairs, with_input=self.input_is_float64)

    def full_tolerance(self, pairs: Tensor) -> Tensor:
        """The same, always with half an ulp of each input entry."""
        return self._tolerance(pairs, with_input=True)

    def _tolerance(self, pairs: Tensor | None, with_input: bool) -> Tensor:
        i, j = self._rows(pairs)
        d2 = self.squared if pairs is None else self.squared[pairs]
        both = self.energy[i] + self.energy[j]
        error = self.rounding * torch.where(d2 <= _CLOSE * both, d2, both)
        moved = self.half_ulps[i] + self.half_ulps[j] if with_input else torch.zeros_like(d2)
        moved += 2 * self.scaled
        return 2 * (error + (2 * d2.sqrt() + moved) * moved)

    def twice_moved(self, pairs: Tensor | None = None) -> Tensor:
        """Twice what half an ulp of each input entry moves the rows of some pairs, or of all."""
        i, j = self._rows(pairs)
        return 2 * (self.half_ulps[i] + self.half_ulps[j])

    def _rows(self, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of some pairs, or of all."""
        n, device = len(self.energy), self.energy.device
        if pairs is None:
            i, j = torch.triu_indices(n, n, 1, device=device)
            return i, j
        ends = torch.arange(n - 1, -1, -1, device=device).cumsum(0)  # rows of the triangle
        i = torch.searchsorted(ends, pairs, right=True)
        return i, pairs - ends[i] + n

    def largest_tolerance(self, largest: float) -> float:
        """An upper bound of every `tolerance`, given the largest squared distance."""
        half_ulp = float(self.half_ulps.amax()) if self.input_is_float64 else 0.0
        moved = 2 * (self.scaled + half_ulp)
        error = 2 * self.rounding * float(self.energy.amax())
        return 2 * (error + (2 * math.sqrt(largest) + moved) * moved)


def pair_distances(x: Tensor, distance: str, room: Tensor | None = None) -> Distances:
    """The squared distances between the rows of x (n, p), by way of `panels.block_buffer`.

    Rows that are equal count as one, so that their distances from the others are equal to the bit.
    """
    try:
        return _pair_distances(x, distance, room, distinct=False)
    except _EqualRows as equal:
        first, index = equal.args
    found = _pair_distances(x[first], distance, room, distinct=True)
    square = x.new_zeros(len(first), len(first), dtype=torch.float64)
    square[_upper(square)] = found.squared
    square = (square + square.mT)[index[:, None], index]
    return replace(
        found,
        squared=square[_upper(square)],
        energy=found.energy[index],
        half_ulps=found.half_ulps[index],
    )


class _EqualRows(Exception):
    """Some rows are equal: the first of each set, and the set of every row."""


def _upper(square: Tensor) -> Tensor:
    return torch.ones_like(square, dtype=torch.bool).triu_(1)


def _pair_distances(x: Tensor, distance: str, room: Tensor | None, distinct: bool) -> Distances:
    p, unit = x.shape[1], distance in ("correlation", "cosine")
    if distance == "correlation":
        origin = _row_means(x)
        half, energy, length = squared_distances(x, origin, unit, room, distinct)
        norm = (length.square() + p * origin[:, 0].square()).sqrt() / length
    elif distance == "cosine":
        half, energy, length = squared_distances(x, None, unit, room, distinct)
        norm = length / length
    else:
        norm = row_norms(x)
        half, energy, _ = squared_distances(x, central_row(x, norm), False, room, distinct)
    return Distances(
        # A column from below the diagonal down is a row of the upper triangle.
        torch.cat([panel.mT[_upper(panel.mT)] for _, panel in half]),
        energy,
        torch.finfo(x.dtype).eps / 2 * norm.double(),
        (8 + (min(p, _SUMMED) + p / _SUMMED) / 4) * _EPS,
        8 * _EPS if unit else 0.0,
        x.dtype == torch.float64,
    )


def squared_distances(
    x: Tensor,
    origin: Tensor | None,
    unit: bool = False,
    room: Tensor | None = None,
    distinct: bool = True,
) -> tuple[panels.Panels, Tensor, Tensor]:
    """Squared distances between the rows of x (n, p), as a half of (n, n).

    The rows are taken relative to an origin (1, p), or each to its own (n, 1); for `unit` they are
    then scaled to unit length, which gives NaN for a row without a direction. Also returns their
    squared norms after that, and their lengths before, (n,) each.

    Raises _EqualRows if some rows are equal, unless they are taken as ``distinct``.
    """
    n, p = x.shape
    half, room = panels.empty_panels(x, n), panels.block_buffer([x]) if room is None else room
    for block in panels.blocks(p, n):
        width = block.stop - block.start
        z = room[: n * width].view(n, width).copy_(x[:, block])
        if origin is not None:
            z.sub_(origin if origin.shape[1] == 1 else origin[:, block])
        panels.add_product(half, z, first=block.start == 0)
    energy = panels.diagonal(half)
    length = energy.sqrt()
    if unit:
        energy = energy / energy
    for own, panel in half:
        both = energy[own.start :, None] + energy[own]
        if unit:
            panel.div_(length[own.start :, None]).div_(length[own])
        torch.sub(both, panel, alpha=2, out=panel)
        for some in _close(panel <= _CLOSE * both, p):
            if not distinct:  # only rows that are close may be equal
                check_distinct(x)
                distinct = True
            i, j = (own.start + k for k in some)
            a, b = x[i].to(torch.float64), x[j].to(torch.float64)
            for z, k in ((a, i), (b, j)) if unit else ():
                z.sub_(0 if origin is None else origin[k]).div_(length[k, None])
            panel[some] = a.sub_(b).square_().sum(1)
    return half, energy, length


def _close(close: Tensor, p: int) -> Iterator[tuple[Tensor, ...]]:
    """Indices of the true entries below the diagonals, as many at a time as fit with p neurons."""
    found = close.tril_(-1).nonzero()
    for some in found.split(max(1, _GATHERED // p)) if len(found) else ():
        yield some.unbind(1)


def rbf(x: Tensor, sigma: float) -> Tensor:
    """The RBF kernel of x (…, n, p): (…, n, n)."""
    if x.ndim > 2:
        return torch.stack([rbf(item, sigma) for item in x])
    half = squared_distances(x, central_row(x, row_norms(x)))[0]
    return _rbf(panels.unpack(half), sigma)


def rbf_from_gram(g: Tensor, x: Tensor, sigma: float) -> Tensor:
    """The RBF kernel of x (…, n, p) from its Gram matrix, of float32 products: (…, n, n)."""
    energy = g.diagonal(dim1=-2, dim2=-1)
    both = energy[..., :, None] + energy[..., None, :]
    d2 = (both - 2 * g).tril_(-1)
    for some in _close(d2 <= _CLOSE_FLOAT32 * both, x.shape[-1]):
        *lead, i, j = some
        a, b = (x[*lead, k].to(torch.float64) for k in (i, j))
        d2[some] = a.sub_(b).square_().sum(1)
    return _rbf(d2 + d2.mT, sigma)


def _rbf(d2: Tensor, sigma: float) -> Tensor:
    """The squared bandwidth is sigma² times the median of all n² squared distances, zeros too."""
    values = d2.flatten(-2)
    middle = values.shape[-1]
    low, high = (values.kthvalue(k, dim=-1).values for k in ((middle + 1) // 2, middle // 2 + 1))
    return torch.exp(-d2 / ((low + high)[..., None, None] * sigma**2))


def row_norms(x: Tensor) -> Tensor:
    """The norm of each row of x (n, p), at the speed of its dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    # Squares that float32 does not hold.
    lost = (~(norm > _SMALL) | norm.isinf()).nonzero()[:, 0] if dtype == torch.float32 else []
    if len(lost):
        norm = norm.double()
        norm[lost] = torch.linalg.vector_norm(x[lost], dim=1, dtype=torch.float64)
    return norm


def central_row(x: Tensor, norm: Tensor) -> Tensor:
    """The row of x with the median norm (1, p), float64: no outlier, and integers stay integers."""
    return x[norm.median(0).indices][None].to(torch.float64)


def _row_means(x: Tensor) -> Tensor:
    """The mean of each row of x (n, p): (n, 1), exact where the row is constant."""
    n, p = x.shape
    first = x[:, :1].to(torch.float64)
    parts = [(x[:, block] - first).sum(1, keepdim=True) for block in panels.blocks(p, n)]
    return first + torch.stack(parts).sum(0) / p


def check_distinct(x: Tensor) -> None:
    """Raise _EqualRows if some rows of x (n, p) are equal; a few neurons tell most rows apart."""
    n, p = x.shape
    columns = torch.arange(_SAMPLE, device=x.device) * p // _SAMPLE
    keys = _hash(x[:, columns], mixed=False)
    _, group, counts = keys.unique(return_inverse=True, return_counts=True)
    repeated = (counts[group] > 1).nonzero()[:, 0]
    rows = x[repeated]
    _, group = _hash(rows).unique(return_inverse=True)
    leader = torch.full_like(repeated, n).scatter_reduce(0, group, repeated, "amin")[group]
    same = (rows == x[leader]).all(1)  # equal hashes are no proof
    equals = torch.arange(n, device=x.device)
    equals[repeated[same]] = leader[same]
    first, index = equals.unique(return_inverse=True)
    if len(first) < n:
        raise _EqualRows(first, index)


def _hash(rows: Tensor, mixed: bool = True) -> Tensor:
    """A number for each row (m, k), from sums of integers: the same wherever the row stands.

    Mixed, different rows have different numbers but by an unlikely accident.
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = (rows + 0).view(words).to(torch.int64)  # -0 + 0 is 0
    weights = torch.arange(1, 2 * rows.shape[1], 2, device=rows.device) * -7046029254386353131
    if mixed:
        bits = bits ^ (bits >> 29)
    bits = bits * weights
    return (bits ^ (bits >> 32) if mixed else bits).sum(1)
