"""Which neurons of a layer each cell ablates, and the values that replace them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, SparseCells
from repsim_kernels.forward.broadcast import empty_for_cells


@dataclass(frozen=True)
class CellMasks:
    """The masks of the cells of one pass, and what replaces the masked neurons."""

    labels: np.ndarray[Any, Any]  # (p,), or memberships (C, p)
    table: Tensor  # the labels on the activation's device
    ids: Tensor  # the selected cells, on the activation's device
    fill: Tensor | None = None  # (n, …) for all images of the state; None for zeros

    def make_masks(self) -> Tensor:
        """Return whether each neuron is in each selected cell, (len(ids), p)."""
        if self.table.dtype == torch.bool:
            return self.table[self.ids]
        return self.table == self.ids[:, None]


@dataclass(frozen=True)
class Ablations:
    """All cells of one call, and what replaces their neurons."""

    cells: Cells
    n_cells: int
    device: torch.device
    fill: Tensor | None = None  # (n, …); None for zeros

    @cached_property
    def _table(self) -> Tensor:
        """The labels or memberships on the device; cells that are sparse have none."""
        return torch.as_tensor(self.cells, device=self.device)

    @property
    def are_partition(self) -> bool:
        """Whether no neuron is in two cells, as labels ensure."""
        return not isinstance(self.cells, SparseCells) and self.cells.ndim == 1

    def find_effective(self, activation: Tensor) -> list[int]:
        """Return the cells with a neuron that the fill changes for at least one image."""
        fill = 0 if self.fill is None else self.fill
        changes = (activation != fill).any(0).reshape(-1)  # (p,)
        if isinstance(self.cells, SparseCells):
            rows = np.repeat(np.arange(self.n_cells), np.diff(self.cells.indptr))
            return np.unique(rows[changes.cpu().numpy()[self.cells.indices]]).tolist()
        if self._table.dtype == torch.bool:
            has_effect = (self._table & changes).any(1)
        else:
            labels = self._table[changes & (self._table >= 0)]
            has_effect = torch.bincount(labels, minlength=self.n_cells) > 0
        return has_effect.nonzero()[:, 0].tolist()

    def select(self, ids: list[int]) -> CellMasks:
        """Return the masks of the cells with these numbers."""
        if isinstance(self.cells, SparseCells):
            labels = self.cells.select(ids).to_membership()
            table, ids = torch.as_tensor(labels, device=self.device), list(range(len(ids)))
        else:
            labels, table = self.cells, self._table
        return CellMasks(labels, table, torch.tensor(ids, device=self.device), self.fill)


def mask_for_cells(t: Tensor, masks: Tensor, fill: Tensor | None = None) -> Tensor:
    """Copy a tensor (n, …) once per mask (C, …), with the fill where it is true: (C n, …).

    Without a fill (n, …), these neurons become zero. The copies keep the tensor's memory order.
    """
    t = t.detach()
    out = torch.empty_like(t) if len(masks) == 1 else empty_for_cells(t, len(masks))
    values = t.new_zeros(()) if fill is None else fill
    torch.where(masks[:, None], values, t, out=out.view(len(masks), *t.shape))
    return out
