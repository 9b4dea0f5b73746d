"""Spectral metrics from features, for a cell whose remainder the whole's Gram matrix hides.

The squares in a Gram matrix keep only half of the digits. If a cell has nearly all of the variance,
the directions of the remaining neurons are rounding errors next to the cell's, or beyond its rank.
Singular values of the features themselves keep them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repsim_kernels._routes import Distances, Route
from repsim_kernels.kernels.torch.ablation_parts import GramParts
from repsim_kernels.kernels.torch.cca import count_leading
from repsim_kernels.kernels.torch.procrustes import squared_residual
from repsim_kernels.kernels.torch.representation import from_complement, is_positive
from repsim_kernels.kernels.torch.spectral_distances import Original


class Side:
    """A representation as a factor T (n - 1, r) of its Gram, and its singular values."""

    def __init__(self, factor: Tensor, original: Original) -> None:
        self.factor = factor
        self.u, self.s, _ = torch.linalg.svd(factor, full_matrices=False)
        squares = self.s.square()
        self.squares = squares * is_positive(squares, squares[:1], original.n)
        self.rank = int((self.squares > 0).sum())
        kappa = original.shrinkage(squares.sum())
        self.whitened = self.u * (self.s / torch.hypot(self.s, kappa.sqrt()))


class HiddenRest:
    """The metrics of the original and one ablation, by their definitions.

    Its methods are those of `AblationBatch`, for a batch of one.
    """

    variates_route = Route.DEFINITION

    def __init__(self, original: Original, whole: Side, rest: Side) -> None:
        self.original, self.whole, self.rest = original, whole, rest

    def procrustes(self) -> Distances:
        f, g = (side.factor / torch.linalg.norm(side.factor) for side in (self.whole, self.rest))
        return _define(squared_residual(f, g))

    def svcca(self, variance: float = 0.99) -> Distances:
        sides = self.whole, self.rest
        k, m = (int(count_leading(side.squares, variance)) for side in sides)
        values = torch.linalg.svdvals(self.whole.u[:, :k].mT @ self.rest.u[:, :m])
        return _define(1 - values.mean())

    def cca(self, vectors: bool) -> Distances:
        return self._average(torch.linalg.svdvals(self._correlate()))

    def cca_squared(self) -> Distances:
        return self._average(self._correlate().square())

    def _correlate(self) -> Tensor:
        """Return the matrix whose singular values are the canonical correlations."""
        self.original.check_ridge()
        return self.whole.whitened.mT @ self.rest.whitened

    def _average(self, correlations: Tensor) -> Distances:
        return _define(1 - correlations.sum() / self.original.correlations)

    def variates(self) -> tuple[Tensor, Tensor]:
        """Return the original's canonical variates as rows (1, k, n), and correlations (1, k)."""
        u, rho, _ = torch.linalg.svd(self._correlate())
        k = min(self.whole.rank, self.rest.rank)
        return from_complement(self.whole.whitened @ u[:, :k]).mT[None], rho[None, :k]


class HiddenRests:
    """Makes the `HiddenRest` of each cell; the original's side is computed once."""

    def __init__(self) -> None:
        self.whole: Side | None = None

    def find(self, parts: GramParts, c: int, original: Original) -> HiddenRest:
        """Return the metrics of the original and the ablation of part c."""
        if self.whole is None:
            self.whole = self._make_side(parts, None, original)
        return HiddenRest(original, self.whole, self._make_side(parts, c, original))

    def _make_side(self, parts: GramParts, c: int | None, original: Original) -> Side:
        eye = torch.eye(original.n - 1, dtype=torch.float64, device=original.v.device)
        factor = parts.factor(c, from_complement(eye))
        assert factor is not None
        return Side(factor, original)


def _define(value: Tensor) -> Distances:
    return Distances(value[None], Route.DEFINITION, 0)
