"""Metrics of distances between stimuli for each ablation: RSA, RBF CKA and mutual kNN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.ablated_stimuli import (
    CellStimuli,
    GramStimuli,
    StimulusDistances,
    Whole,
)
from repsim_kernels.kernels.torch.ablation_parts import CellParts, GramParts
from repsim_kernels.kernels.torch.distance_table import DistanceTable
from repsim_kernels.kernels.torch.distances import rbf
from repsim_kernels.kernels.torch.nearest import are_apart, order_by_distance
from repsim_kernels.kernels.torch.rsa import compare_pairs

# The distances between stimuli, and the metrics that compare them.
METRICS = {
    "euclidean": ("rsa_euclidean", "cka_rbf"),
    "cosine": ("rsa_cosine", "mutual_knn"),
    "correlation": ("rsa_correlation",),
}


def is_needed(metrics: tuple[str, ...]) -> bool:
    """Whether any of the metrics compares distances between stimuli."""
    return any(name in metrics for names in METRICS.values() for name in names)


@dataclass
class StimulusMetrics:
    """The metrics' options, and what all sets of parts share."""

    compare: str = "spearman"
    sigma: float = 1.0
    k: int = 10
    whole: Whole | None = None

    def record(self, parts: GramParts, table: DistanceTable) -> None:
        """Record the distances of all parts that change the whole and leave something."""
        stimuli = GramStimuli(parts)
        if isinstance(parts, CellParts):
            stimuli = CellStimuli(parts, self.whole)
            self.whole = stimuli.known
        for distance, names in METRICS.items():
            metrics = [name for name in names if name in table.metrics]
            if metrics:
                self._record_distance(stimuli, distance, metrics, table)

    def _record_distance(
        self, stimuli: GramStimuli, distance: str, metrics: list[str], table: DistanceTable
    ) -> None:
        active = stimuli.active(distance)
        original = stimuli.measure(distance, None)
        if not original.find_defined():
            for name in metrics:
                table.record(name, active, math.nan)
            return
        features = {name: self._describe(name, original, distance) for name in metrics}
        for batch in gram.iter_batches(active, stimuli.parts.whole):
            ablated = stimuli.measure(distance, batch)
            kept = ablated.find_defined()
            undefined = [c for i, c in enumerate(batch) if i not in kept]
            if kept:
                ablated = ablated.select(kept)
            for name, feature in features.items():
                table.record(name, undefined, math.nan)
                if kept:
                    values = self._compare(name, feature, self._describe(name, ablated, distance))
                    table.record(name, [batch[i] for i in kept], values, ablated.routes)

    def _describe(self, metric: str, stimuli: StimulusDistances, distance: str) -> Tensor:
        """Return what a metric compares: unit vectors (B, m), or neighbours (B, n, k)."""
        if metric == "mutual_knn":
            return find_neighbours(stimuli, self.k)
        if metric == "cka_rbf":
            return make_kernels(stimuli.squared, self.sigma)
        return make_dissimilarities(stimuli, distance, self.compare)

    def _compare(self, metric: str, original: Tensor, ablated: Tensor) -> Tensor:
        """Return the distances (B,) between descriptions of the original and of B copies."""
        if metric == "mutual_knn":
            return count_lost(original[0], ablated)
        # 1 minus the cosine of unit vectors, without its cancellation.
        return (ablated - original).square_().sum(1).div_(2)


def make_dissimilarities(stimuli: StimulusDistances, distance: str, compare: str) -> Tensor:
    """Return the unit vectors (B, n(n - 1)/2) that RSA compares; NaN where they are undefined."""
    b, n, _ = stimuli.squared.shape
    device = stimuli.squared.device
    i, j = torch.triu_indices(n, n, 1, device=device)
    squared = stimuli.squared.flatten(1).index_select(1, i * n + j)
    starts = torch.arange(0, b * n, n, device=device)[:, None]
    pairs = stimuli.errors.list_pairs(
        squared.flatten(), (starts + i).flatten(), (starts + j).flatten()
    )
    return compare_pairs(pairs, distance, compare, torch.empty_like(squared))


def make_kernels(squared: Tensor, sigma: float) -> Tensor:
    """Return centred RBF kernels as unit vectors (B, n²); NaN where they are undefined."""
    kernel = gram.double_centre(rbf(squared, sigma))
    return torch.nn.functional.normalize(kernel.flatten(1), dim=1, eps=0)


def find_neighbours(stimuli: StimulusDistances, k: int) -> Tensor:
    """Return the k nearest other stimuli of each, (B, n, k); -1 in copies that have none.

    Which tie, and in which order they count, is that of `find_nearest`.
    """
    b, n, _ = stimuli.squared.shape
    squared, errors = stimuli.squared, stimuli.errors
    device = squared.device
    rows, starts = torch.arange(b * n, device=device), torch.arange(0, b * n, n, device=device)
    starts = starts.repeat_interleave(n)[:, None]
    first = rows[::n].repeat_interleave(n)
    from_first = errors.list_pairs(squared[:, 0].flatten(), first, rows)
    has_distances = (from_first.squared > from_first.full_tolerance()).view(b, n).any(1)
    squared = squared.flatten(0, 1).clone()
    squared.scatter_(1, rows[:, None] - starts, torch.inf)
    values, nearest = squared.topk(k + 1, dim=1, largest=False)
    nearest = nearest[:, :k]
    apart = are_apart(errors, rows, nearest + starts, values[:, :k], values[:, k])
    tied = (~apart).nonzero()[:, 0]
    if len(tied):
        order, _ = order_by_distance(errors, tied, squared[tied], starts[tied])
        nearest = nearest.index_copy(0, tied, order[:, :k])
    return nearest.view(b, n, k).masked_fill(~has_distances[:, None, None], -1)


def count_lost(original: Tensor, ablated: Tensor) -> Tensor:
    """Return the share of the original's neighbours (n, k) that each copy (B, n, k) lacks, (B,)."""
    n, k = original.shape
    is_original = torch.zeros(n, n, dtype=torch.bool, device=original.device)
    is_original.scatter_(1, original.clamp(min=0), value=True)
    shared = is_original.expand(len(ablated), n, n).gather(2, ablated.clamp(min=0)).sum((1, 2))
    lost = (n * k - shared).to(torch.float64) / (n * k)
    undefined = (original[:1, 0] < 0) | (ablated[:, 0, 0] < 0)
    return lost.masked_fill_(undefined, torch.nan)
