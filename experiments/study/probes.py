"""The probes of linear decodability in a study: their columns, and the neurons they draw."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import repsim_kernels as rk
from repsim_kernels.experiments.columns import HALVES, PROBES, half_column

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.cells import LayerCells
    from repsim_kernels.experiments.study.study import Study

DRAW_SIZE = 100  # neurons per draw, as in the paper
ERROR_COLUMN = "decodability_paper_error"


def list_columns(probes: Sequence[str]) -> list[str]:
    """List the table's columns for some probes."""
    names = [name for probe in probes for name in PROBES[probe]]
    if "ridge" in probes:
        names += [half_column(name, which) for which in HALVES for name in PROBES["ridge"]]
    return [*names, ERROR_COLUMN] if "paper" in probes else names


def measure_ridge_probes(
    study: Study, labels: Sequence[int], x: Tensor, y: Tensor, cells: Any, grams: Tensor
) -> dict[str, Tensor]:
    """Measure each ablation's loss of the ridge probe's scores, (T, C).

    The probe is also fitted anew to each half, which is every other stimulus of each class.

    Parameters
    ----------
    labels : sequence of int
        T targets.
    cells : tensor, (T, p), (p,) or (C, p), or a sparse membership
        The cells of each target, or cells that all targets share.
    grams : tensor, (T, C, n, n) or (C, n, n)
        Their Grams.
    """
    changes = _measure_ridge_probe(study, labels, x, y, cells, grams)
    return changes | _measure_ridge_halves(study, labels, x, y, cells, grams)


def _are_partitions(cells: Any) -> bool:
    return isinstance(cells, Tensor) and cells.ndim == 2 and cells.dtype != torch.bool


def _measure_ridge_probe(
    study: Study, labels: Sequence[int], x: Tensor, y: Tensor, cells: Any, grams: Tensor
) -> dict[str, Tensor]:
    """Measure the loss of the ridge probe's balanced accuracy and margin, refitted and frozen."""
    scores = rk.ablation_decodability(
        x,
        cells,
        y,
        target=labels,
        ridge=study.options["probe_ridge"],
        score=("balanced_accuracy", "margin"),
        grams=grams,
    )
    changes = {}
    for name, score in (("decodability", "balanced_accuracy"), ("margin", "margin")):
        for kind in ("refit", "frozen"):
            # Scores average ratios of counts; rounding makes equal ones tie exactly.
            change = scores[score]["intact"][:, None] - scores[score][kind]
            changes[f"{name}_{kind}"] = change.round(decimals=12)
    return changes


def _measure_ridge_halves(
    study: Study, labels: Sequence[int], x: Tensor, y: Tensor, cells: Any, grams: Tensor
) -> dict[str, Tensor]:
    """Measure the ridge probe on each half; NaN if a half has fewer than two stimuli of a side.

    A half is every other stimulus (a view). Stimuli are sorted by class, so each half has half of
    every class, plus or minus one stimulus.
    """
    by_half: dict[str, Tensor] = {}
    for first, which in enumerate(HALVES):
        half = slice(first, None, 2)
        is_target = y[half] == torch.tensor(labels)[:, None]
        large = torch.minimum(is_target.sum(1), (~is_target).sum(1)) > 1
        measured = large.nonzero()[:, 0].tolist()
        nan = torch.full((len(labels), grams.shape[-3]), math.nan, dtype=torch.float64)
        changes = {name: nan.to(x.device, copy=True) for name in PROBES["ridge"]}
        if measured:
            paired = _are_partitions(cells)
            own_grams = grams[..., half, half]
            with suppress(rk.ConstantError):
                part = _measure_ridge_probe(
                    study,
                    [labels[i] for i in measured],
                    x[half],
                    y[half],
                    cells[measured] if paired else cells,
                    _centre(own_grams[measured] if paired else own_grams),
                )
                for name, values in part.items():
                    changes[name][measured] = values
        by_half |= {half_column(name, which): changes[name] for name in PROBES["ridge"]}
    return by_half


def _centre(grams: Tensor) -> Tensor:
    """Centre Grams (…, n, n) of stimuli relative to any origin."""
    centred = grams - grams.mean(-1, keepdim=True)
    return centred - centred.mean(-2, keepdim=True)


def measure_paper_probes(
    study: Study,
    layer: str,
    labels: Sequence[int],
    x: Tensor,
    y: Tensor,
    cells: Sequence[LayerCells],
) -> dict[str, Tensor]:
    """Measure the paper's probe for each target and its cells, (T, C).

    What ablated neurons are set to has no effect: the probe is fitted on the others.
    """
    draws = study.draws.count_for(x.shape[1])
    by_target = [
        measure_paper_probe(study, layer, label, x, y, own.assignment, draws)
        for label, own in zip(labels, cells, strict=True)
    ]
    return {name: torch.stack([columns[name] for columns in by_target]) for name in by_target[0]}


def measure_paper_probe(
    study: Study, layer: str, label: int, x: Tensor, y: Tensor, cells: Any, draws: int
) -> dict[str, Tensor]:
    """Measure the paper's probe; draws depend on the study's seed, the layer and the class."""
    scores = rk.probe_paper(
        x,
        cells,
        y,
        label,
        draws=draws,
        size=DRAW_SIZE,
        paired=study.draws.paired,
        seed=int(make_seed(study, layer, label).generate_state(1)[0]),
    )
    change = scores["change"].round(decimals=12)
    return {"decodability_paper": change, ERROR_COLUMN: scores["standard_error"]}


def make_seed(study: Study, layer: str, label: int) -> np.random.SeedSequence:
    """Make the seed of everything that is drawn for a layer and a class."""
    return np.random.SeedSequence([study.seed, zlib.crc32(layer.encode()), label])
