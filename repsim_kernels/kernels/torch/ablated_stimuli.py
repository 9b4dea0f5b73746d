"""Distances between the stimuli of ablated copies, from the Gram matrices of the cells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import mark_members
from repsim_kernels._routes import Route
from repsim_kernels.kernels.torch.ablation_parts import CellParts, GramParts
from repsim_kernels.kernels.torch.distances import (
    BLAS_CHUNK,
    CLOSE,
    SCALING_ERROR,
    EqualRows,
    RowErrors,
    bound_rounding,
    check_distinct,
    pair_distances,
)
from repsim_kernels.kernels.torch.raw_statistics import (
    RawStatistics,
    raw_statistics,
    raw_statistics_of_all,
)

_EPS = torch.finfo(torch.float64).eps
# Sums that an ablated Gram is the difference of, each with the rounding of one product.
_SUMS = 4
_GATHER_SIZE = 2**20  # elements of x gathered together


@dataclass
class StimulusDistances:
    """Squared distances between the n stimuli of B ablated copies.

    For "correlation" and "cosine" they are between rows of unit length, and NaN in a copy that has
    a row without a direction.
    """

    squared: Tensor  # (B, n, n), exactly 0 on the diagonal and between equal rows
    energy: Tensor  # (B, n), as in `RowErrors`
    half_ulps: Tensor  # (B, n)
    routes: np.ndarray  # (B,), the `Route` of each copy
    rounding: float
    scaling_error: float
    input_is_float64: bool

    @property
    def errors(self) -> RowErrors:
        """The errors of the B n rows, those of one copy after the other."""
        return RowErrors(
            self.energy.flatten(),
            self.half_ulps.flatten(),
            self.rounding,
            self.scaling_error,
            self.input_is_float64,
        )

    def select(self, copies: list[int]) -> StimulusDistances:
        """Return those of some copies."""
        if len(copies) == len(self.squared):
            return self
        return dataclasses.replace(
            self,
            squared=self.squared[copies],
            energy=self.energy[copies],
            half_ulps=self.half_ulps[copies],
            routes=self.routes[copies],
        )

    def find_defined(self) -> list[int]:
        """Return the copies in which every row has a direction."""
        if self.scaling_error == 0:
            return list(range(len(self.squared)))
        is_nan = self.squared.diagonal(1, 1, 2).isnan().any(1)
        return [i for i, flag in enumerate(is_nan.tolist()) if not flag]


class GramStimuli:
    """The stimuli of a representation and its ablations of which only Gram matrices are known."""

    def __init__(self, parts: GramParts) -> None:
        self.parts, self.energy = parts, parts.whole.diagonal()

    def active(self, distance: str) -> list[int]:
        """Return the parts whose ablation changes distances and leaves some."""
        return self.parts.active

    def measure(self, distance: str, cells: list[int] | None) -> StimulusDistances:
        """Return the distances without each of some cells, or for None those of the original."""
        gram = self._remaining(cells)
        energy = self.energy.expand(len(gram), -1)
        squared = _squared_distances(gram)
        # Rounding hides whether closer rows are equal.
        squared.masked_fill_(squared <= _SUMS * bound_rounding(BLAS_CHUNK) * _pair_sums(energy), 0)
        squared.diagonal(dim1=1, dim2=2).zero_()
        return StimulusDistances(
            squared,
            energy,
            _EPS / 2 * energy.sqrt(),
            np.full(len(gram), Route.SUMS),
            _SUMS * bound_rounding(BLAS_CHUNK),
            0.0,
            input_is_float64=True,
        )

    def _remaining(self, cells: list[int] | None) -> Tensor:
        """Return new Gram matrices (B, n, n) of the remaining neurons."""
        whole = self.parts.whole
        return whole[None].clone() if cells is None else whole - self.parts.unpack(cells)


class Whole(NamedTuple):
    """What the ablations of one x have in common."""

    raw: RawStatistics  # of all neurons, as of one cell
    same: Tensor | None  # which rows are equal, (n, n), or None if none are


class CellStimuli(GramStimuli):
    """The stimuli of x (n, p) and of its ablated copies.

    What Gram matrices determine only with few digits is computed from the features: distances
    between stimuli that are nearly equal, and whole copies in which there are many of these, or
    in which a stimulus keeps hardly any of its activation.
    """

    def __init__(self, parts: CellParts, whole: Whole | None = None) -> None:
        """``whole``: what is known of x."""
        super().__init__(parts)
        self.x, self.cells, self.n_cells = parts.x, parts.cells, parts.n_cells
        self.known = whole or Whole(raw_statistics_of_all(self.x), _find_equal_rows(self.x))
        self.whole, self.same = self.known
        self.raw = raw_statistics(self.x, self.cells, self.n_cells)
        self.n_nonzero = self.raw.n_nonzero.tolist()
        # Bound on the terms of a raw Gram matrix's diagonal, which may cancel.
        self.raw_energy = self.energy + 2 * self.whole.shift[0].abs() + self.whole.squared_means

    def active(self, distance: str) -> list[int]:
        """Return the cells whose ablation changes distances and leaves some."""
        if distance == "euclidean":
            return self.parts.active
        counts = enumerate(zip(self.parts.n_remaining, self.n_nonzero, strict=True))
        return [c for c, (n_remaining, n_nonzero) in counts if n_remaining and n_nonzero]

    def measure(self, distance: str, cells: list[int] | None) -> StimulusDistances:
        """Return the distances without each of some cells, or for None those of the original."""
        gram = self._remaining(cells)
        raw = self.whole if cells is None else self.whole.subtract(self.raw.select(cells))
        p, half_ulp = self.x.shape[1], torch.finfo(self.x.dtype).eps / 2
        offsets = raw.shift + raw.squared_means[:, None] / 2
        norm = (gram.diagonal(dim1=1, dim2=2) + 2 * offsets).clamp_(min=0).sqrt_()
        if distance == "euclidean":
            squared = _squared_distances(gram)
            energy = self.energy.expand(len(gram), -1).clone()
            needs_copy = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
        else:
            gram.add_(_pair_sums(offsets))
            if distance == "correlation":
                gram.baddbmm_(raw.row_sums[:, :, None], raw.row_sums[:, None] / -p)
            length2 = gram.diagonal(dim1=1, dim2=2)
            energy = self.raw_energy / length2
            needs_copy = ~(length2 > CLOSE * self.raw_energy).all(1)
            length = length2.sqrt()
            norm = norm / length if distance == "correlation" else torch.ones_like(norm)
            gram.div_(length[:, :, None] * length[:, None])
            squared = gram.mul_(-2).add_(2)
        result = StimulusDistances(
            squared,
            energy,
            half_ulp * norm,
            np.full(len(gram), Route.SUMS),
            _SUMS * bound_rounding(p),
            0.0 if distance == "euclidean" else SCALING_ERROR,
            self.x.dtype == torch.float64,
        )
        self._correct(result, distance, cells, needs_copy)
        return result

    def _correct(
        self,
        result: StimulusDistances,
        distance: str,
        cells: list[int] | None,
        needs_copy: Tensor,
    ) -> None:
        """Recompute in place what has too few digits, and make the rows of equal stimuli equal."""
        squared, n = result.squared, len(self.x)
        _fill_equal(squared, self.same, torch.inf)
        limits = CLOSE * 2 * result.energy.amax(1)
        suspects = needs_copy | (squared.amin((1, 2)) <= limits)
        has_equal = self.same is not None
        for b, copied in zip(
            suspects.nonzero()[:, 0].tolist(), needs_copy[suspects].tolist(), strict=True
        ):
            inside = None if cells is None else self._inside(cells[b])
            energies = result.energy[b, :, None] + result.energy[b]
            pairs = (squared[b] <= CLOSE * energies).triu_(1).nonzero()
            if copied or len(pairs) > n:
                self._copy_into(result, b, distance, inside)
                has_equal = True
            elif len(pairs):
                values = self._measure_pairs(pairs, distance, inside)
                i, j = pairs.unbind(1)
                squared[b, i, j] = squared[b, j, i] = values
                has_equal = has_equal or bool((values == 0).any())
        _fill_equal(squared, self.same, 0)
        if has_equal:
            _share_rows(result)

    def _inside(self, cell: int) -> Tensor:
        members = mark_members(self.cells, cell, self.n_cells)
        return torch.from_numpy(members).to(self.x.device)

    def _copy_into(
        self, result: StimulusDistances, b: int, distance: str, inside: Tensor | None
    ) -> None:
        """Compute the distances of a copy from its features."""
        n, device = len(self.x), self.x.device
        copy = self.x if inside is None else self.x.masked_fill(inside, 0)
        pairs = pair_distances(copy, distance)
        i, j = torch.triu_indices(n, n, 1, device=device)
        result.squared[b, i, j] = result.squared[b, j, i] = pairs.squared
        result.squared[b].fill_diagonal_(0)
        result.energy[b], result.half_ulps[b] = pairs.energy, pairs.half_ulps
        result.routes[b] = Route.DEFINITION

    def _measure_pairs(self, pairs: Tensor, distance: str, inside: Tensor | None) -> Tensor:
        """Return squared distances (m,) of pairs of stimuli (m, 2) from their features."""
        out = []
        for part in pairs.split(max(1, _GATHER_SIZE // self.x.shape[1])):
            rows = self.x[part.mT].to(torch.float64)  # (2, m, p)
            if inside is not None:
                rows.masked_fill_(inside, 0)
            if distance == "correlation":
                rows.sub_(rows.mean(2, keepdim=True))
            if distance != "euclidean":
                rows.div_(torch.linalg.vector_norm(rows, dim=2, keepdim=True))
            out.append((rows[0] - rows[1]).square_().sum(1))
        return torch.cat(out)


def _squared_distances(gram: Tensor) -> Tensor:
    """Return the squared distances (B, n, n) between stimuli with Gram matrices (B, n, n)."""
    return torch.add(_pair_sums(gram.diagonal(dim1=1, dim2=2)), gram, alpha=-2)


def _pair_sums(values: Tensor) -> Tensor:
    """Return the sums (B, n, n) of all pairs of values (B, n)."""
    return values[:, :, None] + values[:, None]


def _find_equal_rows(x: Tensor) -> Tensor | None:
    """Return which rows of x are equal, (n, n), or None if none are."""
    try:
        check_distinct(x)
    except EqualRows as equal:
        _, index = equal.args
        return torch.as_tensor(index[:, None] == index)
    return None


def _fill_equal(squared: Tensor, same: Tensor | None, value: float) -> None:
    """Set the distances (B, n, n) of stimuli from themselves and their equals."""
    if same is None:
        squared.diagonal(dim1=1, dim2=2).fill_(value)
    else:
        squared.masked_fill_(same, value)


def _share_rows(result: StimulusDistances) -> None:
    """Give stimuli at a distance of 0 the distances of the first of them, to the last bit."""
    squared = result.squared
    first = (squared == 0).to(torch.uint8).argmax(2)  # (B, n)
    rows = squared.gather(1, first[:, :, None].expand_as(squared))
    result.squared = rows.gather(2, first[:, None].expand_as(squared))
    result.energy = result.energy.gather(1, first)
    result.half_ulps = result.half_ulps.gather(1, first)
