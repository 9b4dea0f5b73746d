"""The rows of a study: a pass of the images for as many layers as memory takes, then the cells."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor

import repsim_kernels as rk
from repsim_kernels.experiments.columns import BASELINE, HALVES, NAN_IMAGES, half
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study import probes as linear
from repsim_kernels.experiments.study.memory import (
    BATCH,
    bytes_held,
    choose_batch_size,
    group_layers,
)
from repsim_kernels.experiments.study.performance import measure_performance_loss
from repsim_kernels.experiments.study.units import Unit
from repsim_kernels.forward import State

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

_COLUMNS = 2**12  # neurons whose variance is taken at a time
_VARIATES = 2**30  # bytes, at most, for the canonical variates that wait for a pass: PWCCA


@dataclass
class LayerActivations:
    """A layer's activations, (n, p) and sorted by class, and the states of the targets' images."""

    x: Tensor
    labels: Tensor
    states: dict[int, list[State]] = field(default_factory=dict)


def rows(study: Study, units: Sequence[Unit]) -> Iterator[pd.DataFrame]:
    """Measure some units of a study.

    Parameters
    ----------
    study : Study
    units : sequence of Unit
        Some of the study's, layer by layer.

    Yields
    ------
    DataFrame, one row per target class and cell of the grid
        For each unit, in their order.

    Raises
    ------
    StudyError
        A layer's activations are not finite, the memory is too little for a layer, or the
        network's weights have changed.
    """
    measured = _iter_rows(study, units)
    while True:
        # Between units the caller has the network as it was.
        with study.hold_network(), torch.no_grad():
            table = next(measured, None)
        if table is None:
            return
        yield table


def describe(study: Study) -> dict[str, Any]:
    """What a reader of the results wants to know in addition to the configuration.

    Raises
    ------
    StudyError
        The memory is too little for a layer, or the network's weights have changed.
    """
    group_layers(study, study.layers)
    correct = torch.zeros(len(study.labels), dtype=torch.bool)
    with study.hold_network(), torch.no_grad():
        for index in torch.split(torch.arange(len(study.labels)), BATCH):
            logits = study.model(study.images[index].to(study.device))
            correct[index] = logits.argmax(1).cpu() == study.labels[index]
            correct[index] &= logits.amax(1).cpu() > -torch.inf  # no NaN, not all -inf
    gpu = study.device.type == "cuda"
    return {
        "network": type(study.model).__name__,
        "parameters": sum(p.numel() for p in study.model.parameters()),
        "accuracy": float(correct.double().mean()),
        "images": len(study.labels),
        "image_shape": list(study.images.shape[1:]),
        "image_classes": len(study.unique_labels),
        "largest_class": int(study.labels.bincount().max()),
        "outputs": logits.shape[1],
        "stimuli": study.n_stimuli,
        "note": study.note,
        "device": torch.cuda.get_device_name(study.device) if gpu else "CPU",
    }


def _iter_rows(study: Study, units: Sequence[Unit]) -> Iterator[pd.DataFrame]:
    wanted: dict[str, list[list[int]]] = {}
    for unit in units:
        wanted.setdefault(unit.layer, []).append(study.targets_of(unit))
    sizes = bytes_held(study)
    # Groups of all layers, and the room beside a whole group, whatever is wanted of it: what
    # runs together decides the bits, and a resumed run is to have the same.
    for group in group_layers(study, study.layers):
        mine = [layer for layer in group if layer in wanted]
        labels = {label for layer in mine for block in wanted[layer] for label in block}
        shown = _collect_activations(study, mine, labels)
        for layer in mine:
            left = sum(sizes[name] for name in group[group.index(layer) :])
            room = (study.memory - left) // 2
            for block in wanted[layer]:
                found = [
                    _measure_target(study, layer, label, shown[layer], room) for label in block
                ]
                yield pd.concat(found, ignore_index=True)
            del shown[layer]


def _collect_activations(
    study: Study, layers: Sequence[str], wanted: set[int]
) -> dict[str, LayerActivations]:
    """Show the network all stimuli once, and keep what these layers gave."""
    y = torch.cat(
        [torch.full((study.count_metric_images(label),), label) for label in study.unique_labels]
    )
    found: dict[str, LayerActivations] = {}
    if not layers:
        return found
    row, size = 0, choose_batch_size(study)
    for label in study.unique_labels:
        images = study.images[study.labels == label]
        left = study.count_metric_images(label)
        # The same batches whatever is wanted: a resumed run gives the same bits.
        for batch in torch.split(images, size):
            if not left and label not in wanted:
                break
            states = study.forward.prefixes(batch.to(study.device), layers)
            take = min(left, len(batch))
            for layer in layers:
                state = states.pop(layer)
                if layer not in found:
                    p = study.sizes[layer].neurons
                    found[layer] = LayerActivations(state.activation.new_empty(len(y), p), y)
                mine = found[layer]
                if take == len(state):
                    state.move(mine.x[row : row + take])
                else:
                    mine.x[row : row + take] = state.activation[:take].flatten(1)
                if label in wanted:
                    mine.states.setdefault(label, []).append(state)
            left -= take
            row += take
    return found


class RepresentationResult(NamedTuple):
    """What is said of a layer's representation for one target."""

    cells: Tensor  # (p,) labels or (C, p) membership
    sizes: Tensor  # (C,) neurons of each cell
    distances: dict[str, Any]
    decodability: dict[str, Any]


def _measure_target(
    study: Study, layer: str, label: int, shown: LayerActivations, room: int
) -> pd.DataFrame:
    where = f"{study.name}, layer {layer}"
    forward, n_cells = study.forward, study.n_cells
    states = shown.states.pop(label)
    try:
        found = measure_representation(
            study, study.probes, layer, label, *_select_stimuli(study, label, shown), room
        )
        # Ablated and intact logits by the same pass, so that an empty cell changes exactly nothing.
        none = torch.full(found.cells.shape[-1:], -1)
        intact = torch.cat([forward.logits(state, none, 1, memory=room)[0] for state in states])
        parts = [forward.logits(state, found.cells, n_cells, memory=room) for state in states]
    except rk.RepsimError as error:
        raise StudyError(f"{where}, class {study.class_name(label)}: {error}") from error
    changes = measure_performance_loss(intact, torch.cat(parts, dim=1), label)
    nan_images = changes.pop(NAN_IMAGES).long()
    numbers = found.distances | changes | found.decodability
    halves = tuple(half("", which) for which in HALVES)
    names = sorted(numbers, key=lambda name: name.endswith(halves))  # these last
    columns = {
        "model": study.name,
        "class": study.class_name(label),
        "layer": layer,
        "cell": np.arange(n_cells),
        "size": found.sizes.cpu().numpy(),
        NAN_IMAGES: nan_images.cpu().numpy(),
    }
    return pd.DataFrame(columns | {name: numbers[name].double().cpu().numpy() for name in names})


def _select_stimuli(study: Study, label: int, shown: LayerActivations) -> tuple[Tensor, Tensor]:
    """What a target is told apart from: all classes, or some that are drawn for it."""
    if study.others is None:
        return shown.x, shown.labels
    chosen = torch.tensor([label, *study.draw_other_classes(label)])
    index = torch.isin(shown.labels, chosen).nonzero()[:, 0]
    return shown.x[index.to(shown.x.device)], shown.labels[index]


def measure_representation(
    study: Study, probes: Sequence[str], layer: str, label: int, x: Tensor, y: Tensor, room: int
) -> RepresentationResult:
    """Cells, distances and changes of decodability; NaN for a layer that is the same for all."""
    cells = rk.selectivity_grid(x, y, label, grid=study.grid, edges=study.edges)
    if study.cells == "random":
        generator = np.random.default_rng(linear.make_seed(study, layer, label))
        cells = cells[..., torch.from_numpy(generator.permutation(x.shape[1])).to(cells.device)]
    overlap = cells.dtype == torch.bool
    sizes = cells.sum(1) if overlap else cells.bincount(minlength=study.n_cells)
    try:
        distances = dict(
            rk.ablation_distances(
                x,
                cells,
                metrics=study.metrics,
                ridge=study.options["ridge"],
                penalty=study.options["penalty"],
                memory=max(1, min(room, _VARIATES)),
            )
        )
        decodability = linear.measure_decodability(study, probes, layer, label, x, y, cells)
        distances |= {BASELINE: _energy_shares(x, cells, study.n_cells)}
    except rk.ConstantError:
        what = "is the same for every stimulus: its distances and decodability are NaN"
        warnings.warn(f"{study.name}, layer {layer} {what}", stacklevel=2)
        nan = torch.full((study.n_cells,), math.nan)
        distances = dict.fromkeys((*study.metrics, BASELINE), nan)
        decodability = linear.make_nan_columns(probes, study.n_cells)
    return RepresentationResult(cells, sizes, distances, decodability)


def _energy_shares(x: Tensor, cells: Tensor, n_cells: int) -> Tensor:
    """The share of the variance over stimuli that each cell's neurons have: (C,)."""
    parts = x.split(_COLUMNS, dim=1)
    neurons = torch.cat([part.double().var(0, correction=0) for part in parts])
    members = cells if cells.dtype == torch.bool else (cells == label for label in range(n_cells))
    return torch.stack([neurons[mine].sum() for mine in members]) / neurons.sum()
