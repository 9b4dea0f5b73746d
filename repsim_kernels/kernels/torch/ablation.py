"""Every metric between a representation and each of its ablations, from one pass over the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._routes import Distances, Route
from repsim_kernels.kernels.torch import cka, columns, gram, panels
from repsim_kernels.kernels.torch.cca import variate_weights
from repsim_kernels.kernels.torch.representation import Representation
from repsim_kernels.kernels.torch.spectral_distances import (
    SOLVERS,
    AblationBatch,
    Original,
    Solvers,
)

_MEMORY = 2**30  # bytes of directions that may wait for a pass over x, by default


@dataclass(frozen=True)
class Passes:
    """The functions that read all of x: one for each cell's Gram, one for weights of directions."""

    cell_statistics: Callable[[Tensor, np.ndarray, int, bool], tuple[panels.Panels, Tensor, Tensor]]
    variate_weights: Callable[[Tensor, Tensor], Tensor]


PASSES = Passes(gram.cell_statistics, variate_weights)


class GramParts:
    """The Gram of a whole representation and the Grams of its parts."""

    def __init__(
        self,
        whole: Tensor,
        grams: panels.Panels,
        constant: list[bool],
        n_remaining: list[int],
    ) -> None:
        """Take the Gram of the whole (n, n) and the packed Grams of its parts (C, n, n).

        ``constant`` says whether a part is constant over the stimuli, and ``n_remaining`` how many
        varying neurons remain without it.
        """
        self.whole, self.grams = whole, grams
        self.full: Tensor | None = None  # the same Grams, unpacked, where they exist
        self.constant, self.n_remaining = constant, n_remaining
        energy = panels.diagonal(grams).sum(1)
        self.dominant = (energy / whole.diagonal().sum() > 0.5).tolist()

    @property
    def active(self) -> list[int]:
        """The parts that change the whole but do not remove all of it."""
        pairs = enumerate(zip(self.n_remaining, self.constant, strict=True))
        return [c for c, (n_remaining, constant) in pairs if n_remaining and not constant]

    def select(self, parts: list[int]) -> panels.Panels:
        """Return the packed Grams of parts in ascending order; a view of consecutive ones."""
        return panels.select(self.grams, _to_index(parts))

    def unpack(self, parts: list[int]) -> Tensor:
        """Return the Grams (B, n, n) of parts in ascending order."""
        if self.full is not None:
            return self.full[_to_index(parts)]
        return panels.unpack(self.select(parts))

    def rests(self, parts: list[int]) -> Tensor:
        """Return K_c, the Gram of the whole without part c, for parts in ascending order."""
        return self.whole - self.unpack(parts)

    def factor(self, c: int, basis: Tensor) -> Tensor | None:
        """Return T (m, r) with T Tᵀ = basisᵀ K_c basis, or None if it would need K_c."""
        return None


def _to_index(parts: list[int]) -> slice | list[int]:
    """Return a slice, which makes a view, if the parts are consecutive."""
    first, end = parts[0], parts[-1] + 1
    return slice(first, end) if end - first == len(parts) else parts


def compute_whole(x: Tensor, passes: Passes) -> tuple[Tensor, Tensor]:
    """Return the Gram of x (n, n), and its number of varying neurons."""
    one_cell = np.zeros(x.shape[1], dtype=np.int64)
    packed, (n_varying,), _ = passes.cell_statistics(x, one_cell, 1, False)
    return panels.unpack(packed)[0], n_varying


class _KnownCells(NamedTuple):
    """What `gram.cell_statistics` would compute, and the number of varying neurons of x."""

    grams: Tensor
    n_varying: Tensor
    n_total: Tensor
    shift: Tensor


class CellParts(GramParts):
    """The parts of x (n, p) that its cells define."""

    def __init__(
        self,
        x: Tensor,
        cells: np.ndarray,
        n_cells: int,
        shifts: bool = False,
        passes: Passes = PASSES,
        known: _KnownCells | None = None,
    ) -> None:
        """Take labels (p,) or a membership (C, p), and what is known of these cells.

        ``shifts``: whether to compute ``shift`` (C, n), B_c μ_c for each cell.
        """
        self.x, self.cells = x, cells
        if known is not None:
            grams, n_varying, n_total, self.shift = known
            counts = (n_varying == 0).tolist(), (n_total - n_varying).tolist()
            super().__init__(self._whole(grams), panels.panels_view(grams), *counts)
            self.full = grams
            return
        if cells.ndim == 1:
            # Neurons in no cell make one more cell, so that one pass yields the whole as well.
            labels = columns.label_unassigned(cells, n_cells)
            g, n_varying, shift = passes.cell_statistics(x, labels, n_cells + 1, shifts)
            whole = panels.unpack([(span, panel.sum(0)) for span, panel in g])
            n_total = n_varying.sum()
        else:
            g, n_varying, shift = passes.cell_statistics(x, cells, n_cells, shifts)
            whole, n_total = compute_whole(x, passes)
        n_varying, self.shift = n_varying[:n_cells], shift[:n_cells]
        g = panels.select(g, slice(n_cells))
        super().__init__(whole, g, (n_varying == 0).tolist(), (n_total - n_varying).tolist())

    def _whole(self, grams: Tensor) -> Tensor:
        """Return the Gram of x; for labels it is the sum of the cells' and of the other neurons."""
        if self.cells.ndim == 2:
            return gram.linear(self.x)
        whole, unassigned = grams.sum(0), np.flatnonzero(self.cells < 0)
        if len(unassigned):
            index = torch.from_numpy(unassigned).to(self.x.device)
            whole += gram.linear(columns.take(self.x, index))
        return whole

    def outside(self, c: int) -> Tensor:
        """Return the columns of x that are not in cell c."""
        inside = self.cells == c if self.cells.ndim == 1 else self.cells[c]
        return columns.take(self.x, torch.from_numpy(np.flatnonzero(~inside)).to(self.x.device))

    def rests(self, parts: list[int]) -> Tensor:
        """Return K_c; for a dominant cell from the features, since the difference would cancel."""
        k = super().rests(parts)
        for i, c in enumerate(parts):
            if self.dominant[c]:
                k[i] = gram.linear(self.outside(c))
        return k

    def factor(self, c: int, basis: Tensor) -> Tensor:
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


class DistanceTable:
    """Distances (C,) by metric, and how they were computed; zeros until they are recorded."""

    def __init__(self, metrics: tuple[str, ...], n_cells: int, device: torch.device) -> None:
        dtypes = (torch.float64, torch.int64, torch.int64)
        self.columns = {
            name: Distances(*(torch.zeros(n_cells, dtype=d, device=device) for d in dtypes))
            for name in metrics
        }

    def record(
        self,
        metric: str,
        cells: list[int],
        values: Tensor | float,
        route: Tensor | int = Route.NOTHING,
        steps: Tensor | int = 0,
    ) -> None:
        """Set the distances of a metric for some cells."""
        column = self.columns[metric]
        index = torch.tensor(cells, dtype=torch.int64, device=column.values.device)
        column.values[index], column.route[index], column.steps[index] = values, route, steps

    def result(self) -> dict[str, Distances]:
        """Return the distances by metric; rounding must not make one negative."""
        return {
            name: column._replace(values=column.values.clamp(min=0))
            for name, column in self.columns.items()
        }


def make_parts(
    x: Tensor,
    cells: np.ndarray,
    n_cells: int,
    grams: Tensor | None,
    passes: Passes,
    shifts: bool = False,
) -> Iterator[CellParts]:
    """Make the parts of x for each of the partitions (T, p), or for other cells the only ones.

    Each is made when it is needed, so that the Grams of one exist at a time. ``grams``, if they are
    known, are (T, C, n, n) for partitions and otherwise (C, n, n).
    """
    known = None
    if grams is not None:
        known = _KnownCells(grams, *gram.cell_counts_and_shifts(x, cells, n_cells, shifts))
    if not are_partitions(cells):
        yield CellParts(x, cells, n_cells, shifts, passes, known)
        return
    for t, labels in enumerate(cells):
        own = known and _KnownCells(
            known.grams[t], known.n_varying[t], known.n_total, known.shift[t]
        )
        yield CellParts(x, labels, n_cells, shifts, passes, own)


def are_partitions(cells: np.ndarray) -> bool:
    """Whether cells are labels (T, p), rather than labels (p,) or a membership (C, p)."""
    return cells.ndim == 2 and cells.dtype != np.bool_


def ablation_distances(
    x: Tensor,
    *,
    cells: np.ndarray,
    n_cells: int,
    metrics: tuple[str, ...],
    ridge: float,
    penalty: float,
    memory: int | None,
    grams: Tensor | None = None,
    passes: Passes = PASSES,
    solvers: Solvers = SOLVERS,
) -> dict[str, Distances]:
    def make_original(gram: Tensor) -> Original:
        # The sum over a partition's cells rounds differently for each. With one Gram for all, the
        # distances of a partition do not depend on which others there are.
        whole = Representation(x, compute_whole(x, passes)[0] if are_partitions(cells) else gram)
        return Original(whole.spectrum, whole.n, whole.p, ridge, penalty, solvers)

    def weigh(directions: Tensor) -> Tensor:
        return passes.variate_weights(directions, x)

    parts = make_parts(x, cells, n_cells, grams, passes)
    results = distances_of_parts(parts, make_original, metrics, weigh, memory or _MEMORY)
    if not are_partitions(cells):
        return results[0]
    columns = {name: zip(*(result[name] for result in results), strict=True) for name in metrics}
    return {name: Distances(*map(torch.stack, column)) for name, column in columns.items()}


def distances_of_parts(
    partitions: Iterable[GramParts],
    make_original: Callable[[Tensor], Original],
    metrics: tuple[str, ...],
    weigh: Callable[[Tensor], Tensor] | None = None,
    memory: int = 0,
) -> list[dict[str, Distances]]:
    """Return the distances between the whole and the whole without each part, by metric.

    The partitions have the same whole: its spectrum is computed from the Gram in the first. "pwcca"
    needs ``weigh``, which takes directions (k, n) and returns their weights (k,). About ``memory``
    bytes of directions are collected before each call of it.
    """
    original, tables = None, list[DistanceTable]()
    queue = _PwccaQueue(weigh, memory) if weigh else None
    for parts in partitions:
        table = DistanceTable(metrics, len(parts.n_remaining), parts.whole.device)
        tables.append(table)
        for name in ("cka", "cka_debiased"):
            if name in metrics:
                _record_cka(parts, name, table)
        if set(metrics) - {"cka", "cka_debiased"}:
            original = original or make_original(parts.whole)
            _record_spectral(parts, original, table, queue)
        removed_all = [c for c, count in enumerate(parts.n_remaining) if not count]
        for name in metrics:
            table.record(name, removed_all, torch.nan)
    if queue:
        queue.flush()
    return [table.result() for table in tables]


def _record_cka(parts: GramParts, metric: str, table: DistanceTable) -> None:
    to_vectors = functools.partial(gram.to_vectors, u_centred=metric == "cka_debiased")
    # Inner products of these vectors are half of those of the matrices, and so are the floors.
    (whole,) = to_vectors(panels.panels_view(parts.whole[None]))
    floor = cka.rounding_floor(parts.whole) / 2
    whole = whole * cka.nan_if_not_above(panels.sum_squares(whole), floor).sign()
    minor = [c for c in parts.active if not parts.dominant[c]]
    batches = list(gram.iter_batches(minor, whole))
    buffer = whole.new_empty(len(batches[0]), len(whole)) if batches else None
    distances = [
        cka.cosine_distance(to_vectors(parts.select(batch), buffer=buffer), whole, False, floor)
        for batch in batches
    ]
    if minor:
        table.record(metric, minor, torch.cat(distances), Route.SUMS)
    for c in parts.active:
        if parts.dominant[c]:
            rest = parts.rests([c])
            vector = to_vectors(panels.panels_view(rest))
            rest_floor = cka.rounding_floor(rest[0]) / 2
            distance = cka.cosine_distance(vector, whole, True, rest_floor)
            table.record(metric, [c], distance, Route.SUMS)


def _record_spectral(
    parts: GramParts,
    original: Original,
    table: DistanceTable,
    queue: _PwccaQueue | None,
) -> None:
    names = set(table.columns) & {"procrustes", "svcca"}
    if original.kappa > 0:
        # Without a ridge CCA compares spans, and the ablated one lies within the original's: 0.
        names |= set(table.columns) & {"cca", "cca_squared", "pwcca"}
    if "pwcca" not in names:
        queue = None
    constant = [c for c, is_constant in enumerate(parts.constant) if is_constant]
    for name in names - {"pwcca"}:
        table.record(name, constant, original.self_distance(name))
    if constant and queue:
        variates, rho = original.variates[None], original.shrunk[None]
        queue.add(table, constant, variates, rho, Route.NOTHING)
    for cells, batch in _iter_ablations(parts, original):
        if "procrustes" in names:
            table.record("procrustes", cells, *batch.procrustes())
        if "svcca" in names:
            table.record("svcca", cells, *batch.svcca())
        if "cca" in names:
            table.record("cca", cells, *batch.cca(vectors=queue is not None))
        if "cca_squared" in names:
            table.record("cca_squared", cells, *batch.cca_squared())
        if queue:
            queue.add(table, cells, *batch.variates(), Route.EIGENVECTORS)


def _iter_ablations(
    parts: GramParts, original: Original
) -> Iterator[tuple[list[int], AblationBatch]]:
    """Yield batches of ablations; one that leaves fewer neurons than directions comes alone."""
    basis = original.basis
    deficient = [c for c in parts.active if parts.n_remaining[c] < len(original.v)]
    for c in deficient:
        yield [c], AblationBatch(original, features=parts.factor(c, basis))
    for dominant in (False, True):
        cells = [c for c in parts.active if c not in deficient and parts.dominant[c] == dominant]
        for batch in gram.iter_batches(cells, parts.whole):
            factors = [functools.partial(parts.factor, c, basis) for c in batch]
            if dominant:
                yield batch, AblationBatch(original, rest=parts.rests(batch), factors=factors)
            else:
                yield batch, AblationBatch(original, cell=parts.unpack(batch), factors=factors)


class _PwccaQueue:
    """Canonical variates waiting for a pass over x that computes their weights."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], memory: int) -> None:
        self.weigh, self.memory = weigh, memory
        self.batches: list[tuple[DistanceTable, list[int], Tensor, Tensor, Route]] = []

    def add(
        self, table: DistanceTable, cells: list[int], h: Tensor, rho: Tensor, route: Route
    ) -> None:
        """Add variates h (B, k, n) and correlations rho (B, k), one per cell or one for all."""
        self.batches.append((table, cells, h, rho, route))
        if sum(h.numel() for _, _, h, _, _ in self.batches) * 16 > self.memory:
            self.flush()

    def flush(self) -> None:
        """Weigh the waiting variates and record their distances."""
        if not self.batches:
            return
        rows = [h.flatten(0, 1) for _, _, h, _, _ in self.batches]
        weights = self.weigh(torch.cat(rows)).split([len(h) for h in rows])
        for (table, cells, _, rho, route), part in zip(self.batches, weights, strict=True):
            alpha = part.view(rho.shape)
            table.record("pwcca", cells, 1 - (alpha * rho).sum(-1) / alpha.sum(-1), route)
        self.batches.clear()
