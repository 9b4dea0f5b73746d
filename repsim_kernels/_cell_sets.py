"""Cells as every backend takes them: labels, a membership, or a sparse membership."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SparseCells:
    """Cells that may overlap, as a list of neurons for each.

    Attributes
    ----------
    indptr : int64 array, (C + 1,)
        Where the neurons of each cell begin in `indices`.
    indices : int64 array, or int32
        The neurons of all cells, one cell after the other; sorted and unique within a cell.
    p : int
        Number of neurons that cells are chosen from.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    p: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def members(self, c: int) -> NDArray[np.int64]:
        """Return the neurons of cell c, sorted."""
        return self.indices[self.indptr[c] : self.indptr[c + 1]]

    def select(self, ids: slice | Sequence[int]) -> SparseCells:
        """Return some of the cells; consecutive ones share memory with these."""
        if isinstance(ids, slice):
            start, stop, step = ids.indices(len(self))
            if step == 1:
                offsets = self.indptr[start : max(start, stop) + 1]
                return SparseCells(
                    offsets - offsets[0], self.indices[offsets[0] : offsets[-1]], self.p
                )
            ids = range(start, stop, step)
        lists = [self.members(c) for c in ids]
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return SparseCells(offsets, np.concatenate([self.indices[:0], *lists]), self.p)

    def among(self, start: int, stop: int) -> SparseCells:
        """Return the cells with only the neurons start … stop - 1, numbered from 0."""
        if start <= 0 and stop >= self.p:
            return self
        inside = (self.indices >= start) & (self.indices < stop)
        offsets = np.concatenate([[0], np.cumsum(inside)])[self.indptr]
        return SparseCells(offsets, self.indices[inside] - start, min(stop, self.p) - start)

    def to_membership(self) -> NDArray[np.bool_]:
        """Return which neurons each cell has, (C, p)."""
        member = np.zeros((len(self), self.p), dtype=np.bool_)
        member[np.repeat(np.arange(len(self)), np.diff(self.indptr)), self.indices] = True
        return member


Cells: TypeAlias = NDArray[Any] | SparseCells
"""Labels (p,), labels of partitions (T, p), a boolean membership (C, p), or a sparse one."""


def are_partitions(cells: Cells) -> TypeGuard[NDArray[Any]]:
    """Whether cells are labels (T, p), rather than labels (p,) or a membership."""
    return isinstance(cells, np.ndarray) and cells.ndim == 2 and cells.dtype != np.bool_


def mark_members(cells: Cells, c: int, n_cells: int) -> NDArray[np.bool_]:
    """Return which neurons are in cell c, (p,).

    The n_cells cells of each of several partitions are numbered consecutively.
    """
    if isinstance(cells, SparseCells):
        member = np.zeros(cells.p, dtype=np.bool_)
        member[cells.members(c)] = True
        return member
    if cells.dtype == np.bool_:
        return cells[c]
    if cells.ndim == 2:
        cells, c = cells[c // n_cells], c % n_cells
    return np.asarray(cells == c)


def to_dense(cells: Cells) -> NDArray[Any]:
    """Return sparse cells as a membership (C, p), and all others unchanged."""
    return cells.to_membership() if isinstance(cells, SparseCells) else cells
