"""The checks of options: everything but arrays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from repsim_kernels._metrics import METRICS
from repsim_kernels.errors import DegenerateWarning, OptionError, RepsimError


def shown(value: Any) -> str:
    """What an error shows of a value: one line, however long the value is."""
    try:
        text = repr(value)
    except Exception:  # Python prints no integer above 4,300 digits, and a class may do anything
        text = type(value).__name__
    return one_line(text)


def one_line(text: str, most: int = 80) -> str:
    """Join the lines of a text, and cut it off after `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def option(value: Any, name: str, known: Iterable[str]) -> str:
    """Check that an option is one of the known names."""
    known = tuple(known)
    # Arrays compare element by element: one of one name would pass for it.
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}: {shown(value)}; expected one of {', '.join(map(repr, known))}")
    return str(value)


def number(
    value: Any, name: str, *, low: float, high: float = math.inf, above: bool = False
) -> float:
    """Check that an option is a finite number of at least `low` (above it, if `above`)."""
    ok = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    try:
        found = float(value) if ok else math.nan
    except OverflowError:  # an integer that no float holds
        found = math.inf
    if not math.isfinite(found) or not low <= found <= high or (above and found == low):
        bound = f"above {low:g}" if above else f"of at least {low:g}"
        upper = f" and at most {high:g}" if math.isfinite(high) else ""
        raise OptionError(f"{name}: {shown(value)}; expected a finite number {bound}{upper}")
    return found


def count(
    value: Any,
    name: str,
    least: int = 1,
    most: int | None = None,
    error: type[RepsimError] = OptionError,
) -> int:
    """Check that an option is a whole number of at least `least`, and at most `most`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise error(f"{name}: {shown(value)}; expected a whole number of at least {least}{upper}")
    return int(value)


def flag(value: Any, name: str) -> bool:
    """Check that an option is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name}: {shown(value)}; expected True or False")
    return bool(value)


_MOST_RIDGE = 1e10  # relative: nothing but the penalty counts far below this
_MOST_PENALTY = 1e150  # its products with the largest Gram matrices fit float64


def ridges(ridge: Any, penalty: Any) -> tuple[float, float]:
    """Check a relative and an absolute ridge."""
    return (
        number(ridge, "ridge", low=0, high=_MOST_RIDGE),
        number(penalty, "penalty", low=0, high=_MOST_PENALTY),
    )


def probe_ridge(value: Any, name: str) -> float:
    """Check the relative ridge of a probe."""
    # Below, what rounding leaves of a held-out residual outweighs the residual.
    return number(value, name, low=1e-6, high=_MOST_RIDGE)


def ridge_or_gcv(value: Any) -> float | str:
    """Check the relative ridge of a probe, or that it is to be chosen by "gcv"."""
    if not isinstance(value, str):
        return probe_ridge(value, "ridge")
    if value != "gcv":
        raise OptionError(f"ridge: {shown(value)}; expected a number from 1e-06 to 1e+10, or 'gcv'")
    return value


def contiguous_folds(value: Any, n: int) -> np.ndarray[Any, Any]:
    """Check a number of folds and return the fold of each of n stimuli: runs, the first longer."""
    k = count(value, "folds", least=2, most=n)
    return np.repeat(np.arange(k), [n // k + (i < n % k) for i in range(k)])


def shrinkage(ridge: Any, penalty: Any) -> tuple[float, float]:
    """Check `ridge` and `penalty`, of which at most one may be set."""
    ridge, penalty = ridges(ridge, penalty)
    if ridge and penalty:
        raise OptionError(f"ridge: {ridge:g} beside penalty={penalty:g}; expected one or the other")
    return ridge, penalty


def warn_if_degenerate(metric: str, n: int, p: int, q: int, ridge: float, penalty: float) -> None:
    """Warn where "cca" or "pwcca" without a ridge says nothing of p and q neurons of n stimuli."""
    if ridge or penalty:
        return
    if max(p, q) >= n:
        what = "every canonical correlation is 1, whatever the representations hold"
    elif metric == "pwcca" and p + q > n:
        what = "several canonical correlations tie at 1, and the weights are not unique"
    else:
        return
    warnings.warn(
        f"{p} and {q} neurons, {n} stimuli: without a ridge {what}; pass ridge= or use svcca",
        DegenerateWarning,
        stacklevel=3,
    )


_CHANCE = 0.5  # a similarity that noise reaches on average, from which on it says little
_warned: set[str] = set()  # what this process has been warned of


def chance_wanted(n: int, p: int, q: int, debiased: bool, kernel: str) -> bool:
    """Whether CKA of p and q neurons may be above `_CHANCE` by chance, and no warning said so."""
    if kernel == "rbf":
        p = q = n - 1  # its Gram has full rank, however few neurons there are
    ranks = min(p, n - 1) * min(q, n - 1)  # the mean over permutations is at most √ranks / (n - 1)
    return not debiased and "chance" not in _warned and ranks > (_CHANCE * (n - 1)) ** 2


def warn_of_chance(chance: float) -> None:
    """Warn, once in a process, where plain CKA is large whatever the representations hold."""
    if chance <= _CHANCE or "chance" in _warned:
        return
    _warned.add("chance")
    warnings.warn(
        f"cka: {chance:.3f} is the mean of this similarity when the stimuli of one side are "
        "permuted: high-dimensional Gram matrices of few stimuli are alike; pass "
        "debiased=True, whose mean is 0 (Murphy et al. 2024). This warning is shown once",
        DegenerateWarning,
        stacklevel=3,
    )


def warn_without_ridge(metrics: Sequence[str], ridge: float, penalty: float) -> None:
    """Warn where CCA between a representation and its ablations is asked for without a ridge."""
    if not ridge and not penalty and any(m.cca_ridge for m in METRICS if m.name in metrics):
        warnings.warn(
            "without a ridge every canonical correlation between a representation and an ablation "
            "of it is 1; pass ridge= or penalty=, or use svcca",
            DegenerateWarning,
            stacklevel=3,
        )


def bandwidth(kernel: Any, sigma: Any) -> float | None:
    """Check `kernel` and its `sigma`: a fraction of the median distance, for "rbf" only."""
    option(kernel, "kernel", ("linear", "rbf"))
    if kernel == "linear":
        if sigma is not None:
            raise OptionError(
                f"sigma: {shown(sigma)} with kernel='linear'; expected None, or kernel='rbf'"
            )
        return None
    # A wide kernel is 1 everywhere but for 1 / sigma², which rounding hides from about 1e5 on.
    return 1.0 if sigma is None else number(sigma, "sigma", low=1e-10, high=1e5)


def options(values: Any, name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Check a sequence of names, of which each is known."""
    names = None if isinstance(values, str) else items(values)
    if names is None:
        raise OptionError(f"{name}: {shown(values)}; expected a sequence of names")
    return tuple(dict.fromkeys(option(value, name, known) for value in names))


def items(values: Any) -> tuple[Any, ...] | None:
    """The items of a sequence, or None for what is none, as an array without dimensions."""
    try:
        return tuple(values)
    except Exception:  # TypeError, or whatever a class of the caller's raises
        return None


def precision(value: Any) -> str:
    """Check the precision of float32 products."""
    return option(value, "precision", ("tf32x3", "tf32", "ieee"))


def grid(value: Any) -> tuple[int, int]:
    """Check a grid of cells: two whole numbers of at least 1."""
    sides = items(value) or ()
    whole = all(
        isinstance(k, (int, np.integer)) and not isinstance(k, bool) and k >= 1 for k in sides
    )
    if len(sides) != 2 or not whole:
        raise OptionError(
            f"grid: {shown(value)}; expected two whole numbers of at least 1, as (4, 4)"
        )
    return int(sides[0]), int(sides[1])


def rsa_options(distance: Any, compare: Any) -> tuple[str, str]:
    """Check the options of rsa."""
    known = ("euclidean", "sqeuclidean", "correlation", "cosine")
    return (
        option(distance, "distance", known),
        option(compare, "compare", ("spearman", "pearson", "cosine")),
    )
