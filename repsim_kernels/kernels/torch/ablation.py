"""Every metric between a representation and each of its ablations, from one pass over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

_MEMORY = 2**30


@dataclass(frozen=True)
class Passes:
    """What reads all of x: the Grams of its cells, and the weights of directions."""

    cell_sums: Callable[[Tensor, np.ndarray, int, bool], tuple[panels.Panels, Tensor, Tensor]]
    variate_weights: Callable[[Tensor, Tensor], Tensor]


PASSES = Passes(gram.cell_sums, variate_weights)


class GramParts:
    """The Gram of a whole, those of its parts, and of what is left without each."""

    def __init__(
        self, whole: Tensor, grams: panels.Panels, constant: list[bool], n_remaining: list[int]
    ) -> None:
        """Grams (n, n) and (C, n, n); which parts are nothing, and how many neurons they leave."""
        self.whole, self.grams, self.constant, self.n_remaining = (
            whole,
            grams,
            constant,
            n_remaining,
        )
        energy = panels.diagonal(grams).sum(1)
        self.dominant = (energy / whole.diagonal().sum() > 0.5).tolist()

    @property
    def active(self) -> list[int]:
        """The parts that change the whole and leave something of it."""
        return [
            c for c in range(len(self.n_remaining)) if self.n_remaining[c] and not self.constant[c]
        ]

    def some(self, parts: list[int]) -> panels.Panels:
        """The Grams of some parts, in order; a view where they follow each other."""
        first, end = parts[0], parts[-1] + 1
        return panels.select(self.grams, slice(first, end) if end - first == len(parts) else parts)

    def rest(self, c: int) -> Tensor:
        """K_c, the Gram of what is left without a part."""
        return self.whole - panels.unpack(panels.select(self.grams, c))

    def factor(self, c: int, basis: Tensor) -> Tensor | None:
        """T (m, r) with T Tᵀ = basisᵀ K_c basis, where there is better than K_c to make it from."""
        return None


class CellParts(GramParts):
    """The parts that the cells of x (n, p) make."""

    def __init__(
        self,
        x: Tensor,
        cells: np.ndarray,
        n_cells: int,
        shifts: bool = False,
        passes: Passes = PASSES,
    ) -> None:
        """shifts: whether ``shift`` (C, n) is wanted, B_c μ_c for each cell."""
        self.x, self.cells = x, cells
        if cells.ndim == 1:
            # The neurons in no cell make one more, so that one pass gives the whole as well.
            labels = columns.labelled(cells, n_cells)
            g, live, shift = passes.cell_sums(x, labels, n_cells + 1, shifts)
            whole, alive = panels.unpack([(own, panel.sum(0)) for own, panel in g]), live.sum()
        else:
            g, live, shift = passes.cell_sums(x, cells, n_cells, shifts)
            everything = np.zeros(x.shape[1], dtype=np.int64)
            one, (alive,), _ = passes.cell_sums(x, everything, 1, False)
            (whole,) = panels.unpack(one)
        live, self.shift, g = live[:n_cells], shift[:n_cells], panels.select(g, slice(n_cells))
        super().__init__(whole, g, (live == 0).tolist(), (alive - live).tolist())

    def outside(self, c: int) -> Tensor:
        """The columns of x that are not in a cell."""
        inside = self.cells == c if self.cells.ndim == 1 else self.cells[c]
        return columns.take(self.x, torch.from_numpy(np.flatnonzero(~inside)).to(self.x.device))

    def rest(self, c: int) -> Tensor:
        """K_c; where a cell holds most of the energy, by a pass: the difference would cancel."""
        return gram.linear(self.outside(c)) if self.dominant[c] else super().rest(c)

    def factor(self, c: int, basis: Tensor) -> Tensor:
        """The features themselves, or, of many, a triangle that is built block by block."""
        outside = self.outside(c)
        n, count = outside.shape
        if count <= basis.shape[1]:
            return basis.mT @ gram.centre(outside)
        triangle = basis.new_zeros(0, basis.shape[1])
        for block in panels.blocks(count, n):
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
        column = self.columns[metric]
        own = torch.tensor(cells, dtype=torch.int64, device=column.values.device)
        column.values[own], column.route[own], column.steps[own] = values, route, steps

    def result(self) -> dict[str, Distances]:
        # Rounding must not make one negative.
        return {
            name: column._replace(values=column.values.clamp(min=0))
            for name, column in self.columns.items()
        }


def ablation_distances(
    x: Tensor,
    *,
    cells: np.ndarray,
    n_cells: int,
    metrics: tuple[str, ...],
    ridge: float,
    penalty: float,
    memory: int | None,
    passes: Passes = PASSES,
    solvers: Solvers = SOLVERS,
) -> dict[str, Distances]:
    parts = CellParts(x, cells, n_cells, passes=passes)

    def original() -> Original:
        whole = Representation(x, parts.whole)
        return Original(whole.spectrum, whole.n, whole.p, ridge, penalty, solvers)

    def weigh(directions: Tensor) -> Tensor:
        return passes.variate_weights(directions, x)

    return distances(parts, original, metrics, weigh, memory or _MEMORY)


def distances(
    parts: GramParts,
    original: Callable[[], Original],
    metrics: tuple[str, ...],
    weigh: Callable[[Tensor], Tensor] | None = None,
    memory: int = 0,
) -> dict[str, Distances]:
    """The distances of the whole from what is left of it without each part.

    "pwcca" needs ``weigh``, which takes directions (k, n) and returns their weights (k,), and holds
    as many bytes of directions as ``memory``.
    """
    found = DistanceTable(metrics, len(parts.n_remaining), parts.whole.device)
    for name in ("cka", "cka_debiased"):
        if name in metrics:
            _cka_distances(parts, name, found)
    if set(metrics) - {"cka", "cka_debiased"}:
        _spectral_distances(parts, original(), found, weigh, memory)
    nothing = [c for c, count in enumerate(parts.n_remaining) if not count]
    for name in metrics:
        found.record(name, nothing, torch.nan)
    return found.result()


def _cka_distances(parts: GramParts, metric: str, found: DistanceTable) -> None:
    flat = functools.partial(gram.to_vectors, u_centred=metric == "cka_debiased")
    # Of halves of matrices inner products are half, and so are what rounding may leave of them.
    (whole,), floor = flat(panels.panels_view(parts.whole[None])), cka.rounding(parts.whole) / 2
    whole = whole * cka.nan_if_not_above(cka.squared_norm(whole), floor).sign()
    light = [c for c in parts.active if not parts.dominant[c]]
    batches = list(gram.iter_batches(light, whole))
    room = whole.new_empty(len(batches[0]), len(whole)) if batches else None
    distances = [
        cka.cosine_distance(flat(parts.some(batch), room=room), whole, False, floor)
        for batch in batches
    ]
    if light:
        found.record(metric, light, torch.cat(distances), Route.SUMS)
    for c in parts.active:
        if parts.dominant[c]:
            rest = parts.rest(c)
            m, least = flat(panels.panels_view(rest[None])), cka.rounding(rest) / 2
            found.record(metric, [c], cka.cosine_distance(m, whole, True, least), Route.SUMS)


def _spectral_distances(
    parts: GramParts,
    original: Original,
    found: DistanceTable,
    weigh: Callable[[Tensor], Tensor] | None,
    memory: int,
) -> None:
    names = set(found.columns) & {"procrustes", "svcca"}
    if original.kappa > 0:
        # Without a ridge the rest of the neurons is a part of the original's span: distance 0.
        names |= set(found.columns) & {"cca", "cca_squared", "pwcca"}
    queue = _PwccaQueue(weigh, found, memory) if weigh and "pwcca" in names else None
    constant = [c for c, nothing in enumerate(parts.constant) if nothing]
    for name in names - {"pwcca"}:
        found.record(name, constant, original.self_distance(name))
    if constant and queue:
        queue.add(constant, original.variates[None], original.shrunk[None], Route.NOTHING)
    for cells, ablated in _ablated(parts, original):
        if "procrustes" in names:
            found.record("procrustes", cells, *ablated.procrustes())
        if "svcca" in names:
            found.record("svcca", cells, *ablated.svcca())
        if "cca" in names:
            found.record("cca", cells, *ablated.cca(vectors=queue is not None))
        if "cca_squared" in names:
            found.record("cca_squared", cells, *ablated.cca_squared())
        if queue:
            queue.add(cells, *ablated.variates(), Route.EIGENVECTORS)
    if queue:
        queue.flush()


def _ablated(parts: GramParts, original: Original) -> Iterator[tuple[list[int], AblationBatch]]:
    """Batches of ablations: those that leave fewer neurons than there are directions alone."""
    basis = original.basis
    for c in (few := [c for c in parts.active if parts.n_remaining[c] < len(original.v)]):
        yield [c], AblationBatch(original, features=parts.factor(c, basis))
    for dominant in (False, True):
        rest = [c for c in parts.active if c not in few and parts.dominant[c] == dominant]
        for batch in gram.iter_batches(rest, parts.whole):
            factors = [functools.partial(parts.factor, c, basis) for c in batch]
            if dominant:
                rests = torch.stack([parts.rest(c) for c in batch])
                yield batch, AblationBatch(original, rest=rests, factors=factors)
            else:
                yield (
                    batch,
                    AblationBatch(original, cell=panels.unpack(parts.some(batch)), factors=factors),
                )


class _PwccaQueue:
    """Canonical variates that wait for a pass over x, which weighs them."""

    def __init__(
        self, weigh: Callable[[Tensor], Tensor], found: DistanceTable, memory: int
    ) -> None:
        self.weigh, self.found, self.memory = weigh, found, memory
        self.batches: list[tuple[list[int], Tensor, Tensor, Route]] = []

    def add(self, cells: list[int], h: Tensor, rho: Tensor, route: Route) -> None:
        """Variates h (B, k, n) and correlations rho (B, k) of B cells, or of one for all."""
        self.batches.append((cells, h, rho, route))
        if sum(h.numel() for _, h, _, _ in self.batches) * 16 > self.memory:
            self.flush()

    def flush(self) -> None:
        if not self.batches:
            return
        rows = [h.flatten(0, 1) for _, h, _, _ in self.batches]
        weights = self.weigh(torch.cat(rows))
        sizes = [len(h) for h in rows]
        for (cells, _, rho, route), part in zip(self.batches, weights.split(sizes), strict=True):
            alpha = part.view(rho.shape)
            self.found.record("pwcca", cells, 1 - (alpha * rho).sum(-1) / alpha.sum(-1), route)
        self.batches.clear()
