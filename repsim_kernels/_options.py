"""Checks of the options of public functions: every argument that is not an array.

Each check returns the value in the type that the kernels expect, or raises an `OptionError` that
names the argument.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from repsim_kernels._metrics import METRICS
from repsim_kernels.errors import DegenerateWarning, OptionError, RepsimError


def short_repr(value: Any) -> str:
    """Return `repr(value)` on one line of at most 80 characters, for error messages."""
    try:
        text = repr(value)
    # Python refuses to print integers above 4,300 digits, and a user's class may raise anything.
    except Exception:
        text = type(value).__name__
    return to_one_line(text)


def to_one_line(text: str, max_length: int = 80) -> str:
    """Join the lines of a text and truncate it to `max_length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def check_choice(value: Any, name: str, choices: Iterable[str]) -> str:
    """Check that an option is one of the `choices`."""
    choices = tuple(choices)
    # Only strings: an array that holds one name compares elementwise, and would pass as that name.
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise OptionError(f"{name}: {short_repr(value)}; expected one of {expected}")
    return str(value)


def check_choices(values: Any, name: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Check a sequence of names, each one of the choices; return it without duplicates."""
    names = None if isinstance(values, str) else to_tuple(values)
    if names is None:
        raise OptionError(
            f"{name}: {short_repr(values)}; expected a sequence of names, such as [{choices[0]!r}]"
        )
    return tuple(dict.fromkeys(check_choice(value, name, choices) for value in names))


def check_metrics(values: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Check the metrics of ablations: a sequence of names, or "all"."""
    if isinstance(values, str) and values == "all":
        return choices
    try:
        return check_choices(values, "metrics", choices)
    except OptionError as error:
        raise OptionError(f"{error}, or 'all'") from None


def check_number(
    value: Any,
    name: str,
    *,
    low: float,
    high: float = math.inf,
    exclude_low: bool = False,
    exclude_high: bool = False,
) -> float:
    """Check that an option is a finite number from `low` to `high`, or between them."""
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    try:
        number = float(value) if is_number and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer too large for a float
        number = math.inf
    in_range = low <= number <= high and not (
        (exclude_low and number == low) or (exclude_high and number == high)
    )
    if not math.isfinite(number) or not in_range:
        bound = f"above {low:g}" if exclude_low else f"of at least {low:g}"
        limit = "below" if exclude_high else "at most"
        upper = f" and {limit} {high:g}" if math.isfinite(high) else ""
        raise OptionError(f"{name}: {short_repr(value)}; expected a finite number {bound}{upper}")
    return number


def check_count(
    value: Any,
    name: str,
    minimum: int = 1,
    maximum: int | None = None,
    error: type[RepsimError] = OptionError,
) -> int:
    """Check that an option is a whole number from `minimum` to `maximum`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise error(
            f"{name}: {short_repr(value)}; expected a whole number of at least {minimum}{upper}"
        )
    return int(value)


def check_memory(value: Any) -> int | None:
    """Check a budget in bytes; None stands for the default."""
    return None if value is None else int(check_number(value, "memory", low=1))


def check_flag(value: Any, name: str) -> bool:
    """Check that an option is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name}: {short_repr(value)}; expected True or False")
    return bool(value)


def to_tuple(values: Any) -> tuple[Any, ...] | None:
    """Return the items of an iterable, or None for anything that can't be iterated over."""
    try:
        return tuple(values)
    except Exception:  # TypeError, or whatever a user's class raises
        return None


# Relative to tr(K) / n. At this size the penalty outweighs the data in float64.
_MAX_RIDGE = 1e10
# Products of this penalty with the largest Gram matrices still fit float64.
_MAX_PENALTY = 1e150
# Below this relative ridge, rounding errors exceed the held-out residuals of a probe.
_MIN_PROBE_RIDGE = 1e-6


def check_ridge_and_penalty(ridge: Any, penalty: Any) -> tuple[float, float]:
    """Check a relative ridge and an absolute penalty."""
    return (
        check_number(ridge, "ridge", low=0, high=_MAX_RIDGE),
        check_number(penalty, "penalty", low=0, high=_MAX_PENALTY),
    )


def check_ridge_or_penalty(ridge: Any, penalty: Any) -> tuple[float, float]:
    """Check a relative ridge and an absolute penalty, at most one of which may be nonzero."""
    ridge, penalty = check_ridge_and_penalty(ridge, penalty)
    if ridge and penalty:
        raise OptionError(
            f"ridge: {ridge:g} together with penalty={penalty:g}; expected at most one of the two"
        )
    return ridge, penalty


def check_probe_ridge(value: Any, name: str) -> float:
    """Check the relative ridge of a probe."""
    return check_number(value, name, low=_MIN_PROBE_RIDGE, high=_MAX_RIDGE)


def check_ridge_or_gcv(value: Any) -> float | str:
    """Check the relative ridge of a probe, which may also be "gcv"."""
    if isinstance(value, str) and value == "gcv":
        return value
    try:
        return check_probe_ridge(value, "ridge")
    except OptionError as error:
        raise OptionError(f"{error}, or 'gcv'") from None


KERNELS = ("linear", "rbf")  # of features


def check_bandwidth(kernel: Any, sigma: Any, kernels: tuple[str, ...] = KERNELS) -> float | None:
    """Check `kernel` and `sigma`, the fraction of the median distance that "rbf" uses."""
    check_choice(kernel, "kernel", kernels)
    if kernel != "rbf":
        if sigma is not None:
            raise OptionError(
                f"sigma: {short_repr(sigma)} with kernel={kernel!r}; expected None, or kernel='rbf'"
            )
        return None
    # A wide kernel differs from 1 by about 1 / sigma²; above sigma = 1e5, rounding swamps that.
    return 1.0 if sigma is None else check_number(sigma, "sigma", low=1e-10, high=1e5)


def check_precision(value: Any) -> str:
    """Check the precision of float32 products."""
    return check_choice(value, "precision", ("tf32x3", "tf32", "ieee"))


def check_product_precision(value: Any) -> str:
    """Check the precision in which `cka` multiplies features of at most 32 bits."""
    return check_choice(value, "precision", ("float32", "float64"))


def check_form(value: Any) -> str:
    """Check the form of the Procrustes distance."""
    return check_choice(value, "form", ("squared", "angular", "size-and-shape"))


def check_variance(value: Any) -> float:
    """Check a share of the variance, in (0, 1]."""
    return check_number(value, "variance", low=0, high=1, exclude_low=True)


_DISTANCES = ("euclidean", "sqeuclidean", "correlation", "cosine")


def check_distance(value: Any) -> str:
    """Check the distance between stimuli, a name of SciPy's `pdist`."""
    return check_choice(value, "distance", _DISTANCES)


def check_rdm_distance(value: Any) -> str:
    """Check the distance of an RDM: those of `check_distance`, and two that whiten patterns."""
    return check_choice(value, "distance", (*_DISTANCES, "mahalanobis", "crossnobis"))


def check_comparison(compare: Any) -> str:
    """Check how RSA compares distances."""
    return check_choice(compare, "compare", ("spearman", "pearson", "cosine"))


def check_rsa_options(distance: Any, compare: Any) -> tuple[str, str]:
    """Check the two options of `rsa`."""
    return check_distance(distance), check_comparison(compare)


def check_stimulus_options(compare: Any, sigma: Any, k: Any = 1) -> tuple[str, float, int]:
    """Check the options of the metrics of ablations that compare distances between stimuli."""
    bandwidth = check_bandwidth("rbf", sigma)
    assert bandwidth is not None
    return check_comparison(compare), bandwidth, check_count(k, "k")


def check_grid(value: Any) -> tuple[int, int]:
    """Check the two sides of a grid of cells, whole numbers of at least 1."""
    sides = to_tuple(value) or ()
    whole = all(
        isinstance(k, (int, np.integer)) and not isinstance(k, bool) and k >= 1 for k in sides
    )
    if len(sides) != 2 or not whole:
        raise OptionError(
            f"grid: {short_repr(value)}; expected two whole numbers of at least 1, such as (4, 4)"
        )
    return int(sides[0]), int(sides[1])


def make_contiguous_folds(value: Any, n: int) -> np.ndarray[Any, Any]:
    """Return the fold of each of n stimuli: `value` contiguous runs, the longer ones first."""
    k = check_count(value, "folds", minimum=2, maximum=n)
    return np.repeat(np.arange(k), [n // k + (i < n % k) for i in range(k)])


def find_stacklevel() -> int:
    """Return the `stacklevel` with which a warning of the caller names the user's own code."""
    folder, level = os.path.dirname(__file__) + os.sep, 0
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folder):
        frame, level = frame.f_back, level + 1
    return level + 1


def warn_if_degenerate(metric: str, n: int, p: int, q: int, ridge: float, penalty: float) -> None:
    """Warn if "cca" or "pwcca" without a ridge is uninformative for n stimuli, p and q neurons."""
    if ridge or penalty:
        return
    if max(p, q) >= n:
        problem = "every canonical correlation is 1, whatever the representations hold"
    elif metric == "pwcca" and p + q > n:
        problem = "several canonical correlations tie at 1, so the weights are not unique"
    else:
        return
    warnings.warn(
        f"{p} and {q} neurons, {n} stimuli: without a ridge {problem}; pass ridge= or use svcca",
        DegenerateWarning,
        stacklevel=find_stacklevel(),
    )


def warn_without_ridge(metrics: Sequence[str], ridge: float, penalty: float) -> None:
    """Warn if CCA between a representation and its ablations is requested without a ridge."""
    if not ridge and not penalty and any(m.cca_ridge for m in METRICS if m.name in metrics):
        warnings.warn(
            "without a ridge every canonical correlation between a representation and an ablation "
            "of it is 1; pass ridge= or penalty=, or use svcca",
            DegenerateWarning,
            stacklevel=find_stacklevel(),
        )


_HIGH_BY_CHANCE = 0.5  # mean CKA of permuted stimuli above which a warning is due
_warnings_shown: set[str] = set()  # warnings that this process has already shown


def may_be_high_by_chance(n: int, p: int, q: int, debiased: bool, kernel: str) -> bool:
    """Whether to compute the chance level of CKA: it may be high, and no warning was shown yet."""
    if kernel == "rbf":
        p = q = n - 1  # the Gram matrix of an RBF kernel has full rank for any number of neurons
    # The mean over permutations of the stimuli is at most √rank_product / (n - 1).
    rank_product = min(p, n - 1) * min(q, n - 1)
    due = not debiased and "chance" not in _warnings_shown
    return due and rank_product > (_HIGH_BY_CHANCE * (n - 1)) ** 2


def warn_if_high_by_chance(chance: float) -> None:
    """Warn, once per process, if plain CKA is high whatever the representations hold."""
    if chance <= _HIGH_BY_CHANCE or "chance" in _warnings_shown:
        return
    _warnings_shown.add("chance")
    warnings.warn(
        f"cka: {chance:.3f} is the mean of this similarity when the stimuli of one side are "
        "permuted: Gram matrices of few stimuli and many neurons are always alike; pass "
        "debiased=True, whose mean is 0 (Murphy et al. 2024). This warning is shown once",
        DegenerateWarning,
        stacklevel=find_stacklevel(),
    )
