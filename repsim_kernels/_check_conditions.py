"""Checks of arguments that say which condition, and which fold, each row belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels import _arrays, _check, _options
from repsim_kernels._typing import Array
from repsim_kernels.errors import LabelError, OptionError


def check_names(labels: Any, name: str, n: int, unit: str = "row of x") -> tuple[Array, Array]:
    """Check labels (n,), integers or strings.

    Return the different ones in sorted order, and the position of each row's label among them.
    """
    may_be_text = _arrays.detect_library(labels) in ("numpy", None) and not isinstance(labels, str)
    values = _options.to_tuple(labels) if may_be_text else None
    if values and all(isinstance(value, str) for value in values):
        array = np.array(values)
    else:
        array = _check.check_integers(labels, name, LabelError)
    if array.shape != (n,):
        raise LabelError(f"{name}: shape {array.shape}; expected ({n},), one per {unit}")
    return np.unique(array, return_inverse=True)


def check_conditions(labels: Any, folds: Any, n: int, distance: str) -> NDArray[np.float64] | None:
    """Check the condition and the fold of each of n rows of x.

    Return which rows are averaged to each pattern, (K, n_cond, n) with 0 and 1, of K folds (K = 1
    if the distance has none); None if every row is a condition of its own.
    """
    crossed = distance == "crossnobis"
    if folds is not None and not crossed:
        raise OptionError(
            f"folds: given with distance={distance!r}; expected None, or distance='crossnobis'"
        )
    if labels is None:
        if crossed:
            raise LabelError(
                "labels: None with distance='crossnobis'; expected the condition of each row, "
                f"({n},), with several rows of each"
            )
        return None
    names, index = check_names(labels, "labels", n)
    if len(names) < 2:
        raise LabelError(f"labels: only condition {_show(names, 0)}; expected at least two")
    if crossed:
        fold_names, fold = _check_folds(folds, names, index)
    else:
        fold_names, fold = np.zeros(1, np.int64), np.zeros(n, np.int64)
    counts = np.zeros((len(fold_names), len(names)))
    np.add.at(counts, (fold, index), 1)
    if not counts.all():
        missing_fold, missing = (int(i[0]) for i in np.nonzero(counts == 0))
        raise LabelError(
            f"folds: condition {_show(names, missing)} has no row in fold "
            f"{_show(fold_names, missing_fold)}; expected rows of every condition in every fold"
        )
    groups = np.zeros((*counts.shape, n))
    groups[fold, index, np.arange(n)] = 1
    return groups


def _check_folds(folds: Any, names: Array, index: Array) -> tuple[Array, Array]:
    """Return the names of the folds, and the fold of each row as its position among them.

    ``names`` and ``index`` are those of the conditions. Without folds, the k-th row of each
    condition is in fold k.
    """
    counts = np.bincount(index)
    few, most = int(counts.argmin()), int(counts.argmax())
    if counts[few] < 2:
        raise LabelError(
            f"labels: condition {_show(names, few)} has a single row; expected at least two, in "
            "different folds, for distance='crossnobis'"
        )
    if folds is None:
        if counts[few] != counts[most]:
            raise LabelError(
                f"labels: condition {_show(names, few)} has {counts[few]} rows, but "
                f"{_show(names, most)} has {counts[most]}; expected equal numbers, or folds="
            )
        order = np.argsort(index, kind="stable")
        fold = np.empty(len(index), np.int64)
        fold[order] = np.tile(np.arange(counts[few]), len(names))
        return np.arange(counts[few]), fold
    fold_names, fold = check_names(folds, "folds", len(index))
    if len(fold_names) < 2:
        raise LabelError(f"folds: only fold {_show(fold_names, 0)}; expected at least two")
    return fold_names, fold


def _show(names: Array, i: int) -> str:
    """Return one of the labels for an error message."""
    return _options.short_repr(names[i].item())
