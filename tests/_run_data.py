"""Synthetic configurations and rows of a run, for which no network is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study.units import Unit

CLASSES = ["ant/queen", "bee", "wasp"]


def make_configuration(**changes: Any) -> dict[str, Any]:
    """Return the configuration of a run of two networks.

    The first has layers "a--b" and "a" in three blocks each, the second a layer "b" in one.
    """
    options = {"ridge": 0.1, "classes": CLASSES}
    return {
        "models": {
            "net": {"layers": ["a--b", "a"], "block": 1, **options},
            "net--a": {"layers": ["b"], "block": 3, **options},
        },
        "versions": {"torch": "2.11"},
        **changes,
    }


def make_rows(unit: Unit, seed: int = 0) -> pd.DataFrame:
    """Return a unit's rows: four cells per class, with random numbers and one NaN."""
    classes = CLASSES if unit.model == "net--a" else [CLASSES[unit.block - 1]]
    rng = np.random.default_rng([seed, *str(unit).encode()])
    distances = rng.random(4 * len(classes))
    distances[rng.integers(4)] = math.nan
    return pd.DataFrame(
        {
            "model": unit.model,
            "class": np.repeat(classes, 4),
            "layer": unit.layer,
            "cell": np.tile(np.arange(4), len(classes)),
            "size": rng.integers(1, 99, 4 * len(classes)),
            "cka": distances,
        }
    )


def create_stores(folders: Sequence[Path], memory: int, start: Any, results: Any) -> None:
    """Create each folder at the same time as other processes, and queue what it then holds."""
    studies = []
    for folder in folders:
        start.wait(60)
        studies.append(Store.create(folder, make_configuration(), lambda: {"memory": memory}).study)
    results.put(studies)
