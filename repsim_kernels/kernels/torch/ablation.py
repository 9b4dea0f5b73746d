"""Every metric between a representation and each of its ablations, from one pass over the data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, are_partitions
from repsim_kernels._routes import Distances, Route
from repsim_kernels.kernels.torch import cka, distance_table, gram, panels, stimulus_metrics
from repsim_kernels.kernels.torch.ablation_parts import (
    MEMORY,
    PASSES,
    GramParts,
    Passes,
    make_parts,
)
from repsim_kernels.kernels.torch.distance_table import DistanceTable
from repsim_kernels.kernels.torch.hidden_rest import HiddenRest, HiddenRests
from repsim_kernels.kernels.torch.representation import Representation
from repsim_kernels.kernels.torch.spectral_distances import (
    SOLVERS,
    AblationBatch,
    Original,
    Solvers,
)
from repsim_kernels.kernels.torch.stimulus_metrics import StimulusMetrics

_SPECTRAL = {"procrustes", "svcca", "pwcca", "cca", "cca_squared"}


def ablation_distances(
    x: Tensor,
    *,
    cells: Cells,
    n_cells: int,
    metrics: tuple[str, ...],
    ridge: float,
    penalty: float,
    memory: int | None,
    compare: str = "spearman",
    sigma: float = 1.0,
    k: int = 10,
    grams: Tensor | None = None,
    passes: Passes = PASSES,
    solvers: Solvers = SOLVERS,
) -> dict[str, Distances]:
    def make_original(gram: Tensor) -> Original:
        # The sum over a partition's cells rounds differently for each. With one Gram for all, the
        # distances of a partition do not depend on which others there are.
        if are_partitions(cells) and not passes.on_gpu:
            gram = passes.whole_gram(x)
        whole = Representation(x, gram)
        return Original(whole.spectrum, whole.n, whole.p, ridge, penalty, solvers)

    def weigh(directions: Tensor) -> Tensor:
        return passes.variate_weights(directions, x)

    memory = memory or MEMORY
    parts = make_parts(x, cells, n_cells, grams, passes, memory=memory)
    stimuli = StimulusMetrics(compare, sigma, k)
    results = distances_of_parts(parts, make_original, metrics, solvers, stimuli, weigh, memory)
    if not are_partitions(cells):
        return results
    shape = len(cells), n_cells
    return {name: Distances(*(a.reshape(shape) for a in each)) for name, each in results.items()}


def distances_of_parts(
    sets: Iterable[GramParts],
    make_original: Callable[[Tensor], Original],
    metrics: tuple[str, ...],
    solvers: Solvers,
    stimuli: StimulusMetrics,
    weigh: Callable[[Tensor], Tensor] | None = None,
    memory: int = 0,
) -> dict[str, Distances]:
    """Return the distances between the whole and the whole without each part of each set.

    All sets have the same whole: its spectrum is computed from the Gram in the first. "pwcca" needs
    ``weigh``, which takes directions (k, n) and returns their weights (k,). About ``memory`` bytes
    of directions are collected before each call of it.
    """
    original, hidden_rests, tables = None, HiddenRests(), list[DistanceTable]()
    queue = _PwccaQueue(weigh, memory) if weigh else None
    for parts in sets:
        table = DistanceTable(metrics, len(parts.n_remaining))
        tables.append(table)
        for name in ("cka", "cka_debiased"):
            if name in metrics:
                _record_cka(parts, name, table, solvers)
        if not _SPECTRAL.isdisjoint(metrics):
            original = original or make_original(parts.whole)
            _record_spectral(parts, original, hidden_rests, table, queue)
        if stimulus_metrics.is_needed(metrics):
            stimuli.record(parts, table)
        removed_all = [c for c, count in enumerate(parts.n_remaining) if not count]
        for name in metrics:
            table.record(name, removed_all, math.nan)
        device = parts.whole.device
        del parts  # before the Grams of the next set are made
    if queue:
        queue.flush()
    return distance_table.join(tables, device)


def _record_cka(parts: GramParts, metric: str, table: DistanceTable, solvers: Solvers) -> None:
    n = len(parts.whole)
    to_vectors = functools.partial(gram.to_vectors, u_centred=metric == "cka_debiased")
    # Inner products of these vectors are half of those of the matrices, and so are the floors.
    (whole,) = to_vectors(panels.panels_view(parts.whole[None], like=parts.grams))
    floor = math.sqrt(cka.rounding_floor_of_trace(parts.total, n) / 2)
    minor = [c for c in parts.active if not parts.dominant[c]]
    batches = list(gram.iter_batches(minor, whole))
    buffer = whole.new_empty(len(batches[0]), len(whole)) if batches else None
    for batch in batches:
        vectors = to_vectors(parts.select(batch), buffer=buffer)
        distance = solvers.cosine_distance(vectors, whole, False, floor, floor)
        table.record(metric, batch, distance, Route.SUMS)
    for c in parts.active:
        if parts.dominant[c]:
            rest = parts.rests([c])
            vector = to_vectors(panels.panels_view(rest, like=parts.grams))
            rest_floor = (cka.rounding_floor(rest[0]) / 2).sqrt()
            distance = solvers.cosine_distance(vector, whole, True, floor, rest_floor)
            table.record(metric, [c], distance, Route.SUMS)


def _record_spectral(
    parts: GramParts,
    original: Original,
    hidden_rests: HiddenRests,
    table: DistanceTable,
    queue: _PwccaQueue | None,
) -> None:
    names = set(table.metrics) & {"procrustes", "svcca"}
    if original.kappa > 0:
        # Without a ridge CCA compares spans, and the ablated one lies within the original's: 0.
        names |= set(table.metrics) & {"cca", "cca_squared", "pwcca"}
    if "pwcca" not in names:
        queue = None
    constant = [c for c, is_constant in enumerate(parts.constant) if is_constant]
    for name in names - {"pwcca"}:
        table.record(name, constant, original.self_distance(name))
    if constant and queue:
        variates, rho = original.variates[None], original.shrunk[None]
        queue.add(table, constant, variates, rho, Route.NOTHING)
    for cells, batch in _iter_ablations(parts, original, hidden_rests):
        if "procrustes" in names:
            table.record("procrustes", cells, *batch.procrustes())
        if "svcca" in names:
            table.record("svcca", cells, *batch.svcca())
        if "cca" in names:
            table.record("cca", cells, *batch.cca(vectors=queue is not None))
        if "cca_squared" in names:
            table.record("cca_squared", cells, *batch.cca_squared())
        if queue:
            queue.add(table, cells, *batch.variates(), batch.variates_route)


def _iter_ablations(
    parts: GramParts, original: Original, hidden_rests: HiddenRests
) -> Iterator[tuple[list[int], AblationBatch | HiddenRest]]:
    """Yield batches of ablations.

    One that leaves fewer neurons than directions, or hides the rest, comes alone.
    """
    basis = original.basis
    active = [c for c in parts.active if not parts.hides_rest[c]]
    deficient = [c for c in active if parts.n_remaining[c] < len(original.v)]
    for c in deficient:
        yield [c], AblationBatch(original, features=parts.factor(c, basis))
    for dominant in (False, True):
        cells = [c for c in active if c not in deficient and parts.dominant[c] == dominant]
        for batch in gram.iter_batches(cells, parts.whole):
            factors = [functools.partial(parts.factor, c, basis) for c in batch]
            if dominant:
                yield batch, AblationBatch(original, rest=parts.rests(batch), factors=factors)
            else:
                yield batch, AblationBatch(original, cell=parts.unpack(batch), factors=factors)
    for c in (c for c in parts.active if parts.hides_rest[c]):
        yield [c], hidden_rests.find(parts, c, original)


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
        directions = torch.cat(rows) if len(rows) > 1 else rows[0]
        weights = self.weigh(directions).split([len(h) for h in rows])
        for (table, cells, _, rho, route), part in zip(self.batches, weights, strict=True):
            alpha = part.view(rho.shape)
            table.record("pwcca", cells, 1 - (alpha * rho).sum(-1) / alpha.sum(-1), route)
        self.batches.clear()
