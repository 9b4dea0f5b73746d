"""Distances between the stimuli of a representation, with bounds on their rounding errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory, panels

_EPS = torch.finfo(torch.float64).eps
# A squared distance below this share of the squared norms that cancel in it is recomputed from the
# features: the first share for float64 products, the second for float32.
CLOSE, _CLOSE_FLOAT32 = 1e-6, 1e-2
SCALING_ERROR = 8 * _EPS  # how far rounding moves a row that is scaled to unit length
_GATHER_SIZE = 2**20  # elements of features gathered together
_MIN_NORM = 1e-15  # above it, float32 holds the squares of a norm with most of their digits
_SAMPLE = 8  # neurons that distinguish most pairs of different stimuli
BLAS_CHUNK = 512  # most products that a BLAS adds to one sum in sequence


@dataclass(frozen=True)
class PairDistances:
    """Squared distances of all pairs of n stimuli, in the order of SciPy's ``pdist``.

    For "correlation" and "cosine" they are between rows of unit length: twice SciPy's distances.
    """

    squared: Tensor  # (n(n - 1)/2,)
    energy: Tensor  # (n,) squared norms of the rows that were multiplied
    half_ulps: Tensor  # (n,) bound on how far half an ulp of each input entry moves a row
    rounding: float  # relative error of a product of two rows
    scaling_error: float  # how far rounding moved each row when it was scaled to unit length
    input_is_float64: bool

    def tolerance(self, pairs: Tensor | None = None) -> Tensor:
        """Return how far float64 arithmetic may separate equal squared distances.

        For the given pairs or all of them: twice the error of one distance. If the input is float64
        too, this includes half an ulp of each input entry.
        """
        return self._tolerance(pairs, with_input=self.input_is_float64)

    def full_tolerance(self, pairs: Tensor | None = None) -> Tensor:
        """Return `tolerance`, always including half an ulp of each input entry."""
        return self._tolerance(pairs, with_input=True)

    def _tolerance(self, pairs: Tensor | None, with_input: bool) -> Tensor:
        i, j = self._row_indices(pairs)
        d2 = self.squared if pairs is None else self.squared[pairs]
        energies = self.energy[i] + self.energy[j]
        error = self.rounding * torch.where(d2 <= CLOSE * energies, d2, energies)
        shift = self.half_ulps[i] + self.half_ulps[j] if with_input else torch.zeros_like(d2)
        shift += 2 * self.scaling_error
        return 2 * (error + (2 * d2.sqrt() + shift) * shift)

    def twice_input_shift(self, pairs: Tensor | None = None) -> Tensor:
        """Return twice the distance by which half an ulp of each input entry moves both rows."""
        i, j = self._row_indices(pairs)
        return 2 * (self.half_ulps[i] + self.half_ulps[j])

    def _row_indices(self, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the row numbers of the given pairs, or of all."""
        n, device = len(self.energy), self.energy.device
        if pairs is None:
            i, j = torch.triu_indices(n, n, 1, device=device)
            return i, j
        ends = torch.arange(n - 1, -1, -1, device=device).cumsum(0)  # of the triangle's rows
        i = torch.searchsorted(ends, pairs, right=True)
        return i, pairs - ends[i] + n

    def largest_tolerance(self, max_squared: float) -> float:
        """Return an upper bound of every `tolerance`, given the largest squared distance."""
        half_ulp = float(self.half_ulps.amax()) if self.input_is_float64 else 0.0
        shift = 2 * (self.scaling_error + half_ulp)
        error = 2 * self.rounding * float(self.energy.amax())
        return 2 * (error + (2 * math.sqrt(max_squared) + shift) * shift)


@dataclass(frozen=True)
class ListedDistances(PairDistances):
    """Squared distances of listed pairs of n stimuli."""

    first: Tensor  # index of the first stimulus of each pair
    second: Tensor

    def _row_indices(self, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
        return (
            (self.first, self.second) if pairs is None else (self.first[pairs], self.second[pairs])
        )


@dataclass(frozen=True)
class RowErrors:
    """Bounds on the rounding errors of distances between rows, as in `PairDistances`.

    The m rows may be those of several representations, one after the other.
    """

    energy: Tensor  # (m,)
    half_ulps: Tensor  # (m,)
    rounding: float
    scaling_error: float
    input_is_float64: bool

    def list_pairs(self, squared: Tensor, first: Tensor, second: Tensor) -> ListedDistances:
        """Return squared distances of pairs of rows (N,) with these errors."""
        return ListedDistances(
            squared,
            self.energy,
            self.half_ulps,
            self.rounding,
            self.scaling_error,
            self.input_is_float64,
            first,
            second,
        )


class Workspace:
    """Memory and indices that representations of the same stimuli use one after the other.

    Allocating them for each representation costs as much as the work in them.
    """

    def __init__(self, xs: Sequence[Tensor]) -> None:
        """``xs`` are all representations (n, p_i)."""
        self.block = panels.block_buffer(xs)
        self.packed = panels.empty_panels(xs[0], len(xs[0]))

    @cached_property
    def pairs(self) -> Tensor:
        """Memory for the squared distances of all pairs."""
        n = self.packed[0][1].shape[0]
        return memory.empty_buffer(self.block, n * (n - 1) // 2, dtype=torch.float64)

    @cached_property
    def positions(self) -> list[Tensor]:
        """The entries below the diagonal in each flattened panel, in the order of ``pdist``."""
        positions = []
        for _, panel in self.packed:
            # A column below the diagonal is a row of the upper triangle.
            i, j = _upper_mask(panel.mT).nonzero().unbind(1)
            positions.append((j * panel.shape[1] + i).to(torch.int32))
        return positions


def pair_distances(x: Tensor, distance: str, space: Workspace | None = None) -> PairDistances:
    """Return the squared distances between the rows of x (n, p).

    They are valid until ``space`` is used again. Equal rows are computed once, so that their
    distances from the other rows are bit-identical.
    """
    try:
        return _pair_distances(x, distance, space or Workspace([x]), distinct=False)
    except EqualRows as equal:
        first, index = equal.args
    unique = _pair_distances(x[first], distance, Workspace([x[first]]), distinct=True)
    square = x.new_zeros(len(first), len(first), dtype=torch.float64)
    square[_upper_mask(square)] = unique.squared
    square = (square + square.mT)[index[:, None], index]
    return replace(
        unique,
        squared=square[_upper_mask(square)],
        energy=unique.energy[index],
        half_ulps=unique.half_ulps[index],
    )


class EqualRows(Exception):
    """Some rows are equal; holds the first row of each distinct value, and every row's value."""


def _upper_mask(square: Tensor) -> Tensor:
    return torch.ones_like(square, dtype=torch.bool).triu_(1)


def _pair_distances(x: Tensor, distance: str, space: Workspace, distinct: bool) -> PairDistances:
    p, unit = x.shape[1], distance in ("correlation", "cosine")
    if distance == "correlation":
        origin = row_means(x)
        packed, energy, length = squared_distances(x, origin, unit, space, distinct)
        norm = (length.square() + p * origin[:, 0].square()).sqrt() / length
    elif distance == "cosine":
        packed, energy, length = squared_distances(x, None, unit, space, distinct)
        norm = length / length
    else:
        norm = row_norms(x)
        packed, energy, _ = squared_distances(x, central_row(x, norm), False, space, distinct)
    parts = space.pairs.split([len(positions) for positions in space.positions])
    for (_, panel), positions, part in zip(packed, space.positions, parts, strict=True):
        torch.index_select(panel.flatten(), 0, positions, out=part)
    return PairDistances(
        space.pairs,
        energy,
        torch.finfo(x.dtype).eps / 2 * norm.double(),
        bound_rounding(p),
        SCALING_ERROR if unit else 0.0,
        x.dtype == torch.float64,
    )


def bound_rounding(p: int) -> float:
    """Return the relative error of a float64 product of two rows of p neurons."""
    return (8 + (min(p, BLAS_CHUNK) + p / BLAS_CHUNK) / 4) * _EPS


def squared_distances(
    x: Tensor,
    origin: Tensor | None,
    unit: bool = False,
    space: Workspace | None = None,
    distinct: bool = True,
) -> tuple[panels.Panels, Tensor, Tensor]:
    """Return squared distances between the rows of x (n, p), packed (n, n).

    Rows are taken relative to a common origin (1, p) or to one offset per row (n, 1). ``unit`` then
    scales them to unit length; a zero row becomes NaN. Also returns their squared norms after that
    scaling and their lengths before it, (n,) each.

    Raises EqualRows if rows are equal, unless the caller knows that they are ``distinct``.
    """
    n, p = x.shape
    space = space or Workspace([x])
    packed = space.packed
    for block in panels.split_neurons(p, n):
        width = block.stop - block.start
        z = space.block[: n * width].view(n, width).copy_(x[:, block])
        if origin is not None:
            z.sub_(origin if origin.shape[1] == 1 else origin[:, block])
        panels.add_product(packed, z, first=block.start == 0)
    energy = panels.diagonal(packed)
    length = energy.sqrt()
    if unit:
        energy = energy / energy
    for columns, panel in packed:
        energies = energy[columns.start :, None] + energy[columns]
        if unit:
            panel.div_(length[columns.start :, None]).div_(length[columns])
        torch.sub(energies, panel, alpha=2, out=panel)
        for entries in _iter_below_diagonal(panel <= energies.mul_(CLOSE), p):
            if not distinct:  # only rows that are close can be equal
                check_distinct(x)
                distinct = True
            i, j = (columns.start + k for k in entries)
            a, b = x[i].to(torch.float64), x[j].to(torch.float64)
            for z, k in ((a, i), (b, j)) if unit else ():
                z.sub_(0 if origin is None else origin[k]).div_(length[k, None])
            panel[entries] = a.sub_(b).square_().sum(1)
    return packed, energy, length


def _iter_below_diagonal(mask: Tensor, p: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the indices of true entries below the diagonal, in batches that suit p neurons."""
    if bool(mask.tril_(-1).any()):  # rarely, and faster than `nonzero`
        for batch in mask.nonzero().split(max(1, _GATHER_SIZE // p)):
            yield batch.unbind(1)


def rbf_kernel(x: Tensor, sigma: float) -> Tensor:
    """Return the RBF kernel of x (…, n, p): (…, n, n)."""
    if x.ndim > 2:
        return torch.stack([rbf_kernel(item, sigma) for item in x])
    packed = squared_distances(x, central_row(x, row_norms(x)))[0]
    return rbf(panels.unpack(packed), sigma)


def rbf_from_gram(g: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Return the RBF kernel of x (…, n, p) from its Gram matrix of float32 products: (…, n, n)."""
    energy = g.diagonal(dim1=-2, dim2=-1)
    energies = energy[..., :, None] + energy[..., None, :]
    d2 = (energies - 2 * g).tril_(-1)
    for entries in _iter_below_diagonal(d2 <= _CLOSE_FLOAT32 * energies, x.shape[-1]):
        *lead, i, j = entries
        a, b = (x[*lead, k].to(torch.float64) for k in (i, j))
        d2[entries] = a.sub_(b).square_().sum(1)
    return rbf(d2 + d2.mT, sigma)


def rbf(d2: Tensor, sigma: float) -> Tensor:
    """Apply the kernel to squared distances (…, n, n): symmetric, not negative, 0 on the diagonal.

    The squared bandwidth is sigma² times the median of all n² squared distances, zeros included.
    """
    low, high = middle_distances(d2)
    return torch.exp(-d2 / ((low + high)[..., None, None] * sigma**2))


def middle_distances(d2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two values (…) whose mean is the median of all n² squared distances (…, n, n)."""
    n = d2.shape[-1]
    i, j = torch.triu_indices(n, n, 1, device=d2.device)
    values = d2.flatten(-2).index_select(-1, i * n + j)
    # In ascending order come the n zeros of the diagonal, and then every distance twice.
    middle = [max(0, k - n + 1) // 2 for k in ((n * n + 1) // 2, n * n // 2 + 1)]
    low, high = (_select_kth(values, k) if k else values.new_zeros(()) for k in middle)
    return low, high


def _select_kth(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest, from 1, of the last dimension of values."""
    if values.device.type != "cpu":
        return values.kthvalue(k, dim=-1).values
    # NumPy selects with vector instructions.
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=-1)[..., k - 1])


def row_norms(x: Tensor) -> Tensor:
    """Return the norms of the rows of x (n, p), (n,), in float32 where that is accurate."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    if dtype == torch.float64:
        return norm
    # float32 can't hold squares that are too small or too large.
    inaccurate = (~(norm > _MIN_NORM) | norm.isinf()).nonzero()[:, 0]
    if len(inaccurate):
        norm = norm.double()
        norm[inaccurate] = torch.linalg.vector_norm(x[inaccurate], dim=1, dtype=torch.float64)
    return norm


def central_row(x: Tensor, norm: Tensor) -> Tensor:
    """Return the row of x with the median norm (1, p), float64.

    It is no outlier, and integers minus it stay integers.
    """
    return x[norm.median(0).indices][None].to(torch.float64)


def row_means(x: Tensor) -> Tensor:
    """Return the mean of each row of x (n, p), (n, 1); exact for a constant row."""
    n, p = x.shape
    first = x[:, :1].to(torch.float64)
    sums = [(x[:, block] - first).sum(1, keepdim=True) for block in panels.split_neurons(p, n)]
    return first + torch.stack(sums).sum(0) / p


def check_distinct(x: Tensor) -> None:
    """Raise EqualRows if rows of x (n, p) are equal.

    A few neurons rule out most pairs of rows; whole rows are hashed and compared only where these
    neurons agree.
    """
    n, p = x.shape
    columns = torch.arange(_SAMPLE, device=x.device) * p // _SAMPLE
    keys = _hash(x[:, columns], mixed=False)
    _, group, counts = keys.unique(return_inverse=True, return_counts=True)
    repeated = (counts[group] > 1).nonzero()[:, 0]
    rows = x[repeated]
    _, group = _hash(rows).unique(return_inverse=True)
    leader = torch.full_like(repeated, n).scatter_reduce(0, group, repeated, "amin")[group]
    same = (rows == x[leader]).all(1)  # different rows may have equal hashes
    equals = torch.arange(n, device=x.device)
    equals[repeated[same]] = leader[same]
    first, index = equals.unique(return_inverse=True)
    if len(first) < n:
        raise EqualRows(first, index)


def _hash(rows: Tensor, mixed: bool = True) -> Tensor:
    """Hash each row (m, k) to an integer that does not depend on the row's position.

    Integer sums make it exact. With ``mixed``, different rows almost never have equal hashes.
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = (rows + 0).view(words).to(torch.int64)  # -0 + 0 is 0
    weights = torch.arange(1, 2 * rows.shape[1], 2, device=rows.device) * -7046029254386353131
    if mixed:
        bits = bits ^ (bits >> 29)
    bits = bits * weights
    return (bits ^ (bits >> 32) if mixed else bits).sum(1)
