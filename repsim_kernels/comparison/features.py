"""Maps of representations that are arrays, and what all maps have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels import _arrays, _check, _options
from repsim_kernels._arrays import Source
from repsim_kernels.comparison import ranks, thresholds
from repsim_kernels.comparison.similarity_map import SimilarityMap
from repsim_kernels.comparison.thresholds import Calibrate
from repsim_kernels.errors import ConstantError, NonFiniteError, OptionError, ShapeError
from repsim_kernels.ops import pairwise

Metrics = dict[str, dict[str, Any]]
"""Names of metrics, with their options."""


def convert_arrays(arrays: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return representations by layer as tensors."""
    if not arrays:
        raise OptionError(f"{name}: an empty dict; expected representations (n, p) by layer")
    return {str(layer): _arrays.convert(x, f"{name}[{layer!r}]")[0] for layer, x in arrays.items()}


def compare_features(
    sides: list[dict[str, Tensor]], metrics: Metrics, in_blocks: bool = False,
    calibrate: Calibrate | None = None,
) -> dict[str, SimilarityMap]:  # fmt: skip
    """Compare representations of the stimuli of all ranks; layers without a value are NaN.

    ``in_blocks``, for CKA only, compares few layers at a time: their Grams, or products of their
    features if they have fewer neurons than stimuli, need less memory than those of all layers.
    ``calibrate`` adds thresholds, for all layers at once.
    """
    sides = [{name: ranks.gather_stimuli(x) for name, x in side.items()} for side in sides]
    names = [list(side) for side in sides]
    checks = pairwise.choose_check(metrics)
    device = _find_device(x for side in sides for x in side.values())
    tensors = [
        _check_side(side, owner, checks["min_stimuli"], device)
        for side, owner in zip(sides, ("model_a", "model_b"), strict=False)
    ]
    _check_counts(sides)
    usable = [[i for i, x in enumerate(side) if _is_usable(x)] for side in tensors]
    itself = len(sides) == 1
    values = {
        name: np.full((len(names[0]), len(names[-1])), np.nan) for name in (*metrics, "chance")
    }
    blocks = [
        _split(side, kept) if in_blocks else [kept]
        for side, kept in zip(tensors, usable, strict=True)
    ]
    for rows, columns in itertools.product(blocks[0], blocks[-1]):
        if not (rows and columns) or (itself and columns < rows):
            continue
        xs, ys = [tensors[0][i] for i in rows], [tensors[-1][j] for j in columns]
        alike = itself and rows == columns
        source = Source("torch", str(device))
        computed, chances = pairwise.compare(xs, None if alike else ys, source, metrics, None)
        if chances is not None:
            computed["chance"] = chances
        for name, block in computed.items():
            values[name][np.ix_(rows, columns)] = block.cpu().numpy()
            if itself and not alike:
                values[name][np.ix_(columns, rows)] = block.cpu().numpy().T
    warn_if_high_by_chance(values.pop("chance"), itself)
    maps = {}
    for name, a in values.items():
        if itself:
            is_undefined = np.isnan(a.diagonal())
            a = pairwise.compare_with_itself(a, name, metrics[name])
            a[is_undefined, is_undefined] = np.nan
        maps[name] = make_map(a, names[0], names[-1], name, metrics[name], len(tensors[0][0]))
    if calibrate is None:
        return maps
    left = [tensors[0][i] for i in usable[0]]
    right = None if itself else [tensors[1][j] for j in usable[1]]
    return {
        name: thresholds.add_threshold(m, left, right, metrics[name], calibrate)
        for name, m in maps.items()
    }


def _split(xs: list[Tensor], kept: list[int]) -> list[list[int]]:
    """Split the layers that are kept into blocks for which products of features are cheapest."""
    blocks: list[list[int]] = []
    width = 0
    for i in kept:
        n, p = xs[i].shape
        if not blocks or width + p > n // 4:
            blocks.append([])
            width = 0
        blocks[-1].append(i)
        width += p
    return blocks


def _check_counts(sides: list[dict[str, Tensor]]) -> None:
    """Check that all representations have equally many stimuli."""
    counts = {
        f"{owner}[{name!r}]": len(x)
        for owner, side in zip(("model_a", "model_b"), sides, strict=False)
        for name, x in side.items()
    }
    first = next(iter(counts))
    for name, n in counts.items():
        if n != counts[first]:
            raise ShapeError(
                f"{name}: {n} stimuli, but {first} has {counts[first]}; expected the same stimuli"
            )


def _find_device(tensors: Iterable[Tensor]) -> torch.device:
    """Return the first GPU that a tensor is on, or the CPU."""
    return next((x.device for x in tensors if x.is_cuda), torch.device("cpu"))


def _check_side(
    side: dict[str, Tensor], owner: str, min_stimuli: int, device: torch.device
) -> list[Tensor]:
    """Check the shapes of representations; their values may be anything."""
    options: dict[str, Any] = {"min_stimuli": min_stimuli, "allow_undefined": True}
    return [
        _check.check_representation(x.to(device), f"{owner}[{name!r}]", **options)[0]
        for name, x in side.items()
    ]


def _is_usable(x: Tensor) -> bool:
    """Whether a representation is finite, and not the same for all stimuli."""
    try:
        _check.check_representation(x)
    except (NonFiniteError, ConstantError):
        return False
    return True


def warn_if_high_by_chance(chances: np.ndarray[Any, Any], of_one_network: bool) -> None:
    """Warn if biased CKA is high whatever the layers are; NaN where that is not known."""
    if of_one_network:
        chances = chances - np.diag(np.diag(chances))
    if np.isfinite(chances).any():
        _options.warn_if_high_by_chance(float(np.nanmax(chances)))


def make_map(
    values: np.ndarray[Any, Any], rows: Iterable[str], columns: Iterable[str], metric: str,
    options: dict[str, Any], n: int,
) -> SimilarityMap:  # fmt: skip
    """Return the exact map of a metric; warn if layers have no value."""
    options = {"estimator": "exact"} | options
    m = SimilarityMap(values, tuple(rows), tuple(columns), metric, options, n)
    m.warn_of_undefined()
    return m
