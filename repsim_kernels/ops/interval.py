"""Confidence intervals of similarities."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from repsim_kernels import _arrays, _check, _check_layers, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import DegenerateWarning, DtypeError, OptionError, ShapeError
from repsim_kernels.ops import pairwise

_SUBSAMPLES = 200
_NEAR_ZERO = 2  # standard errors
UNDEFINED = (
    "x or y: without one of its stimuli the similarity is not defined, as the others are equally "
    "far apart; expected stimuli that differ"
)


class Interval(NamedTuple):
    """A similarity with its confidence interval, from `interval`.

    Attributes
    ----------
    estimate : array, () or (L, M), float64
        The metric of all stimuli.
    low, high : array, () or (L, M), float64
        Ends of the interval. They are not clipped to the metric's range.
    standard_error : array, () or (L, M), float64
        Standard deviation of the estimate between samples of n stimuli.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x = np.random.default_rng(0).standard_normal((100, 10))
    >>> estimate, low, high, standard_error = rk.interval(x, x[:, :5])
    >>> bool(low < estimate < high)
    True
    """

    estimate: Array
    low: Array
    high: Array
    standard_error: Array


def interval(
    x: ArrayLike | Sequence[ArrayLike],
    y: ArrayLike | Sequence[ArrayLike],
    *,
    metric: str = "cka",
    debiased: bool = True,
    level: float = 0.95,
    method: str = "jackknife",
    seed: int = 0,
    backend: str | None = None,
    **options: Any,
) -> Interval:
    """Return a confidence interval of a metric, for a sample of stimuli from a larger population.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n stimuli, at least 4 and more than the metric needs. Integers are
        converted to float64. Either may be a list of layers, (n, p_i), as in `pairwise`: the result
        then has a value for each pair.
    metric : str
        Any metric of `pairwise`.
    debiased : bool
        Whether "cka" is debiased. The interval of biased CKA is that of a value which depends on n.
    level : float
        Probability that the interval contains the population's value, above 0 and below 1.
    method : {"jackknife", "subsampling"}
        "jackknife" leaves out one stimulus at a time: for CKA, and for RSA with compare="pearson"
        or "cosine". "subsampling" computes any metric of 200 random subsets of the stimuli.
    seed : int
        Seed of the subsets, at least 0. The jackknife draws nothing.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.
    **options
        Options of the metric's own function, except for ``precision``: products are float64.

    Returns
    -------
    interval : Interval
        ``estimate``, ``low``, ``high`` and ``standard_error``, arrays like x: (), or (L, M) if x or
        y is a list. The ends may lie outside the metric's range: they are not clipped.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        If the metric is not defined for x and y, or for all but one of their stimuli.

    Warns
    -----
    DegenerateWarning
        If the function of the metric warns.

    Notes
    -----
    The interval is estimate ± t · standard_error, where t is the quantile of Student's t with n - 1
    degrees of freedom (for subsampling, at most 199). In the simulations of bench/COVERAGE.md, 95 %
    intervals of samples of 50 to 1,000 stimuli contain a true debiased CKA of 0.3 or 0.9 in 92 to
    97 % of all cases.

    An interval is not a test of whether two representations are related. At a true debiased CKA of
    0 the estimate is not normally distributed, and the interval is too wide: it contains 0 in 99 %
    of all cases. To test, permute the stimuli: `calibrate`.

    A bootstrap, which draws stimuli with replacement, is wrong: two copies of a stimulus are alike
    in both representations. For the noise of docs/significance.md, whose debiased CKA is -0.014,
    its 95 % interval is [0.868, 0.937].

    The jackknife needs n² operations for all n deletions of a pair, after the two Gram matrices.
    With kernel="rbf" the bandwidth is that of all stimuli. Its variance (n - 1) / n Σ (rᵢ - r̄)²
    counts the contribution of pairs of stimuli twice (Efron & Stein 1981). That contribution, but
    at most three quarters of the variance, is subtracted if the estimate is more than two standard
    errors from 0. Closer to 0, where it dominates, the interval would otherwise be too narrow.

    Subsampling leaves out d = n / 4 stimuli each time; the variance is (n - d) / d times the mean
    squared deviation of the subsets' values from their mean (Shao & Wu 1989). It costs 200 times
    the metric. For metrics that depend on n, such as Procrustes and CCA, the interval is that of
    the value at n stimuli.

    Source: Tukey 1958, "Bias and confidence in not quite large samples", Annals of Mathematical
    Statistics 29; Efron & Stein 1981, "The jackknife estimate of variance", Annals of Statistics 9;
    Shao & Wu 1989, "A general theory for jackknife variance estimation", Annals of Statistics 17.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))  # 100 stimuli, 10 neurons
    >>> y = x + rng.standard_normal((100, 10))  # another layer, the same stimuli
    >>> r = rk.interval(x, y)
    >>> print(f"{r.estimate:.3f} in [{r.low:.3f}, {r.high:.3f}]")
    0.509 in [0.450, 0.567]
    >>> r = rk.interval(x, [x[:, :5], y], metric="procrustes", method="subsampling")
    >>> r.standard_error.round(3)
    array([[0.016, 0.017]])
    """
    metrics = pairwise.check_one_metric(metric, debiased, options, pairwise.PAIR_METRICS)
    level = _options.check_number(
        level, "level", low=0, high=1, exclude_low=True, exclude_high=True
    )
    method = _options.check_choice(method, "method", ("jackknife", "subsampling"))
    seed = _options.check_count(seed, "seed", minimum=0)
    if method == "jackknife":
        _check_has_deletions(metrics)
    sides = _check_sides(x, y, metrics, method)
    freedom = len(sides.xs[0]) - 1
    if method == "jackknife":
        estimate, variance = _jackknife(sides, metrics, backend)
    else:
        estimate, variance = _subsample(sides, metrics, backend, seed)
        freedom = min(freedom, _SUBSAMPLES - 1)
    if sides.is_pair:
        estimate, variance = estimate[0, 0], variance[0, 0]
    error = np.sqrt(variance)
    margin = _get_t_quantile(level, freedom) * error
    ends = estimate - margin, estimate + margin
    return Interval(*map(sides.source.restore, (estimate, *ends, error)))


def _check_has_deletions(metrics: dict[str, dict[str, Any]]) -> None:
    """Check that a metric has the jackknife."""
    ((name, options),) = metrics.items()
    if name in ("cka", "cka_debiased") or options.get("compare") in ("pearson", "cosine"):
        return
    what = "'rsa' with compare='spearman'" if name == "rsa" else repr(name)
    raise OptionError(
        f"method: 'jackknife' with metric {what}; expected 'subsampling', or 'cka', or 'rsa' with "
        "compare='pearson' or 'cosine'"
    )


def _check_sides(
    x: Any, y: Any, metrics: dict[str, dict[str, Any]], method: str
) -> _check_layers.Sides:
    """Check two arguments with enough stimuli for the metric of a part of them."""
    ((name, options),) = metrics.items()
    needed = max(pairwise.count_min_stimuli(name, options), options.get("folds", 0), 3)
    least = next(n for n in itertools.count(needed) if n - _count_left_out(n, method) >= needed)
    checks = pairwise.choose_check(metrics)
    if "defer" in checks or "min_stimuli" in checks:
        checks |= {"defer": False, "min_stimuli": least, "needed_for": ""}
    if y is None:
        raise DtypeError("y: None; expected an array (n, q), or a list of them")
    sides = _check_layers.check_sides(x, y, names=("x", "y"), **checks)
    n = len(sides.xs[0])
    if n < least:  # of kernel matrices
        raise ShapeError(f"x: {n} stimuli; expected at least {least}")
    return sides


def _count_left_out(n: int, method: str) -> int:
    """Return how many of n stimuli are left out at a time."""
    return 1 if method == "jackknife" else max(1, n // 4)


def _jackknife(
    sides: _check_layers.Sides, metrics: dict[str, dict[str, Any]], backend: str | None
) -> tuple[Array, Array]:
    """Return the metric of all pairs, and its variance: (L, M) each."""
    ((name, options),) = metrics.items()
    options = {key: value for key, value in options.items() if key != "precision"}
    values = _dispatch.call(
        "interval", backend, sides.source, sides.xs, sides.ys, metric=name, **options
    )
    estimate, variance, correction = (
        _arrays.to_numpy(values[key]) for key in ("estimate", "variance", "correction")
    )
    _check.raise_if_nan(estimate, pairwise.UNDEFINED[name])
    _check.raise_if_nan(variance, UNDEFINED)
    is_far = abs(estimate) > _NEAR_ZERO * np.sqrt(variance)
    return estimate, np.where(is_far, variance - correction, variance)


def _subsample(
    sides: _check_layers.Sides, metrics: dict[str, dict[str, Any]], backend: str | None, seed: int
) -> tuple[Array, Array]:
    """Return the metric of all pairs, and its variance from subsets of the stimuli: (L, M)."""
    ((name, options),) = metrics.items()
    n, rng = len(sides.xs[0]), np.random.default_rng(seed)
    size = n - _count_left_out(n, "subsampling")
    are_matrices = options.get("kernel") == "precomputed"

    def compute(rows: Any, message: str) -> Array:
        xs, ys = (
            [x[rows][:, rows] if are_matrices else x[rows] for x in side]
            for side in (sides.xs, sides.ys or ())
        )
        values, _ = pairwise.compare(xs, ys, sides.source, metrics, backend)
        return _check.raise_if_nan(_arrays.to_numpy(values[name]), message)

    estimate = compute(slice(None), pairwise.UNDEFINED.get(name, ""))
    message = f"x or y: the similarity is not defined for {size} of the {n} stimuli; expected more"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)  # the estimate has warned
        subsets = (np.sort(rng.permutation(n)[:size]) for _ in range(_SUBSAMPLES))
        values = np.stack([compute(rows, message) for rows in subsets])
    return estimate, size / (n - size) * values.var(axis=0)


def _get_t_quantile(level: float, freedom: int) -> float:
    """Return the t that bounds the central ``level`` of Student's distribution.

    For t = √ν tan θ the probability of (-t, t) is a finite sum of powers of cos θ, and θ is found
    by bisection. Source: Abramowitz & Stegun 1964, "Handbook of Mathematical Functions", 26.7.
    """
    is_odd = freedom % 2
    k = np.arange(1, freedom // 2)
    ratios = (2 * k - 1 + is_odd) / (2 * k + is_odd)
    low, high = 0.0, np.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        sine, cosine = np.sin(angle), np.cos(angle)
        first = np.array([cosine if is_odd else 1.0])[: freedom - 1]  # no term for ν = 1
        inside = sine * np.cumprod(np.concatenate([first, ratios * cosine**2])).sum()
        if is_odd:
            inside = (inside + angle) * 2 / np.pi
        low, high = (angle, high) if inside < level else (low, angle)
    return float(np.sqrt(freedom) * np.tan((low + high) / 2))
