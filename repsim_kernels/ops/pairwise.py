"""One metric or several between all pairs of two lists of representations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, overload

import repsim_kernels
from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._arrays import Source
from repsim_kernels._metrics import METRICS
from repsim_kernels._typing import Array, ArrayLike, Tensor
from repsim_kernels.errors import OptionError
from repsim_kernels.ops import cka, neighbours, rsa

PAIR_METRICS = {metric.name: metric for metric in METRICS if metric.pairwise}
UNDEFINED = {
    "cka": cka.UNDEFINED,
    "cka_debiased": cka.UNDEFINED,
    "rsa": rsa.UNDEFINED,
    **{metric.name: neighbours.UNDEFINED for metric in METRICS if metric.neighbours},
}
"""What to say about a metric that is not defined for every pair."""


@overload
def pairwise(
    xs: Iterable[ArrayLike],
    ys: Iterable[ArrayLike] | None = None,
    *,
    metric: str = ...,
    backend: str | None = ...,
    **options: Any,
) -> Array: ...


@overload
def pairwise(
    xs: Iterable[ArrayLike],
    ys: Iterable[ArrayLike] | None = None,
    *,
    metric: Sequence[str],
    backend: str | None = ...,
    **options: Any,
) -> dict[str, Array]: ...


def pairwise(
    xs: Iterable[ArrayLike],
    ys: Iterable[ArrayLike] | None = None,
    *,
    metric: str | Sequence[str] = "cka",
    backend: str | None = None,
    **options: Any,
) -> Array | dict[str, Array]:
    """One metric or several between all pairs of representations, as for a heat map of layers.

    Parameters
    ----------
    xs : sequence of L arrays, (n, p_i), float16 | bfloat16 | float32 | float64
        Activations for the same n stimuli. Integers are converted to float64. With
        kernel="precomputed", kernel matrices, (n, n), as in `cka`.
    ys : sequence of M arrays, (n, q_j), optional
        The other representations; by default `xs`.
    metric : str, or sequence of str
        One or several of "cka", "cka_debiased", "procrustes", "pwcca", "cca", "svcca",
        "procrustes_distance", "rsa", "linear_predictivity", "mutual_knn", "cknna" and
        "jaccard_knn".
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of ``xs[0]``.
    **options
        Options of the metric's own function; of several metrics, each option goes to all that have
        it. "cka_debiased" has those of `cka` except ``debiased``.

    Returns
    -------
    values : array like xs[0], (L, M), float64
        ``values[i, j]`` is ``metric(xs[i], ys[j], **options)``: similarities, or distances for
        "procrustes_distance", in the units of the metric's own function. For a sequence of metrics,
        a dict of such arrays by metric.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable
        The message names the representation, for example ``xs[3]``.

    Warns
    -----
    DegenerateWarning
        If the function of a metric warns; once, for the largest representations.

    Notes
    -----
    Each Gram matrix and each spectrum is computed once, for all pairs and metrics. All of them are
    in memory at once, 8 n² bytes per representation, or up to three times that for several metrics.
    Next to other metrics, CKA is computed from their Gram matrices in float64, unless a
    representation has fewer neurons than stimuli.
    Source: the docstring of each metric's function.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> layers = [rng.standard_normal((100, 10))]
    >>> for _ in range(2):
    ...     layers.append(layers[-1] + rng.standard_normal((100, 10)))
    >>> rk.pairwise(layers, metric="cka", debiased=True).round(2)
    array([[1.  , 0.51, 0.32],
           [0.51, 1.  , 0.66],
           [0.32, 0.66, 1.  ]])
    >>> values = rk.pairwise(layers, metric=["cka_debiased", "rsa"])
    >>> values["rsa"][0].round(2)
    array([1.  , 0.46, 0.29])
    """
    names = check_names(metric)
    metrics = check_metric_options(names, options)
    checks = choose_check(metrics)
    checked_xs, source = _check.check_representations(xs, "xs", **checks)
    checked_ys = None
    if ys is not None:
        like = checked_xs[0], source
        checked_ys, _ = _check.check_representations(ys, "ys", like=like, **checks)
    values, chances = compare(checked_xs, checked_ys, source, metrics, backend)
    deferred = {}
    if "defer" in checks:
        deferred = {f"xs[{i}]": x for i, x in enumerate(checked_xs)}
        deferred |= {f"ys[{i}]": y for i, y in enumerate(checked_ys or ())}
    for name in names:
        _check.raise_if_nan(values[name], UNDEFINED.get(name, ""), **deferred)
        if ys is None:
            values[name] = compare_with_itself(values[name], name, metrics[name])
    if chances is not None:
        if ys is None:
            _set_diagonal(chances, 0.0)
        _options.warn_if_high_by_chance(float(chances.max()))
    return values[names[0]] if isinstance(metric, str) else values


def check_names(metric: Any) -> tuple[str, ...]:
    """Return the names of one metric or several, without duplicates; OptionError for none."""
    if isinstance(metric, str):
        return (_options.check_choice(metric, "metric", PAIR_METRICS),)
    names = _options.check_choices(metric, "metric", tuple(PAIR_METRICS))
    if not names:
        raise OptionError("metric: no names; expected one or several, such as ['cka']")
    return names


def compare_with_itself(values: Array, name: str, options: dict[str, Any]) -> Array:
    """Remove the rounding errors of a metric between a list and itself, (L, L)."""
    if PAIR_METRICS[name].symmetric:
        values = (values + values.swapaxes(0, 1)) / 2  # exactly symmetric
    if not options.get("ridge") and not options.get("penalty"):
        _set_diagonal(values, 1.0 if PAIR_METRICS[name].kind == "similarity" else 0.0)
    return values


def _set_diagonal(values: Array, value: float) -> None:
    diagonal = list(range(values.shape[0]))
    values[diagonal, diagonal] = value


def compare(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    source: Source,
    metrics: dict[str, dict[str, Any]],
    backend: str | None,
) -> tuple[dict[str, Array], Array | None]:
    """Return metrics of checked representations, and the chance levels of CKA.

    Parameters
    ----------
    xs, ys : list of tensors, (n, p_i) and (n, q_j); None for ys if they are xs
    source : Source
        That of the arguments.
    metrics : dict of str to dict
        Names and options of metrics, from `check_metric_options`.
    backend : str, optional

    Returns
    -------
    values : dict of str to array, (L, M), float64
        By metric; NaN where it is not defined.
    chances : array, (L, M), or None
        None unless `_options.may_be_high_by_chance`.
    """
    n = len(xs[0])
    p, q = (max(x.shape[1] for x in side) for side in (xs, xs if ys is None else ys))
    precision = None
    metrics = {name: dict(options) for name, options in metrics.items()}
    for name, options in metrics.items():
        if PAIR_METRICS[name].cca_ridge:
            ridges = options["ridge"], options["penalty"]
            _options.warn_if_degenerate(name, n, p, q, *ridges)
        if "folds" in options:
            options["folds"] = _options.make_contiguous_folds(options["folds"], n)
        precision = options.pop("precision", precision)
    chance = "cka" in metrics and _options.may_be_high_by_chance(
        n, p, q, metrics["cka"]["debiased"], metrics["cka"]["kernel"]
    )
    if chance:
        metrics["cka"]["chance"] = True
    values = _dispatch.call(
        "pairwise", backend, source, xs, ys, metrics=metrics, precision=precision
    )
    if not chance:
        return values, None
    return values | {"cka": values["cka"]["similarity"]}, values["cka"]["chance"]


def choose_check(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how to check representations: options of `_check.check_representations`."""
    kernels = [options["kernel"] for options in metrics.values() if "kernel" in options]
    others = [name for name, options in metrics.items() if "kernel" not in options]
    if "precomputed" in kernels and others:
        raise OptionError(
            f"kernel: 'precomputed' with metric {others[0]!r}, which is computed from features; "
            "expected only 'cka' and 'cka_debiased'"
        )
    if kernels and not others:
        return cka.choose_check(kernels[0], any(map(is_debiased, metrics, metrics.values())))
    counts = {name: count_min_stimuli(name, own) for name, own in metrics.items()}
    most = max(counts, key=lambda name: counts[name], default="")
    if "k" in metrics.get(most, ()):
        return _check.require_neighbours(most, metrics[most]["k"])
    return {"min_stimuli": counts.get(most, 2)}


def is_debiased(name: str, options: dict[str, Any]) -> bool:
    """Whether a metric is debiased CKA."""
    return name == "cka_debiased" or options.get("debiased", False)


def count_min_stimuli(name: str, options: dict[str, Any]) -> int:
    """Return the smallest number of stimuli that a metric needs, whatever its folds."""
    if is_debiased(name, options):
        return 4
    if "k" in options:
        return int(options["k"]) + 1
    return next(metric.min_stimuli for metric in METRICS if metric.name == name)


def _get_default_options(metric: str) -> dict[str, Any]:
    """Return the options of a metric's own function and their defaults."""
    fixed = {"batched", "backend"}
    if metric == "cka_debiased":
        metric, fixed = "cka", fixed | {"debiased"}
    parameters = inspect.signature(getattr(repsim_kernels, metric)).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in fixed
    }


def check_metric_options(
    names: tuple[str, ...], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the checked options of each metric: its defaults, and those of `options` it has."""
    metrics = {name: _get_default_options(name) for name in names}
    known = {option: None for defaults in metrics.values() for option in defaults}
    unknown = set(options) - set(known)
    if unknown:
        raise OptionError(
            f"{min(unknown)}: not an option of metric {' or '.join(map(repr, names))}; expected "
            f"one of {', '.join(known) or 'none'}"
        )
    for name, own in metrics.items():
        own |= {option: value for option, value in options.items() if option in own}
        _check_options(name, own)
    return metrics


def check_one_metric(
    metric: Any, debiased: Any, options: dict[str, Any], choices: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the name of one metric of the choices, and its options with float64 products.

    ``debiased`` is the caller's own argument, for "cka".
    """
    name = _options.check_choice(metric, "metric", choices)
    debiased = _options.check_flag(debiased, "debiased")
    if "precision" in options:
        raise OptionError("precision: not an option here; expected none, as products are float64")
    if name == "cka":
        options = options | {"debiased": debiased}
    elif not debiased:
        raise OptionError(f"debiased: False with metric {name!r}; expected metric 'cka'")
    metrics = check_metric_options((name,), options)
    if "precision" in metrics[name]:
        metrics[name]["precision"] = "float64"
    return metrics


def _check_options(metric: str, options: dict[str, Any]) -> None:
    """Check the options of one metric in place, except for its folds."""
    for name in {"debiased", "squared"} & set(options):
        options[name] = _options.check_flag(options[name], name)
    if "kernel" in options:
        options["sigma"] = _options.check_bandwidth(
            options["kernel"], options["sigma"], cka.KERNELS
        )
        options["precision"] = _options.check_product_precision(options["precision"])
    if "compare" in options:
        _options.check_rsa_options(options["distance"], options["compare"])
    elif "distance" in options:
        _options.check_distance(options["distance"])
    if "k" in options:
        options["k"] = _options.check_count(options["k"], "k")
    if metric == "linear_predictivity":
        options["ridge"] = _options.check_ridge_or_gcv(options["ridge"])
    elif "ridge" in options:
        options["ridge"], options["penalty"] = _options.check_ridge_or_penalty(
            options["ridge"], options["penalty"]
        )
    if "variance" in options:
        options["variance"] = _options.check_variance(options["variance"])
    if "form" in options:
        _options.check_form(options["form"])
