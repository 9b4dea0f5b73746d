"""What a study is going to take: counted from its networks, timed on its device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repsim_kernels.experiments.study.measure import measure_representation
from repsim_kernels.experiments.study.memory import bytes_held, choose_batch_size, group_layers
from repsim_kernels.experiments.study.probes import measure_paper_probe
from repsim_kernels.experiments.study.study import Study
from repsim_kernels.experiments.study.units import Unit
from repsim_kernels.forward import Cost

# Neurons, at least, of the smaller of two timings of the metrics: what a clock can tell apart.
_FEW = 2000
_DRAWS = 64  # of the paper's probe that are timed: a batch of fits for each of two threads


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a study: its ablated passes, metrics and probes, for all target classes."""

    layer: str
    neurons: int
    cells_per_batch: int  # cells in a batch
    forward_flops: float  # of the ablated passes
    metric_flops: float  # of Grams, and of PWCCA's weights
    bytes_held: int  # bytes of activations, and of what ablated passes start from
    fits: int  # logistic regressions of the paper's probe
    seconds: float


@dataclass(frozen=True)
class Plan:
    """One network of a study."""

    name: str
    layers: list[LayerPlan]
    targets: int
    cells: int
    images: int  # of each target class, the mean
    stimuli: int
    passes: int  # of all images, one for each group of layers, or for each unit
    pass_flops: float  # of all of them
    pass_seconds: float
    bytes_held: int  # bytes of the group of layers that holds the most
    memory: int

    @property
    def seconds(self) -> float:
        return self.pass_seconds + sum(line.seconds for line in self.layers)

    @property
    def flops(self) -> float:
        each = (line.forward_flops + line.metric_flops for line in self.layers)
        return self.pass_flops + sum(each)


def plan(study: Study, units: Sequence[Unit] | None = None, separate_passes: bool = False) -> Plan:
    """Count and estimate what a study takes, from a few passes and small metrics.

    Parameters
    ----------
    study : Study
    units : sequence of Unit, optional
        Those that are to be measured, at least one; all by default.
    separate_passes : bool
        Whether each unit makes a pass of its own, up to its layer, as where workers share them.

    Returns
    -------
    Plan
        Operations are two for each multiply-add. An estimate of seconds: nothing is known yet of
        cells that are dead, and that take no pass.

    Raises
    ------
    StudyError
        The memory is too little for a layer, or the network's weights have changed.
    """
    units = study.units if units is None else units
    names = list(dict.fromkeys(unit.layer for unit in units))
    own = sum(int((study.labels == label).sum()) for label in study.targets) / len(study.targets)
    n = min(choose_batch_size(study), round(own))
    with study.hold_network():
        images = study.images[study.labels == study.targets[0]][:n].to(study.device)
        costs = study.forward.costs(images, names)
        fixed, by_neuron = _metric_seconds(study)
        by_fit = _fit_seconds(study) if "paper" in study.probes else 0.0
    any_cost = costs[names[0]]  # head and tail make a whole pass at every layer
    whole_flops = any_cost.head_flops + any_cost.tail_flops
    per_image = (any_cost.head_seconds + any_cost.tail_seconds) / len(images)
    speed = whole_flops / per_image
    sizes = bytes_held(study)
    grouped = [group for group in group_layers(study, study.layers) if set(group) & set(names)]
    heads = [(costs[unit.layer].head_flops, costs[unit.layer].head_seconds) for unit in units]
    shown = heads if separate_passes else [(whole_flops, per_image * len(images))] * len(grouped)
    n_cells = study.n_cells
    lines = []
    for name in names:
        cost, p = costs[name], study.sizes[name].neurons
        targets = sum(len(study.targets_of(unit)) for unit in units if unit.layer == name)
        passes = targets * n_cells * own
        spectral = 1 + n_cells * ("pwcca" in study.metrics)
        fits = targets * (1 + n_cells) * study.draws.count_for(p) if "paper" in study.probes else 0
        lines.append(
            LayerPlan(
                layer=name,
                neurons=p,
                cells_per_batch=min(cost.together, n_cells),
                forward_flops=passes * cost.tail_flops,
                metric_flops=targets * 2.0 * study.n_stimuli**2 * p * spectral,
                bytes_held=sizes[name],
                fits=fits,
                seconds=passes * _tail_seconds(cost, len(images), speed)
                + targets * (fixed + by_neuron * p)
                + fits * by_fit,
            )
        )
    return Plan(
        name=study.name,
        layers=lines,
        targets=len({label for unit in units for label in study.targets_of(unit)}),
        cells=n_cells,
        images=round(own),
        stimuli=study.n_stimuli,
        passes=len(shown),
        pass_flops=sum(flops for flops, _ in shown) * len(study.labels),
        pass_seconds=sum(seconds for _, seconds in shown) * len(study.labels) / len(images),
        bytes_held=max(sum(sizes[name] for name in group if name in names) for group in grouped),
        memory=study.memory,
    )


def _tail_seconds(cost: Cost, n: int, speed: float) -> float:
    """Of one image of one cell; at the network's own speed where several cells run together."""
    alone = cost.tail_seconds / n
    return alone if cost.together == 1 else min(alone, cost.tail_flops / speed)


def _metric_seconds(study: Study) -> tuple[float, float]:
    """Seconds of a unit's cells, distances and ridge probe: fixed, and for each neuron."""
    target, y = _labels(study)
    probes = [name for name in study.probes if name != "paper"]
    few = max(_FEW, study.n_cells, len(y))
    many = 5 * few
    times = []
    for p in (few, few, many):  # the first also loads libraries
        x = _alive(len(y), p, study.device)
        start = time.perf_counter()
        found = measure_representation(study, probes, "plan", target, x, y, 2**30)
        found.sizes.cpu()
        times.append(time.perf_counter() - start)
    by_neuron = max(0.0, times[2] - times[1]) / (many - few)
    return max(0.0, times[1] - by_neuron * few), by_neuron


def _labels(study: Study) -> tuple[int, Tensor]:
    """The first target, and the labels of the stimuli that it is told apart from."""
    target = study.targets[0]
    classes = (
        study.unique_labels if study.others is None else [target, *study.draw_other_classes(target)]
    )
    return target, torch.cat(
        [torch.full((study.count_metric_images(label),), label) for label in classes]
    )


def _fit_seconds(study: Study) -> float:
    """Seconds of a logistic regression of the paper's probe."""
    target, y = _labels(study)
    n_cells = study.n_cells
    x = _alive(len(y), _FEW, study.device)
    cells = torch.arange(_FEW) % n_cells
    times = []
    for draws in (2, _DRAWS):  # the first also loads libraries
        start = time.perf_counter()
        measure_paper_probe(study, "plan", target, x, y, cells, draws)
        times.append(time.perf_counter() - start)
    return times[1] / (_DRAWS * (1 + n_cells))


def _alive(n: int, p: int, device: torch.device) -> Tensor:
    """Activations that are like a layer's behind its ReLU: timing on zeros would be false."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, p, generator=generator).relu_().to(device)
