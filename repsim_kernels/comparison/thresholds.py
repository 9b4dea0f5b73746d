"""Thresholds of maps: how large their maximum gets when the stimuli of one side are permuted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from repsim_kernels import _check_permutations, _options
from repsim_kernels._metrics import METRICS
from repsim_kernels.comparison.similarity_map import SimilarityMap
from repsim_kernels.errors import OptionError
from repsim_kernels.forward.memory import format_bytes
from repsim_kernels.ops import calibration

_WITHOUT_MATRICES = {m.name for m in METRICS if m.neighbours} | {"procrustes"}

Calibrate = dict[str, Any]
"""Options of `calibrate`: which permutations, and the level of the threshold."""

_NAMES = ("permutations", "alpha", "strata", "indices", "seed")


def check_calibrate(value: Any, metrics: Mapping[str, Any], estimator: str) -> Calibrate | None:
    """Return the options of `calibrate`; OptionError for metrics that it does not take."""
    if value is None:
        return None
    if estimator != "exact":
        raise OptionError(f"calibrate: given with estimator {estimator!r}; expected 'exact'")
    options = dict(value) if isinstance(value, Mapping) else {"permutations": value}
    for name in options:
        if name not in _NAMES:
            raise OptionError(
                f"calibrate: unknown option {_options.short_repr(name)}; expected one of "
                f"{', '.join(_NAMES)}"
            )
    if "permutations" in options:
        options["permutations"] = _options.check_count(options["permutations"], "calibrate")
    options["alpha"] = _check_permutations.check_alpha(options.get("alpha", 0.05))
    options["seed"] = _options.check_count(options.get("seed", 0), "seed", minimum=0)
    for name, own in metrics.items():
        calibration.check_calibration(name, own)
    return options


def check_memory(
    metrics: Iterable[str], n_rows: int, n_columns: int, n: int, budget: int, from_grams: bool
) -> None:
    """Check that the matrices (n, n) of all layers that are multiplied fit the budget of bytes.

    Procrustes and the metrics of neighbours multiply none.
    """
    if _WITHOUT_MATRICES.issuperset(metrics):
        return
    # Half of each matrix on one side and whole ones on the other, and the Grams themselves.
    needed = (4 * n_rows + 8 * n_columns + 8 * (n_rows + n_columns) * from_grams) * n * n
    if needed > budget:
        raise OptionError(
            f"memory: {format_bytes(budget)}, but calibrate needs {format_bytes(needed)} for "
            f"matrices of {n_rows} x {n_columns} layers and {n:,} stimuli; expected that much, or "
            "fewer layers or stimuli"
        )


def add_threshold(
    m: SimilarityMap, xs: list[Tensor], ys: list[Tensor] | None, options: dict[str, Any],
    calibrate: Calibrate,
) -> SimilarityMap:  # fmt: skip
    """Return a map with the threshold of its largest value, from the layers that have values.

    Each permutation is of all layers together. For a network with itself (``ys`` None), the
    diagonal is left out. A map of no pairs has no threshold.
    """
    if not xs or ys == [] or (ys is None and len(xs) < 2):
        return m
    result = calibration.calibrate(xs, ys, metric=m.metric, aggregate="max", **calibrate, **options)
    threshold = float(result.threshold)
    if result.p_value > calibrate["alpha"]:
        # No pair is above chance; the map's values may differ from the score by rounding.
        values = m.values[~np.eye(len(m.rows), dtype=bool)] if ys is None else m.values
        threshold = max(threshold, float(np.nanmax(values)))
    used = _describe_calibrate(calibrate, len(result.null))
    return replace(m, threshold=threshold, options=dict(m.options) | {"calibrate": used})


def _describe_calibrate(calibrate: Calibrate, permutations: int) -> dict[str, Any]:
    """Return the options for a map to record: of the arrays, only that they were passed."""
    arrays = {name: True for name in ("strata", "indices") if calibrate.get(name) is not None}
    seed = {} if "indices" in arrays else {"seed": calibrate["seed"]}
    return {"permutations": permutations, "alpha": calibrate["alpha"]} | seed | arrays
