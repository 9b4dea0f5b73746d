"""Measure the rows of a study: one pass over the images per group of layers, then each cell."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor

import repsim_kernels as rk
from repsim_kernels.experiments.columns import BASELINE, HALVES, NAN_IMAGES, half_column
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study.memory import (
    BATCH,
    bytes_held,
    choose_batch_size,
    group_layers,
)
from repsim_kernels.experiments.study.performance import measure_performance_loss
from repsim_kernels.experiments.study.probes import (
    list_columns,
    make_seed,
    measure_decodability,
)
from repsim_kernels.experiments.study.units import Unit
from repsim_kernels.forward import State

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

_BLOCK_NEURONS = 2**12  # neurons per block when variances are computed
_MAX_VARIATE_BYTES = 2**30  # upper bound in bytes on the canonical variates that PWCCA buffers


@dataclass
class LayerActivations:
    """A layer's activations (n, p), sorted by class, and where ablated passes resume.

    ``states`` holds, for each target class, the network's state at the layer, batch by batch.
    """

    x: Tensor
    labels: Tensor
    states: dict[int, list[State]] = field(default_factory=dict)


def rows(study: Study, units: Sequence[Unit]) -> Iterator[pd.DataFrame]:
    """Measure units of a study.

    Parameters
    ----------
    study : Study
    units : sequence of Unit
        Units of this study, layer by layer.

    Yields
    ------
    DataFrame
        For each unit, in order: one row per target class and cell.

    Raises
    ------
    StudyError
        A layer's activations are not finite, the memory is too small for a layer, or the
        network's weights have changed.
    """
    tables = _iter_rows(study, units)
    while True:
        # Between units the network is restored for the caller.
        with study.hold_network(), torch.no_grad():
            table = next(tables, None)
        if table is None:
            return
        yield table


def describe(study: Study) -> dict[str, Any]:
    """Collect facts about a study that the configuration does not hold, for its readers.

    Raises
    ------
    StudyError
        The memory is too small for a layer, or the network's weights have changed.
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
    """Yield each unit's rows, group of layers by group of layers."""
    blocks: dict[str, list[list[int]]] = {}
    for unit in units:
        blocks.setdefault(unit.layer, []).append(study.targets_of(unit))
    sizes = bytes_held(study)
    # Groups cover all layers, and free memory is counted as if a whole group were held, whichever
    # units are measured: rounding depends on what is batched together, and a resumed run must give
    # bit-identical rows.
    for group in group_layers(study, study.layers):
        measured_layers = [layer for layer in group if layer in blocks]
        labels = {label for layer in measured_layers for block in blocks[layer] for label in block}
        activations = _collect_activations(study, measured_layers, labels)
        for layer in measured_layers:
            still_held = sum(sizes[name] for name in group[group.index(layer) :])
            free_bytes = (study.memory - still_held) // 2
            for block in blocks[layer]:
                yield _measure_block(study, layer, block, activations[layer], free_bytes)
            del activations[layer]


def _collect_activations(
    study: Study, layers: Sequence[str], targets: set[int]
) -> dict[str, LayerActivations]:
    """Pass all images once, and keep the layers' activations and the targets' states."""
    y = torch.cat(
        [torch.full((study.count_metric_images(label),), label) for label in study.unique_labels]
    )
    by_layer: dict[str, LayerActivations] = {}
    if not layers:
        return by_layer
    row, size = 0, choose_batch_size(study)
    for label in study.unique_labels:
        images = study.images[study.labels == label]
        remaining = study.count_metric_images(label)
        # Batches don't depend on the layers and targets: a resumed run gives bit-identical rows.
        for batch in torch.split(images, size):
            if not remaining and label not in targets:
                break
            states = study.forward.prefixes(batch.to(study.device), layers)
            count = min(remaining, len(batch))
            for layer in layers:
                state = states.pop(layer)
                if layer not in by_layer:
                    p = study.sizes[layer].neurons
                    by_layer[layer] = LayerActivations(state.activation.new_empty(len(y), p), y)
                activations = by_layer[layer]
                if count == len(state):
                    state.move(activations.x[row : row + count])
                else:
                    activations.x[row : row + count] = state.activation[:count].flatten(1)
                if label in targets:
                    activations.states.setdefault(label, []).append(state)
            remaining -= count
            row += count
    return by_layer


class RepresentationResult(NamedTuple):
    """What is measured on one layer's activations for one target."""

    cells: Tensor  # (p,) labels or (C, p) membership
    sizes: Tensor  # (C,) number of neurons
    distances: dict[str, Any]
    decodability: dict[str, Any]


def _measure_block(
    study: Study, layer: str, block: list[int], activations: LayerActivations, free_bytes: int
) -> pd.DataFrame:
    """Measure the rows of one layer and a block of target classes."""
    tables = []
    for labels in split_targets(study, block, free_bytes):
        with _name_errors(study, layer, labels):
            # The selected stimuli may be a copy, so no name here keeps them during the forward
            # passes.
            results = measure_representation(
                study,
                study.probes,
                layer,
                labels,
                *_select_stimuli(study, labels[0], activations),
                free_bytes,
            )
        for label, result in zip(labels, results, strict=True):
            tables.append(_measure_target(study, layer, label, activations, free_bytes, result))
    return pd.concat(tables, ignore_index=True)


def split_targets(study: Study, labels: list[int], free_bytes: int) -> list[list[int]]:
    """Split target classes into those that are measured together, from the same stimuli.

    Cells that share neurons are no partition and are measured alone.
    """
    count = 1
    if study.others is None and study.edges == "equal":
        gram_bytes = study.n_cells * study.n_stimuli**2 * 8
        count = max(1, free_bytes // (2 * gram_bytes))  # decodability copies some of them
    return [labels[start : start + count] for start in range(0, len(labels), count)]


@contextmanager
def _name_errors(study: Study, layer: str, labels: Sequence[int]) -> Iterator[None]:
    """Raise a StudyError that names the layer, and a single class, in place of a RepsimError."""
    try:
        yield
    except rk.RepsimError as error:
        where = f", class {study.class_name(labels[0])}" if len(labels) == 1 else ""
        raise StudyError(f"{study.name}, layer {layer}{where}: {error}") from error


def _measure_target(
    study: Study,
    layer: str,
    label: int,
    activations: LayerActivations,
    free_bytes: int,
    result: RepresentationResult,
) -> pd.DataFrame:
    """Measure the rows of one layer and target class; drops the target's states when done."""
    forward, n_cells = study.forward, study.n_cells
    states = activations.states.pop(label)
    with _name_errors(study, layer, [label]):
        # The intact logits come from the same masked pass as the ablated ones, so that the change
        # for an empty cell is exactly zero.
        no_cell = torch.full(result.cells.shape[-1:], -1)
        intact = torch.cat([forward.logits(s, no_cell, 1, memory=free_bytes)[0] for s in states])
        parts = [forward.logits(s, result.cells, n_cells, memory=free_bytes) for s in states]
    changes = measure_performance_loss(intact, torch.cat(parts, dim=1), label)
    nan_images = changes.pop(NAN_IMAGES).long()
    numbers = result.distances | changes | result.decodability
    halves = tuple(half_column("", which) for which in HALVES)
    names = sorted(numbers, key=lambda name: name.endswith(halves))  # halves last
    columns = {
        "model": study.name,
        "class": study.class_name(label),
        "layer": layer,
        "cell": np.arange(n_cells),
        "size": result.sizes.cpu().numpy(),
        NAN_IMAGES: nan_images.cpu().numpy(),
    }
    return pd.DataFrame(columns | {name: numbers[name].double().cpu().numpy() for name in names})


def _select_stimuli(
    study: Study, label: int, activations: LayerActivations
) -> tuple[Tensor, Tensor]:
    """Select activations and labels of the target and the classes it is compared with."""
    if study.others is None:
        return activations.x, activations.labels
    chosen = torch.tensor([label, *study.draw_other_classes(label)])
    index = torch.isin(activations.labels, chosen).nonzero()[:, 0]
    return activations.x[index.to(activations.x.device)], activations.labels[index]


def measure_representation(
    study: Study,
    probes: Sequence[str],
    layer: str,
    labels: Sequence[int],
    x: Tensor,
    y: Tensor,
    free_bytes: int,
) -> list[RepresentationResult]:
    """Group neurons into cells for each target; measure cells' distances, loss of decodability.

    All targets share one call of each function, and the cells' Grams. With edges="inclusive", there
    may be only one target. If the layer's activations are the same for every stimulus, all values
    are NaN, with a warning.
    """
    cells = [_make_cells(study, layer, label, x, y) for label in labels]
    overlap = cells[0].dtype == torch.bool
    sizes = [c.sum(1) if overlap else c.bincount(minlength=study.n_cells) for c in cells]
    partitions = cells[0] if overlap else torch.stack(cells)
    shape = len(labels), study.n_cells
    try:
        grams = rk.cell_grams(x, partitions)
        distances = rk.ablation_distances(
            x,
            partitions,
            metrics=study.metrics,
            ridge=study.options["ridge"],
            penalty=study.options["penalty"],
            memory=max(1, min(free_bytes, _MAX_VARIATE_BYTES)),
            grams=grams,
        )
        decodability = measure_decodability(study, probes, layer, labels, x, y, partitions, grams)
        distances[BASELINE] = _measure_energy_shares(x, cells, study.n_cells)
    except rk.ConstantError:
        warnings.warn(
            f"{study.name}, layer {layer} is the same for every stimulus: its distances and "
            "decodability are NaN",
            stacklevel=2,
        )
        nan = torch.full(shape, math.nan)
        distances = dict.fromkeys((*study.metrics, BASELINE), nan)
        decodability = dict.fromkeys(list_columns(probes), nan)
    columns = [
        {name: values.reshape(shape) for name, values in table.items()}
        for table in (distances, decodability)
    ]
    return [
        RepresentationResult(
            cells[t],
            sizes[t],
            *({name: values[t] for name, values in table.items()} for table in columns),
        )
        for t in range(len(labels))
    ]


def _make_cells(study: Study, layer: str, label: int, x: Tensor, y: Tensor) -> Tensor:
    cells: Tensor = rk.selectivity_grid(x, y, label, grid=study.grid, edges=study.edges)
    if study.cells == "random":
        generator = np.random.default_rng(make_seed(study, layer, label))
        cells = cells[..., torch.from_numpy(generator.permutation(x.shape[1])).to(cells.device)]
    return cells


def _measure_energy_shares(x: Tensor, cells: Sequence[Tensor], n_cells: int) -> Tensor:
    """Measure each cell's share of the variance over stimuli, (T, C), for T sets of cells."""
    blocks = x.split(_BLOCK_NEURONS, dim=1)
    variances = torch.cat([block.double().var(0, correction=0) for block in blocks])
    shares = []
    for each in cells:
        masks = each if each.dtype == torch.bool else (each == label for label in range(n_cells))
        shares.append(torch.stack([variances[mask].sum() for mask in masks]) / variances.sum())
    return torch.stack(shares)
