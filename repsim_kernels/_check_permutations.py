"""Checks of arguments that say how stimuli are permuted."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np

from repsim_kernels import _check, _options
from repsim_kernels._check_conditions import check_names
from repsim_kernels._typing import Array
from repsim_kernels.errors import DegenerateWarning, LabelError, OptionError


def check_alpha(value: Any) -> float:
    """Check a level of significance, in (0, 1)."""
    return _options.check_number(value, "alpha", low=0, high=1, exclude_low=True, exclude_high=True)


def check_indices(indices: Any, n: int) -> Array:
    """Check permutations of n stimuli, (K, n) integers."""
    values = _check.check_integers(indices, "indices", OptionError)
    if values.ndim != 2 or values.shape[1] != n or not len(values):
        raise OptionError(
            f"indices: shape {values.shape}; expected (K, {n}), a permutation of the stimuli in "
            "each of K >= 1 rows"
        )
    wrong = (np.sort(values, axis=1) != np.arange(n)).any(1)
    if wrong.any() or values.dtype.kind == "b":
        raise OptionError(
            f"indices: row {int(wrong.argmax())} is not a permutation; expected every number "
            f"0 … {n - 1} once"
        )
    return values.astype(np.int64)


def check_strata(strata: Any, n: int) -> Array:
    """Check labels (n,), integers or strings, of which at least two are equal; number them."""
    labels = check_names(strata, "strata", n, "stimulus")[1]
    if np.bincount(labels).max() < 2:
        raise LabelError(
            f"strata: {n} strata of one stimulus each, which leave nothing to permute; expected "
            "several stimuli with the same label"
        )
    return labels


def draw_permutations(strata: Array, count: int, seed: int) -> Array:
    """Draw permutations (K, n) within strata, uniformly and independently."""
    rng = np.random.default_rng(seed)
    indices = np.empty((count, len(strata)), dtype=np.int64)
    for label in range(strata.max() + 1):
        members = np.flatnonzero(strata == label)
        indices[:, members] = rng.permuted(np.tile(members, (count, 1)), axis=1)
    return indices


def find_threshold_rank(count: int, alpha: float) -> int:
    """Return ⌈(1 - α)(K + 1)⌉ for K permutations, exact for the decimal that α is written as."""
    return math.ceil((1 - Fraction(repr(alpha))) * (count + 1))


def warn_if_too_few(count: int, alpha: float, strata: Array | None = None) -> None:
    """Warn if K permutations, or all permutations within strata, leave no p-value below alpha."""
    level = Fraction(repr(alpha))
    distinct = math.inf if strata is None else _count_permutations(strata)
    if (count + 1) * level < 1:
        plural = "" if count == 1 else "s"
        problem = (
            f"{count} permutation{plural}: no p-value can be as small as alpha={alpha:g}; at least "
            f"{math.ceil(1 / level) - 1} are needed"
        )
    elif distinct * level < 1:
        problem = (
            f"only {distinct} different permutations of these stimuli: a p-value as small as "
            f"alpha={alpha:g} is an accident; pass more stimuli, or larger strata"
        )
    else:
        return
    warnings.warn(problem, DegenerateWarning, stacklevel=_options.find_stacklevel())


def _count_permutations(strata: Array) -> float:
    """Return the number of different permutations within strata, infinite above 10^18."""
    count = 1
    for size in np.bincount(strata).tolist():
        count *= math.factorial(min(size, 20))
        if count > 10**18:
            return math.inf
    return count
