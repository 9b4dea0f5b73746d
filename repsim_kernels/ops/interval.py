"""Confidence intervals of similarities."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array, ArrayLike, Tensor
from repsim_kernels.errors import DegenerateWarning, OptionError, ShapeError
from repsim_kernels.ops import pairwise

_SUBSAMPLES = 200
_NEAR_ZERO = 2  # standard errors
UNDEFINED = (
    "x or y: the similarity is not defined without one of the stimuli; expected representations in "
    "which no single stimulus makes all the difference"
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
        Activations for the same n stimuli, at least one more than the metric needs, and 4. Integers
        are converted to float64. Either may be a list of layers, (n, p_i), as in `pairwise`: the
        result then has a value for each pair.
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
    in both representations. For an observed debiased CKA of 0.0075, its 95 % interval was
    [0.205, 0.290].

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
    metrics = check_metric(metric, debiased, options, pairwise.PAIR_METRICS)
    level = _options.check_number(level, "level", low=0, high=1, exclude_low=True)
    if level == 1:
        raise OptionError("level: 1; expected a number below 1, such as 0.95")
    method = _options.check_choice(method, "method", ("jackknife", "subsampling"))
    seed = _options.check_count(seed, "seed", minimum=0)
    if method == "jackknife":
        _check_has_deletions(metrics)
    xs, ys, source, is_pair = _check_sides(x, y, metrics)
    n = len(xs[0])
    if method == "jackknife":
        estimate, variance = _jackknife(xs, ys, source, metrics, backend)
        freedom = n - 1
    else:
        estimate, variance = _subsample(xs, ys, source, metrics, backend, seed)
        freedom = min(n, _SUBSAMPLES) - 1
    if is_pair:
        estimate, variance = estimate[0, 0], variance[0, 0]
    error = variance**0.5
    margin = _get_t_quantile(level, freedom) * error
    return Interval(estimate, estimate - margin, estimate + margin, error)


def check_metric(
    metric: Any, debiased: Any, options: dict[str, Any], choices: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the name of one metric of the choices, and its options with float64 products."""
    name = _options.check_choice(metric, "metric", choices)
    debiased = _options.check_flag(debiased, "debiased")
    if "precision" in options:
        raise OptionError("precision: not an option here; expected none, as products are float64")
    if name == "cka":
        options = options | {"debiased": debiased}
    elif not debiased:
        raise OptionError(f"debiased: False with metric {name!r}; expected metric 'cka'")
    metrics = pairwise.check_metric_options((name,), options)
    if "precision" in metrics[name]:
        metrics[name]["precision"] = "float64"
    return metrics


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


def _is_list_of_layers(x: Any) -> bool:
    """Whether x is a list or tuple of two-dimensional arrays."""
    if not isinstance(x, (list, tuple)) or not x:
        return False
    try:
        return len(np.shape(x[0])) > 1
    except Exception:  # a user's class may raise anything; reading it raises an error that names it
        return False


def _check_sides(
    x: Any, y: Any, metrics: dict[str, dict[str, Any]]
) -> tuple[list[Tensor], list[Tensor], Source, bool]:
    """Return the checked layers of both sides, their source, and whether neither is a list."""
    checks = pairwise.choose_check(metrics)
    checks.pop("defer", None)
    ((name, options),) = metrics.items()
    least = max(4, pairwise.count_min_stimuli(name, options) + 1)
    if "min_stimuli" in checks:
        checks["min_stimuli"] = least
    are_lists = _is_list_of_layers(x), _is_list_of_layers(y)
    if not any(are_lists):
        a, b, source = _check.check_pair(x, y, **checks)
        xs, ys = [a], [b]
    else:
        x, y = (z if is_list else [z] for z, is_list in zip((x, y), are_lists, strict=True))
        xs, source = _check.check_representations(x, "x", **checks)
        ys, _ = _check.check_representations(y, "y", like=(xs[0], source), **checks)
    if len(xs[0]) < least:
        raise ShapeError(f"x: {len(xs[0])} stimuli; expected at least {least}")
    return xs, ys, source, not any(are_lists)


def _jackknife(
    xs: list[Tensor],
    ys: list[Tensor],
    source: Source,
    metrics: dict[str, dict[str, Any]],
    backend: str | None,
) -> tuple[Array, Array]:
    """Return the metric of all pairs, and its variance: (L, M) each."""
    ((name, options),) = metrics.items()
    options = {key: value for key, value in options.items() if key != "precision"}
    values = _dispatch.call("interval", backend, source, xs, ys, metric=name, **options)
    estimate = _check.raise_if_nan(values["estimate"], pairwise.UNDEFINED[name])
    variance = _check.raise_if_nan(values["variance"], UNDEFINED)
    is_far = abs(estimate) > _NEAR_ZERO * variance**0.5
    return estimate, variance - is_far * values["correction"]


def _subsample(
    xs: list[Tensor],
    ys: list[Tensor],
    source: Source,
    metrics: dict[str, dict[str, Any]],
    backend: str | None,
    seed: int,
) -> tuple[Array, Array]:
    """Return the metric of all pairs, and its variance from subsets of the stimuli: (L, M)."""
    ((name, options),) = metrics.items()
    n, rng = len(xs[0]), np.random.default_rng(seed)
    size = n - n // 4
    are_matrices = options.get("kernel") == "precomputed"

    def take(side: list[Tensor], rows: Any) -> list[Tensor]:
        return [x[rows][:, rows] if are_matrices else x[rows] for x in side]

    def compute(a: list[Tensor], b: list[Tensor], message: str) -> Array:
        values, _ = pairwise.compare(a, b, source, metrics, backend)
        return _check.raise_if_nan(values[name], message)

    estimate = compute(xs, ys, pairwise.UNDEFINED.get(name, ""))
    message = f"x or y: the similarity is not defined for {size} of the {n} stimuli; expected more"
    total, squares = 0 * estimate, 0 * estimate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)  # the estimate has warned
        for _ in range(_SUBSAMPLES):
            rows = np.sort(rng.permutation(n)[:size])
            deviation = compute(take(xs, rows), take(ys, rows), message) - estimate
            total, squares = total + deviation, squares + deviation**2
    mean = total / _SUBSAMPLES
    spread = abs(squares / _SUBSAMPLES - mean**2)
    return estimate, size / (n - size) * spread


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
