"""Measure the rows of a study: one pass over the images per group of layers, then each cell."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor

import repsim_kernels as rk
from repsim_kernels.experiments.columns import BASELINE, HALVES, NAN_IMAGES, half_column
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study.activations import LayerActivations, collect_activations
from repsim_kernels.experiments.study.cells import LayerCells
from repsim_kernels.experiments.study.memory import BATCH, bytes_held, group_layers
from repsim_kernels.experiments.study.performance import measure_performance_loss
from repsim_kernels.experiments.study.probes import (
    list_columns,
    make_seed,
    measure_paper_probes,
    measure_ridge_probes,
)
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

_BLOCK_NEURONS = 2**12  # neurons per block when variances are computed
_SCORE_BYTES = 48  # bytes per logit of the logits of some cells and what is measured on them
_MIN_CELLS = 64  # cells whose logits are always held together
_MAX_VARIATE_BYTES = 2**30  # upper bound in bytes on the canonical variates that PWCCA buffers


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
        activations = collect_activations(study, measured_layers, labels)
        for layer in measured_layers:
            still_held = sum(sizes[name] for name in group[group.index(layer) :])
            free_bytes = (study.memory - still_held) // 2
            for block in blocks[layer]:
                yield _measure_block(study, layer, block, activations[layer], free_bytes)
            del activations[layer]


class RepresentationResult(NamedTuple):
    """What is measured on one layer's activations for one target."""

    cells: LayerCells
    fill: Tensor | None  # (p,) what ablated neurons are set to, if not to zero
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
                study.fixed_cells.get(layer),
            )
        for label, result in zip(labels, results, strict=True):
            tables.append(_measure_target(study, layer, label, activations, free_bytes, result))
    return pd.concat(tables, ignore_index=True)


def split_targets(study: Study, labels: list[int], free_bytes: int) -> list[list[int]]:
    """Split target classes into those that are measured together, from the same stimuli.

    Grids whose cells share neurons are no partitions and are measured alone.
    """
    count = 1
    if study.others is None and study.fixed_cells:
        count = len(labels)
    elif study.others is None and study.edges == "equal":
        count = max(1, _count_grams(study.n_stimuli, free_bytes) // math.prod(study.grid))
    return [labels[start : start + count] for start in range(0, len(labels), count)]


def _count_grams(n: int, free_bytes: int) -> int:
    """Count the Grams (n, n) of cells that fit in memory; decodability copies some of them."""
    return free_bytes // (2 * 8 * n**2)


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
    forward, cells = study.forward, result.cells
    states = activations.states.pop(label)
    fill = "zero" if result.fill is None else result.fill.view(study.sizes[layer].shape)
    parts = []
    with _name_errors(study, layer, [label]):
        # The intact logits come from the same masked pass as the ablated ones, so that the change
        # for an empty cell is exactly zero.
        no_cell = torch.full((study.sizes[layer].neurons,), -1)
        intact = torch.cat([forward.logits(s, no_cell, 1, memory=free_bytes)[0] for s in states])
        cells_together = free_bytes // (_SCORE_BYTES * intact.numel())
        for part in cells.split(max(_MIN_CELLS, cells_together)):
            logits = [
                forward.logits(s, part.assignment, part.count, fill=fill, memory=free_bytes)
                for s in states
            ]
            parts.append(measure_performance_loss(intact, torch.cat(logits, dim=1), label))
    changes = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    nan_images = changes.pop(NAN_IMAGES).long()
    numbers = result.distances | changes | result.decodability
    halves = tuple(half_column("", which) for which in HALVES)
    names = sorted(numbers, key=lambda name: name.endswith(halves))  # halves last
    columns = {
        "model": study.name,
        "class": study.class_name(label),
        "layer": layer,
        "cell": np.arange(cells.count),
        "size": cells.sizes.cpu().numpy(),
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
    fixed: LayerCells | None = None,
) -> list[RepresentationResult]:
    """Measure cells' distances and loss of decodability for each target.

    The cells are `fixed`, which serve all targets, or a grid for each target. All targets share one
    call of each function, and the cells' Grams. There may be only one target whose grid has
    edges="inclusive". If the layer's activations are the same for every stimulus, all values are
    NaN, with a warning.
    """
    fill = x.mean(0, dtype=torch.float64).to(x.dtype) if study.fill == "mean" else None
    if fixed is None:
        cells = [_make_grid(study, layer, label, x, y) for label in labels]
        grids: list[Any] = [each.assignment for each in cells]
        runs = grids if cells[0].overlap else [torch.stack(grids)]
    else:
        own = fixed.to(x.device)
        cells = [own] * len(labels)
        size = max(1, _count_grams(len(x), free_bytes))
        runs = [own.assignment]
        if size < own.count:
            runs = [run.to_sparse() for run in own.split(size)]
    try:
        parts = [_measure_cells(study, probes, labels, x, y, fill, run, free_bytes) for run in runs]
        columns = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        columns[BASELINE] = torch.stack([_measure_energy_shares(x, each) for each in cells])
        if "paper" in probes:
            columns |= measure_paper_probes(study, layer, labels, x, y, cells)
    except rk.ConstantError:
        warnings.warn(
            f"{study.name}, layer {layer} is the same for every stimulus: its distances and "
            "decodability are NaN",
            stacklevel=2,
        )
        nan = torch.full((len(labels), cells[0].count), math.nan)
        columns = dict.fromkeys((*study.metrics, BASELINE, *list_columns(probes)), nan)
    return [
        RepresentationResult(
            cells[t],
            fill,
            {name: columns[name][t] for name in (*study.metrics, BASELINE)},
            {name: columns[name][t] for name in list_columns(probes)},
        )
        for t in range(len(labels))
    ]


def _make_grid(study: Study, layer: str, label: int, x: Tensor, y: Tensor) -> LayerCells:
    """Group neurons by selectivity for a target and by magnitude, or at random."""
    cells: Tensor = rk.selectivity_grid(x, y, label, grid=study.grid, edges=study.edges)
    if study.cells == "random":
        generator = np.random.default_rng(make_seed(study, layer, label))
        cells = cells[..., torch.from_numpy(generator.permutation(x.shape[1])).to(cells.device)]
    return LayerCells(cells, math.prod(study.grid))


def _measure_cells(
    study: Study,
    probes: Sequence[str],
    labels: Sequence[int],
    x: Tensor,
    y: Tensor,
    fill: Tensor | None,
    cells: Any,
    free_bytes: int,
) -> dict[str, Tensor]:
    """Measure all that takes the cells' Grams, (T, C): the distances and the ridge probe.

    The cells are labels (T, p), one row for each target, or cells that all targets share.
    """
    grams = rk.cell_grams(x, cells)
    columns: dict[str, Tensor] = rk.ablation_distances(
        x,
        cells,
        metrics=study.metrics,
        ridge=study.options["ridge"],
        penalty=study.options["penalty"],
        memory=max(1, min(free_bytes, _MAX_VARIATE_BYTES)),
        grams=grams,
    )
    if "ridge" in probes:
        # Zero is a neuron's fill once that is subtracted, which no difference of stimuli shows.
        shifted = x if fill is None else x.to(torch.promote_types(x.dtype, torch.float32)) - fill
        columns |= measure_ridge_probes(study, labels, shifted, y, cells, grams)
    shape = len(labels), grams.shape[-3]
    return {name: values.expand(shape) for name, values in columns.items()}


def _measure_energy_shares(x: Tensor, cells: LayerCells) -> Tensor:
    """Measure each cell's share of the variance over stimuli, (C,)."""
    blocks = x.split(_BLOCK_NEURONS, dim=1)
    variances = torch.cat([block.double().var(0, correction=0) for block in blocks])
    return cells.sum_values(variances) / variances.sum()
