"""The probes of linear decodability in a study: their columns, and the neurons they draw."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import repsim_kernels as rk
from repsim_kernels.experiments.columns import HALVES, PROBES, half_column

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

DRAW_SIZE = 100  # neurons per draw, as in the paper
ERROR_COLUMN = "decodability_paper_error"


def list_columns(probes: Sequence[str]) -> list[str]:
    """List the table's columns for some probes."""
    names = [name for probe in probes for name in PROBES[probe]]
    if "ridge" in probes:
        names += [half_column(name, which) for which in HALVES for name in PROBES["ridge"]]
    return [*names, ERROR_COLUMN] if "paper" in probes else names


def measure_decodability(
    study: Study, probes: Sequence[str], layer: str, label: int, x: Tensor, y: Tensor, cells: Tensor
) -> dict[str, Tensor]:
    """Measure each ablation's loss of the probes' scores, (C,), and the paper probe's error.

    The ridge probe is also fitted anew to each half, which is every other stimulus of each class.
    """
    changes: dict[str, Tensor] = {}
    if "ridge" in probes:
        arguments = study, label, x, y, cells
        changes |= _measure_ridge_probe(*arguments) | _measure_ridge_halves(*arguments)
    if "paper" in probes:
        changes |= measure_paper_probe(
            study, layer, label, x, y, cells, study.draws.count_for(x.shape[1])
        )
    return {name: changes[name] for name in list_columns(probes)}


def _measure_ridge_probe(
    study: Study, label: int, x: Tensor, y: Tensor, cells: Tensor
) -> dict[str, Tensor]:
    """Measure the loss of the ridge probe's balanced accuracy and margin, refitted and frozen."""
    scores = rk.ablation_decodability(
        x,
        cells,
        y,
        target=label,
        ridge=study.options["probe_ridge"],
        score=("balanced_accuracy", "margin"),
    )
    changes = {}
    for name, score in (("decodability", "balanced_accuracy"), ("margin", "margin")):
        for kind in ("refit", "frozen"):
            # Scores average ratios of counts; rounding makes equal ones tie exactly.
            change = float(scores[score]["intact"]) - scores[score][kind]
            changes[f"{name}_{kind}"] = change.round(decimals=12)
    return changes


def _measure_ridge_halves(
    study: Study, label: int, x: Tensor, y: Tensor, cells: Tensor
) -> dict[str, Tensor]:
    """Measure the ridge probe on each half; NaN if a half has fewer than two stimuli of a side.

    A half is every other stimulus (a view). Stimuli are sorted by class, so each half has half of
    every class, plus or minus one stimulus.
    """
    by_half: dict[str, Tensor] = {}
    for first, which in enumerate(HALVES):
        is_target = y[first::2] == label
        changes = {name: torch.full((study.n_cells,), math.nan) for name in PROBES["ridge"]}
        if min(int(is_target.sum()), int((~is_target).sum())) > 1:
            with suppress(rk.ConstantError):
                changes = _measure_ridge_probe(study, label, x[first::2], y[first::2], cells)
        by_half |= {half_column(name, which): changes[name] for name in PROBES["ridge"]}
    return by_half


def measure_paper_probe(
    study: Study, layer: str, label: int, x: Tensor, y: Tensor, cells: Tensor, draws: int
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


def make_nan_columns(probes: Sequence[str], n_cells: int) -> dict[str, Tensor]:
    """Make columns of NaN, for a layer that is the same for every stimulus."""
    return {name: torch.full((n_cells,), math.nan) for name in list_columns(probes)}
