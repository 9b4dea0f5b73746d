"""Linear decodability as a study records it: which probes, their columns, what is drawn."""

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
from repsim_kernels.experiments.columns import HALVES, PROBES, half

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

DRAW_SIZE = 100  # neurons of a draw, the paper's
ERROR_COLUMN = "decodability_paper_error"


def list_columns(probes: Sequence[str]) -> list[str]:
    """The table's columns of some probes."""
    found = [name for probe in probes for name in PROBES[probe]]
    if "ridge" in probes:
        found += [half(name, which) for which in HALVES for name in PROBES["ridge"]]
    return [*found, ERROR_COLUMN] if "paper" in probes else found


def measure_decodability(
    study: Study, probes: Sequence[str], layer: str, label: int, x: Tensor, y: Tensor, cells: Tensor
) -> dict[str, Tensor]:
    """What every ablation takes of each probe's score, and the error of the paper's: (C,) each.

    Of the ridge probe also on every other stimulus of each class, fitted anew there.
    """
    found: dict[str, Tensor] = {}
    if "ridge" in probes:
        found |= _ridge(study, label, x, y, cells) | _ridge_halves(study, label, x, y, cells)
    if "paper" in probes:
        found |= measure_paper_probe(
            study, layer, label, x, y, cells, study.draws.count_for(x.shape[1])
        )
    return {name: found[name] for name in list_columns(probes)}


def _ridge(study: Study, label: int, x: Tensor, y: Tensor, cells: Tensor) -> dict[str, Tensor]:
    scores = rk.ablation_decodability(
        x,
        cells,
        y,
        target=label,
        ridge=study.options["probe_ridge"],
        score=("balanced_accuracy", "margin"),
    )
    found = {}
    for name, score in (("decodability", "balanced_accuracy"), ("margin", "margin")):
        for kind in ("refit", "frozen"):
            # Ratios of counts are averaged: equal ones must tie in spite of rounding.
            change = float(scores[score]["intact"]) - scores[score][kind]
            found[f"{name}_{kind}"] = change.round(decimals=12)
    return found


def _ridge_halves(
    study: Study, label: int, x: Tensor, y: Tensor, cells: Tensor
) -> dict[str, Tensor]:
    """The ridge probe of every other stimulus, a view; NaN of those that can't be told apart.

    They are sorted by class, so that each half has half of every class, or one more or less.
    """
    found: dict[str, Tensor] = {}
    for first, which in enumerate(HALVES):
        own = y[first::2] == label
        changes = {name: torch.full((study.n_cells,), math.nan) for name in PROBES["ridge"]}
        if min(int(own.sum()), int((~own).sum())) > 1:
            with suppress(rk.ConstantError):
                changes = _ridge(study, label, x[first::2], y[first::2], cells)
        found |= {half(name, which): changes[name] for name in PROBES["ridge"]}
    return found


def measure_paper_probe(
    study: Study, layer: str, label: int, x: Tensor, y: Tensor, cells: Tensor, draws: int
) -> dict[str, Tensor]:
    """The paper's probe; what it draws depends on the study's seed, the layer and the class."""
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
    """Of what is drawn for a layer and a class."""
    return np.random.SeedSequence([study.seed, zlib.crc32(layer.encode()), label])


def make_nan_columns(probes: Sequence[str], n_cells: int) -> dict[str, Tensor]:
    """The columns of a layer that is the same for every stimulus."""
    return {name: torch.full((n_cells,), math.nan) for name in list_columns(probes)}
