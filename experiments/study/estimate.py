"""Estimate the cost of a study from counted operations and short timings on its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repsim_kernels.experiments.study.cells import LayerCells
from repsim_kernels.experiments.study.measure import measure_representation, split_targets
from repsim_kernels.experiments.study.memory import bytes_held, choose_batch_size, group_layers
from repsim_kernels.experiments.study.probes import measure_paper_probe
from repsim_kernels.experiments.study.study import Study
from repsim_kernels.experiments.study.units import Unit
from repsim_kernels.forward import Cost

# Minimum number of neurons in the smaller of the metrics' two timings: fewer are too fast to time.
_MIN_NEURONS = 2000
_MAX_TIMED_CELLS = 64  # most cells in the smaller of the timings
_TIMED_DRAWS = 64  # timed draws of the paper's probe: a batch of fits for each of two threads


@dataclass(frozen=True)
class LayerPlan:
    """Cost of one layer: its ablated passes, metrics and probes, over all target classes."""

    layer: str
    neurons: int
    cells: int
    cells_per_batch: int
    forward_flops: float  # of the ablated passes
    metric_flops: float  # of Gram matrices and PWCCA's weights
    bytes_held: int  # activations, and states where ablated passes resume
    fits: int  # logistic regressions of the paper's probe
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Cost of one study."""

    name: str
    layers: list[LayerPlan]
    targets: int
    images: int  # mean number for each target class
    stimuli: int
    passes: int  # over all images: one per group of layers, or per unit
    pass_flops: float  # of all passes
    pass_seconds: float
    bytes_held: int  # of the group of layers that holds the most
    memory: int

    @property
    def seconds(self) -> float:
        return self.pass_seconds + sum(line.seconds for line in self.layers)

    @property
    def flops(self) -> float:
        each = (line.forward_flops + line.metric_flops for line in self.layers)
        return self.pass_flops + sum(each)


def plan(study: Study, units: Sequence[Unit] | None = None, separate_passes: bool = False) -> Plan:
    """Estimate a study's operations, memory and time, from a few passes and small metrics.

    Parameters
    ----------
    study : Study
    units : sequence of Unit, optional
        The units to measure, at least one; all by default.
    separate_passes : bool
        Whether each unit makes its own pass, up to its layer, as when workers share the units.

    Returns
    -------
    Plan
        A multiply-add counts as two operations. Seconds are an estimate: dead cells, which need
        no pass, are not known yet.

    Raises
    ------
    StudyError
        The memory is too small for a layer, or the network's weights have changed.
    """
    units = study.units if units is None else units
    names = list(dict.fromkeys(unit.layer for unit in units))
    counts = [int((study.labels == label).sum()) for label in study.targets]
    per_target = sum(counts) / len(counts)
    n = min(choose_batch_size(study), round(per_target))
    with study.hold_network():
        images = study.images[study.labels == study.targets[0]][:n].to(study.device)
        costs = study.forward.costs(images, names)
        time_metrics = _time_metrics(study)
        per_fit = _time_fits(study) if "paper" in study.probes else 0.0
    any_cost = costs[names[0]]  # at every layer, head + tail is a whole pass
    whole_flops = any_cost.head_flops + any_cost.tail_flops
    per_image = (any_cost.head_seconds + any_cost.tail_seconds) / len(images)
    speed = whole_flops / per_image
    sizes = bytes_held(study)
    grouped = [group for group in group_layers(study, study.layers) if set(group) & set(names)]
    heads = [(costs[unit.layer].head_flops, costs[unit.layer].head_seconds) for unit in units]
    passes = heads if separate_passes else [(whole_flops, per_image * len(images))] * len(grouped)
    lines = []
    for name in names:
        cost, p, n_cells = costs[name], study.sizes[name].neurons, study.count_cells(name)
        targets = sum(len(study.targets_of(unit)) for unit in units if unit.layer == name)
        ablated_images = targets * n_cells * per_target
        shares_cells = bool(study.fixed_cells) and study.others is None
        n_measured = sum(unit.layer == name for unit in units) if shares_cells else targets
        spectral = 1 + n_cells * ("pwcca" in study.metrics)
        fits = targets * (1 + n_cells) * study.draws.count_for(p) if "paper" in study.probes else 0
        lines.append(
            LayerPlan(
                layer=name,
                neurons=p,
                cells=n_cells,
                cells_per_batch=min(cost.together, n_cells),
                forward_flops=ablated_images * cost.tail_flops,
                metric_flops=n_measured * 2.0 * study.n_stimuli**2 * p * spectral,
                bytes_held=sizes[name],
                fits=fits,
                seconds=ablated_images * _estimate_tail_seconds(cost, len(images), speed)
                + targets * time_metrics(p, n_cells)
                + fits * per_fit,
            )
        )
    return Plan(
        name=study.name,
        layers=lines,
        targets=len({label for unit in units for label in study.targets_of(unit)}),
        images=round(per_target),
        stimuli=study.n_stimuli,
        passes=len(passes),
        pass_flops=sum(flops for flops, _ in passes) * len(study.labels),
        pass_seconds=sum(seconds for _, seconds in passes) * len(study.labels) / len(images),
        bytes_held=max(sum(sizes[name] for name in group if name in names) for group in grouped),
        memory=study.memory,
    )


def _estimate_tail_seconds(cost: Cost, n: int, speed: float) -> float:
    """Estimate seconds per image and cell after the layer, at full speed if cells are batched."""
    alone = cost.tail_seconds / n
    return alone if cost.together == 1 else min(alone, cost.tail_flops / speed)


def _time_metrics(study: Study) -> Callable[[int, int], float]:
    """Time a target's cells, distances and ridge probe: a function of the neurons and the cells.

    The time is linear in both. Targets that are measured together are timed together, since they
    share the pass over the neurons: two of them if each has a grid of its own.
    """
    _, y = _list_labels(study)
    own = bool(study.fixed_cells)
    count = study.block if own else min(2, study.block)
    targets = split_targets(study, study.targets[:count], 2**30)[0]
    probes = [name for name in study.probes if name != "paper"]
    cells = min(study.count_cells(layer) for layer in study.layers)
    cells = min(cells, _MAX_TIMED_CELLS) if own else cells
    few = max(_MIN_NEURONS, cells, len(y))
    # The first run also loads libraries. Grids have as many cells in all layers.
    shapes = [(few, cells), (few, cells), (5 * few, cells), *([(few, 3 * cells)] if own else [])]
    times = []
    for p, n_cells in shapes:
        x = _draw_activations(len(y), p, study.device)
        fixed = LayerCells(torch.arange(p) % n_cells, n_cells) if own else None
        start = time.perf_counter()
        results = measure_representation(study, probes, "plan", targets, x, y, 2**30, fixed)
        results[-1].cells.sizes.cpu()  # waits for the device
        times.append((time.perf_counter() - start) / len(targets))
    first, per_neuron = times[1], max(0.0, times[2] - times[1]) / (4 * few)
    per_cell = max(0.0, times[3] - times[1]) / (2 * cells) if own else 0.0

    def estimate(p: int, n_cells: int) -> float:
        seconds = first + per_neuron * (p - few) + per_cell * (n_cells - cells)
        return max(0.0, seconds)

    return estimate


def _list_labels(study: Study) -> tuple[int, Tensor]:
    """Return the first target, and the labels of all stimuli in its metrics."""
    target = study.targets[0]
    classes = (
        study.unique_labels if study.others is None else [target, *study.draw_other_classes(target)]
    )
    return target, torch.cat(
        [torch.full((study.count_metric_images(label),), label) for label in classes]
    )


def _time_fits(study: Study) -> float:
    """Time the paper's probe: seconds per logistic regression."""
    target, y = _list_labels(study)
    n_cells = min(study.count_cells(study.layers[0]), _MAX_TIMED_CELLS)
    x = _draw_activations(len(y), _MIN_NEURONS, study.device)
    cells = torch.arange(_MIN_NEURONS) % n_cells
    times = []
    for draws in (2, _TIMED_DRAWS):  # the first run also loads libraries
        start = time.perf_counter()
        measure_paper_probe(study, "plan", target, x, y, cells, draws)
        times.append(time.perf_counter() - start)
    return times[1] / (_TIMED_DRAWS * (1 + n_cells))


def _draw_activations(n: int, p: int, device: torch.device) -> Tensor:
    """Draw activations like a ReLU layer's; timings on zeros would mislead."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, p, generator=generator).relu_().to(device)
