"""All pairs of two lists of representations."""

from __future__ import annotations

import inspect
from typing import Any

import repsim_kernels
from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._metrics import METRICS
from repsim_kernels._typing import Array
from repsim_kernels.errors import OptionError

_METRICS = {metric.name: metric for metric in METRICS if metric.pairwise}


def pairwise(
    xs: Any, ys: Any = None, *, metric: str = "cka", backend: str | None = None, **options: Any
) -> Array:
    """A metric between all pairs of representations, as for a heat map of layers.

    Parameters
    ----------
    xs : sequence of L arrays, (n, p_i), float16 | bfloat16 | float32 | float64
        Activations of the same n stimuli. Integers are taken as float64.
    ys : sequence of M arrays, (n, q_j), optional
        The other side; `xs` itself unless given.
    metric : str
        "cka", "procrustes", "pwcca", "cca", "svcca", "procrustes_distance", "rsa" or
        "linear_predictivity".
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of ``xs[0]``.
    **options
        Those of the metric's own function.

    Returns
    -------
    values : array like xs[0], (L, M), float64
        ``values[i, j]`` is ``metric(xs[i], ys[j], **options)``.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable
        Naming the representation, as ``xs[3]``.

    Warns
    -----
    DegenerateWarning
        Where the metric's own function does, once for the largest representations.

    Notes
    -----
    Each Gram and each spectrum is made once: L passes over activations, not L·M. They are held
    together, 8 n² bytes for each representation. Source: that of each metric.
    """
    metric = _options.check_choice(metric, "metric", _METRICS)
    defaults = _default_options(metric)
    unknown = set(options) - set(defaults)
    if unknown:
        known = ", ".join(defaults) or "none"
        raise OptionError(f"{min(unknown)}: not an option of metric {metric!r}; it has {known}")
    options = defaults | options
    least = _checked(metric, options)
    defer_finite = metric == "cka"
    xs, source = _check.check_representations(
        xs, "xs", min_stimuli=least, defer_finite=defer_finite
    )
    if ys is not None:
        first = xs[0], source
        ys, _ = _check.check_representations(
            ys, "ys", min_stimuli=least, like=first, defer_finite=defer_finite
        )
    n, chance = len(xs[0]), False
    if "folds" in options:
        options["folds"] = _options.make_contiguous_folds(options["folds"], n)
    p, q = (max(x.shape[1] for x in zs) for zs in (xs, xs if ys is None else ys))
    if _METRICS[metric].cca_ridge:
        _options.warn_if_degenerate(metric, n, p, q, options["ridge"], options["penalty"])
    if metric == "cka":
        chance = _options.may_be_high_by_chance(n, p, q, options["debiased"], options["kernel"])
    if chance:
        options["chance"] = True
    found = _dispatch.call("pairwise", backend, source, xs, ys, metric=metric, **options)
    values = found["similarity"] if chance else found
    undefined = {"cka": _check.UNDEFINED_CKA, "rsa": _check.UNDEFINED_RSA}
    named = {f"{k}[{i}]": z for k, zs in (("xs", xs), ("ys", ys)) for i, z in enumerate(zs or ())}
    values = _check.raise_if_nan(values, undefined.get(metric, ""), **named)
    itself = list(range(len(xs)))
    if ys is None and _METRICS[metric].symmetric:
        values = (values + values.swapaxes(0, 1)) / 2  # to the bit
    if ys is None and not options.get("ridge") and not options.get("penalty"):
        values[itself, itself] = 1.0 if _METRICS[metric].kind == "similarity" else 0.0
    if chance:
        others = found["chance"]
        if ys is None:
            others[itself, itself] = 0.0
        _options.warn_if_high_by_chance(float(others.max()))
    return values


def _default_options(metric: str) -> dict[str, Any]:
    """The options of a metric's own function and their defaults."""
    parameters = inspect.signature(getattr(repsim_kernels, metric)).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("batched", "backend")
    }


def _checked(metric: str, options: dict[str, Any]) -> int:
    """Check the options in place; return the least number of stimuli."""
    for name in {"debiased", "squared"} & set(options):
        options[name] = _options.check_flag(options[name], name)
    if metric == "cka":
        options["sigma"] = _options.check_bandwidth(options["kernel"], options["sigma"])
        return 4 if options["debiased"] else 2
    if metric == "linear_predictivity":
        options["ridge"] = _options.check_ridge_or_gcv(options["ridge"])
    elif "ridge" in options:
        options["ridge"], options["penalty"] = _options.check_ridge_or_penalty(
            options["ridge"], options["penalty"]
        )
    if "variance" in options:
        options["variance"] = _options.check_number(
            options["variance"], "variance", low=0, high=1, exclude_low=True
        )
    if "form" in options:
        _options.check_choice(options["form"], "form", ("squared", "angular", "size-and-shape"))
    if metric == "rsa":
        _options.check_rsa_options(options["distance"], options["compare"])
        return 3
    return 2
