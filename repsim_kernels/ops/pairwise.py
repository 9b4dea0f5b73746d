"""A metric between all pairs of two lists of representations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import repsim_kernels
from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._metrics import METRICS
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import OptionError
from repsim_kernels.ops import cka, rsa

_METRICS = {metric.name: metric for metric in METRICS if metric.pairwise}


def pairwise(
    xs: Iterable[ArrayLike],
    ys: Iterable[ArrayLike] | None = None,
    *,
    metric: str = "cka",
    backend: str | None = None,
    **options: Any,
) -> Array:
    """A metric between all pairs of representations, for example for a heat map of layers.

    Parameters
    ----------
    xs : sequence of L arrays, (n, p_i), float16 | bfloat16 | float32 | float64
        Activations for the same n stimuli. Integers are converted to float64.
    ys : sequence of M arrays, (n, q_j), optional
        The other representations; by default `xs`.
    metric : str
        One of "cka", "procrustes", "pwcca", "cca", "svcca", "procrustes_distance", "rsa" and
        "linear_predictivity".
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of ``xs[0]``.
    **options
        Options of the metric's own function.

    Returns
    -------
    values : array like xs[0], (L, M), float64
        ``values[i, j]`` is ``metric(xs[i], ys[j], **options)``: similarities, or distances for
        "procrustes_distance", in the units of the metric's own function.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable
        The message names the representation, for example ``xs[3]``.

    Warns
    -----
    DegenerateWarning
        If the metric's own function warns; once, for the largest representations.

    Notes
    -----
    Each Gram matrix and each spectrum is computed once: one pass over each representation instead
    of one per pair. All of them are in memory at once, 8 n² bytes per representation.
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
    """
    metric = _options.check_choice(metric, "metric", _METRICS)
    defaults = _get_default_options(metric)
    unknown = set(options) - set(defaults)
    if unknown:
        raise OptionError(
            f"{min(unknown)}: not an option of metric {metric!r}; expected one of "
            f"{', '.join(defaults) or 'none'}"
        )
    options = defaults | options
    min_stimuli = _check_metric_options(metric, options)
    defer = metric == "cka"
    checked_xs, source = _check.check_representations(
        xs, "xs", min_stimuli=min_stimuli, defer=defer
    )
    checked_ys = None
    if ys is not None:
        checked_ys, _ = _check.check_representations(
            ys,
            "ys",
            min_stimuli=min_stimuli,
            like=(checked_xs[0], source),
            defer=defer,
        )
    n = len(checked_xs[0])
    if "folds" in options:
        options["folds"] = _options.make_contiguous_folds(options["folds"], n)
    both = (checked_xs, checked_xs if checked_ys is None else checked_ys)
    p, q = (max(x.shape[1] for x in side) for side in both)
    if _METRICS[metric].cca_ridge:
        _options.warn_if_degenerate(metric, n, p, q, options["ridge"], options["penalty"])
    chance = metric == "cka" and _options.may_be_high_by_chance(
        n, p, q, options["debiased"], options["kernel"]
    )
    if chance:
        options["chance"] = True
    result = _dispatch.call(
        "pairwise", backend, source, checked_xs, checked_ys, metric=metric, **options
    )
    values = result["similarity"] if chance else result
    names = {f"xs[{i}]": x for i, x in enumerate(checked_xs)}
    names |= {f"ys[{i}]": y for i, y in enumerate(checked_ys or ())}
    undefined = {"cka": cka.UNDEFINED, "rsa": rsa.UNDEFINED}
    values = _check.raise_if_nan(values, undefined.get(metric, ""), **names)
    diagonal = list(range(len(checked_xs)))
    if ys is None and _METRICS[metric].symmetric:
        values = (values + values.swapaxes(0, 1)) / 2  # exactly symmetric
    if ys is None and not options.get("ridge") and not options.get("penalty"):
        values[diagonal, diagonal] = 1.0 if _METRICS[metric].kind == "similarity" else 0.0
    if chance:
        chances = result["chance"]
        if ys is None:
            chances[diagonal, diagonal] = 0.0
        _options.warn_if_high_by_chance(float(chances.max()))
    return values


def _get_default_options(metric: str) -> dict[str, Any]:
    """Return the options of a metric's own function and their defaults."""
    parameters = inspect.signature(getattr(repsim_kernels, metric)).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("batched", "backend")
    }


def _check_metric_options(metric: str, options: dict[str, Any]) -> int:
    """Check the options in place; return the smallest number of stimuli that they allow."""
    for name in {"debiased", "squared"} & set(options):
        options[name] = _options.check_flag(options[name], name)
    if metric == "cka":
        options["sigma"] = _options.check_bandwidth(options["kernel"], options["sigma"])
        options["precision"] = _options.check_product_precision(options["precision"])
        return 4 if options["debiased"] else 2
    if metric == "rsa":
        _options.check_rsa_options(options["distance"], options["compare"])
        return 3
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
    return 2
