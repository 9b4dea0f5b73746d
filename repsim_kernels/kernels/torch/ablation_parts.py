"""The parts of a representation that ablations remove: their Grams, and what the host must know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, SparseCells, are_partitions, mark_members
from repsim_kernels.kernels.torch import columns, gram, panels
from repsim_kernels.kernels.torch.cca import variate_weights

# A cell that leaves a smaller share of the whole's variance hides the rest in the whole's Gram: the
# first share for Grams of float64 products, the second for float32.
_HIDDEN, _HIDDEN_FLOAT32 = 1e-10, 1e-4
# By default, the bytes of the Grams of sparse cells, or of partitions on a GPU, at a time.
MEMORY = 2**30
# Bytes for each neuron of a sparse cell, while it is dense for a GPU: the membership, and labels
# before and after sorting.
_DENSE_BYTES = 16


@dataclass(frozen=True)
class Passes:
    """The functions that read all of x.

    They compute each cell's Gram, the weights of directions, and the Gram of the whole.
    """

    cell_statistics: Callable[..., tuple[panels.Panels, Tensor, Tensor]]
    variate_weights: Callable[[Tensor, Tensor], Tensor]
    whole_gram: Callable[[Tensor], Tensor]
    # Whether they are kernels for a GPU: their Grams have float32's digits and are one panel, and
    # `cell_statistics` takes several partitions (T, p), but no sparse cells and no ``out``.
    on_gpu: bool = False

    def for_rank(self, n: int, n_varying: int) -> Passes:
        """Return these, or passes in float64 if the Gram of n_varying neurons is singular.

        In float32 rounding would hide that it is.
        """
        if not self.on_gpu or n_varying >= n:
            return self
        return dataclasses.replace(
            self, cell_statistics=gram.cell_statistics, whole_gram=gram.linear, on_gpu=False
        )


PASSES = Passes(gram.cell_statistics, variate_weights, gram.linear)


class GramParts:
    """The Gram of a whole representation and the Grams of its parts."""

    def __init__(
        self,
        whole: Tensor,
        grams: panels.Panels,
        constant: list[bool],
        n_remaining: list[int],
        energy: list[float],
        total: float,
        full: Tensor | None = None,
    ) -> None:
        """Take the Gram of the whole (n, n) and the packed Grams of its parts (C, n, n).

        ``constant`` says whether a part is constant over the stimuli, and ``n_remaining`` how many
        varying neurons remain without it. ``energy`` and ``total`` are the traces of the Grams of
        the parts and of the whole, and ``full`` the Grams of the parts, unpacked, if they exist.
        """
        self.whole, self.grams, self.full = whole, grams, full
        self.constant, self.n_remaining, self.total = constant, n_remaining, total
        self.dominant = [part > 0.5 * total for part in energy]
        # Whether to compare features instead, because the whole's Gram has too few digits of the
        # rest; never if only Grams are known.
        self.hides_rest = [False] * len(energy)

    @property
    def active(self) -> list[int]:
        """The parts that change the whole but do not remove all of it."""
        pairs = enumerate(zip(self.n_remaining, self.constant, strict=True))
        return [c for c, (n_remaining, constant) in pairs if n_remaining and not constant]

    def select(self, parts: list[int]) -> panels.Panels:
        """Return the packed Grams of parts in ascending order; a view of consecutive ones."""
        return panels.select(self.grams, panels.to_index(parts))

    def unpack(self, parts: list[int]) -> Tensor:
        """Return the Grams (B, n, n) of parts in ascending order."""
        if self.full is not None:
            return self.full[panels.to_index(parts)]
        return panels.unpack(self.select(parts))

    def rests(self, parts: list[int]) -> Tensor:
        """Return K_c, the Gram of the whole without part c, for parts in ascending order."""
        return self.whole - self.unpack(parts)

    def factor(self, c: int | None, basis: Tensor) -> Tensor | None:
        """Return T (m, r) with T Tᵀ = basisᵀ K_c basis, or None if it would need K_c.

        Without c, K_c is the whole's Gram.
        """
        return None


def compute_whole(x: Tensor, passes: Passes) -> tuple[Tensor, int]:
    """Return the Gram of x (n, n), and its number of varying neurons."""
    n_varying = int(gram.count_varying(x))
    return passes.for_rank(len(x), n_varying).whole_gram(x), n_varying


class _Statistics(NamedTuple):
    """What `gram.cell_statistics` computes, and the whole's Gram and number of varying neurons."""

    grams: panels.Panels
    n_varying: Tensor
    shift: Tensor
    whole: Tensor
    n_total: int
    full: Tensor | None = None  # the same Grams, unpacked, where they exist


class CellParts(GramParts):
    """The parts of x (n, p) that its cells define."""

    def __init__(
        self,
        x: Tensor,
        cells: Cells,
        n_cells: int,
        shifts: bool = False,
        passes: Passes = PASSES,
        known: _Statistics | None = None,
    ) -> None:
        """Take cells of any kind, and what is known of them.

        The parts of partitions are numbered consecutively, T C in all. ``shifts``: whether to
        compute ``shift`` (C, n), B_c μ_c for each cell.
        """
        self.x, self.cells, self.n_cells = x, cells, n_cells
        full = None
        if known is None and isinstance(cells, np.ndarray) and cells.ndim == 1:
            # Neurons in no cell make one more cell, so that one pass yields the whole as well.
            labels = columns.label_unassigned(cells, n_cells)
            grams, n_varying, shift = passes.cell_statistics(x, labels, n_cells + 1, shifts)
            counts, energy = _read(n_varying, panels.traces(grams))
            if passes.for_rank(len(x), sum(counts)) is not passes:
                passes = passes.for_rank(len(x), sum(counts))
                grams, n_varying, shift = passes.cell_statistics(x, labels, n_cells + 1, shifts)
                counts, energy = _read(n_varying, panels.traces(grams))
            whole = _sum_cells(grams, passes)
            grams, shift = panels.select(grams, slice(n_cells)), shift[:n_cells]
            full = grams[0][1] if passes.on_gpu else None
            n_total, total = sum(counts), sum(energy)
        else:
            if known is None:
                known = _measure(x, cells, n_cells, shifts, passes, compute_whole(x, passes))
            grams, n_varying, shift, whole, n_total, full = known
            traces = [panels.traces(grams), whole.diagonal().sum()[None]]
            counts, (*energy, total) = _read(n_varying, torch.cat(traces))
        self.shift = shift
        c = len(shift)
        constant, n_remaining = [k == 0 for k in counts[:c]], [n_total - k for k in counts[:c]]
        super().__init__(whole, grams, constant, n_remaining, energy[:c], total, full)
        on_gpu = passes.for_rank(len(x), n_total).on_gpu
        least = total * (_HIDDEN_FLOAT32 if on_gpu else _HIDDEN)
        self.hides_rest = [total - part < least for part in energy[:c]]

    def outside(self, c: int | None) -> Tensor:
        """Return the columns of x that are not in cell c, or all of them."""
        if c is None:
            return self.x
        outside = np.flatnonzero(~mark_members(self.cells, c, self.n_cells))
        return columns.take(self.x, torch.from_numpy(outside).to(self.x.device))

    def rests(self, parts: list[int]) -> Tensor:
        """Return K_c; for a dominant cell from the features, since the difference would cancel."""
        k = super().rests(parts)
        for i, c in enumerate(parts):
            if self.dominant[c]:
                k[i] = gram.linear(self.outside(c))
        return k

    def factor(self, c: int | None, basis: Tensor) -> Tensor:
        """Return the features in the basis or, if they are many, their QR triangle, by blocks."""
        outside = self.outside(c)
        n, count = outside.shape
        if count <= basis.shape[1]:
            return basis.mT @ gram.centre(outside)
        triangle = basis.new_zeros(0, basis.shape[1])
        for block in panels.split_neurons(count, n):
            rows = gram.centre(outside[:, block]).mT @ basis
            triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
        return triangle.mT


def _sum_cells(grams: panels.Panels, passes: Passes) -> Tensor:
    """Return the sum (n, n) of packed Grams."""
    summed = [(span, panel.sum(0)) for span, panel in grams]
    return summed[0][1] if passes.on_gpu else panels.unpack(summed)


def _read(n_varying: Tensor, energy: Tensor) -> tuple[list[int], list[float]]:
    """Copy numbers of neurons and traces of Grams to the host, at once."""
    numbers = torch.cat([n_varying.to(torch.float64), energy]).tolist()
    return list(map(int, numbers[: len(n_varying)])), numbers[len(n_varying) :]


def _measure(
    x: Tensor,
    cells: Cells,
    n_cells: int,
    shifts: bool,
    passes: Passes,
    whole: tuple[Tensor, int],
    out: panels.Panels | None = None,
) -> _Statistics:
    """Measure the cells of a membership, or of partitions (T, p), with the Grams in ``out``."""
    passes = passes.for_rank(len(x), whole[1])
    if out is not None:
        grams, n_varying, shift = passes.cell_statistics(x, cells, n_cells, shifts, out)
        return _Statistics(grams, n_varying, shift, *whole)
    if passes.on_gpu or not are_partitions(cells):
        grams, n_varying, shift = passes.cell_statistics(x, cells, n_cells, shifts)
        full = grams[0][1] if passes.on_gpu else None
        return _Statistics(grams, n_varying, shift, *whole, full)
    each = [passes.cell_statistics(x, labels, n_cells, shifts) for labels in cells]
    panel_lists, counts, shift_list = zip(*each, strict=True)
    joined = [
        (same[0][0], torch.cat([panel for _, panel in same]))
        for same in zip(*panel_lists, strict=True)
    ]
    return _Statistics(joined, torch.cat(counts), torch.cat(shift_list), *whole)


def make_parts(
    x: Tensor,
    cells: Cells,
    n_cells: int,
    grams: Tensor | None,
    passes: Passes,
    shifts: bool = False,
    memory: int | None = None,
) -> Iterator[CellParts]:
    """Make the parts of x for each of the partitions (T, p), or for other cells the only ones.

    Sparse cells make several sets of parts, and on a GPU several partitions make one. Their Grams
    take up to ``memory`` bytes, by default `MEMORY`, and all sets have the same whole.

    Each set is made when it is needed, so that the Grams of one exist at a time if the caller drops
    it first; those of sparse cells may be overwritten. ``grams``, if they are known, are
    (T, C, n, n) for partitions and otherwise (C, n, n).
    """
    memory = memory or MEMORY
    known: tuple[Tensor, Tensor, Tensor] | None = None
    n_total = 0
    if grams is not None:
        n_varying, total, shift = gram.cell_counts_and_shifts(x, cells, n_cells, shifts)
        n_total = int(total)
        if passes.for_rank(len(x), n_total) is passes:
            known = grams, n_varying, shift
    if isinstance(cells, SparseCells):
        shared = compute_whole(x, passes)
        per_cell = 8 * len(x) ** 2 + (_DENSE_BYTES * cells.p if passes.on_gpu else 0)
        step = max(1, memory // per_cell)
        buffer = None
        if not (known or passes.for_rank(len(x), shared[1]).on_gpu):
            # One for all chunks: memory that is freed and allocated again would first be zeroed.
            buffer = gram.empty_grams(x, min(step, n_cells))
        for start in range(0, max(1, n_cells), step):
            run = slice(start, start + step)
            chunk = cells.select(run)
            own = chunk.to_membership() if passes.on_gpu else chunk
            out = panels.select(buffer, slice(len(chunk))) if buffer else None
            # Without a variable for the statistics: it would keep them during the next chunk.
            yield CellParts(
                *(x, own, len(chunk), shifts, passes),
                _complete(shared, *(each[run] for each in known))
                if known
                else _measure(x, own, len(chunk), shifts, passes, shared, out),
            )
    elif not are_partitions(cells):
        statistics = None
        if known:
            whole = _sum_whole(x, cells, known[0], passes)
            statistics = _complete((whole, n_total), *known)
        yield CellParts(x, cells, n_cells, shifts, passes, statistics)
    elif not passes.on_gpu:
        for t, labels in enumerate(cells):
            statistics = None
            if known:
                whole = _sum_whole(x, labels, known[0][t], passes)
                statistics = _complete((whole, n_total), *(each[t] for each in known))
            yield CellParts(x, labels, n_cells, shifts, passes, statistics)
    else:
        shared = compute_whole(x, passes)
        step = max(1, memory // (8 * max(1, n_cells) * len(x) ** 2))
        for start in range(0, len(cells), step):
            run = slice(start, start + step)
            yield CellParts(
                *(x, cells[run], n_cells, shifts, passes),
                _complete(shared, *(each[run].flatten(0, 1) for each in known))
                if known
                else _measure(x, cells[run], n_cells, shifts, passes, shared),
            )


def _complete(
    whole: tuple[Tensor, int], grams: Tensor, n_varying: Tensor, shift: Tensor
) -> _Statistics:
    """Return the statistics of cells with known Grams (C, n, n)."""
    return _Statistics(panels.panels_view(grams), n_varying, shift, *whole, grams)


def _sum_whole(x: Tensor, cells: np.ndarray, grams: Tensor, passes: Passes) -> Tensor:
    """Return the Gram of x; for labels it is the sum of the cells' and of the other neurons."""
    if cells.ndim == 2:
        return passes.whole_gram(x)
    whole, unassigned = grams.sum(0), np.flatnonzero(cells < 0)
    if len(unassigned):
        index = torch.from_numpy(unassigned).to(x.device)
        whole += gram.linear(columns.take(x, index))
    return whole
