"""Every metric of a pair of representations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from repsim_kernels import _check, _options
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.ops import pairwise


def similarities(
    x: ArrayLike,
    y: ArrayLike,
    *,
    metrics: Sequence[str] | None = None,
    backend: str | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Every metric of a pair of representations, in one table.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n stimuli. Integers are converted to float64.
    metrics : sequence of str, optional
        Any of "cka", "procrustes", "pwcca", "cca", "svcca", "cka_debiased", "procrustes_distance",
        "rsa", "linear_predictivity", "mutual_knn", "cknna" and "jaccard_knn". By default all that
        the pair has: those that need more than n stimuli, and those that are not defined for x and
        y, are left out.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.
    **options
        Options of the metrics' own functions, as in `pairwise`.

    Returns
    -------
    values : dict of str to array like x, (), float64
        By metric: similarities, or distances for "procrustes_distance", in the units of the
        metric's own function.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        If x or y is the same for every stimulus, or one of the `metrics` is not defined for them.

    Warns
    -----
    DegenerateWarning
        If the function of a metric warns: for "cca" and "pwcca" of many neurons, pass ``ridge``.

    Notes
    -----
    ``pairwise([x], [y], metric=metrics, **options)`` without dimensions: each Gram matrix and each
    spectrum is computed once for all metrics.
    Source: the docstring of each metric's function.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> for metric, value in rk.similarities(x, y).items():
    ...     print(f"{metric:20}{value:.3f}")
    cka                 0.552
    procrustes          0.729
    pwcca               0.729
    cca                 0.719
    svcca               0.719
    cka_debiased        0.509
    procrustes_distance 0.542
    rsa                 0.457
    linear_predictivity 0.438
    mutual_knn          0.280
    cknna               0.302
    jaccard_knn         0.171
    """
    choices = tuple(pairwise.PAIR_METRICS)
    names = choices if metrics is None else _options.check_choices(metrics, "metrics", choices)
    checked = pairwise.check_metric_options(names, options)
    checks = pairwise.choose_check(checked)
    if metrics is None:
        checks |= {"min_stimuli": 2, "needed_for": ""}
    x, y, source = _check.check_pair(x, y, **checks)
    if metrics is None:
        needed = {name: pairwise.count_min_stimuli(name, own) for name, own in checked.items()}
        if "folds" not in options:
            needed["linear_predictivity"] = checked["linear_predictivity"]["folds"]
        checked = {name: own for name, own in checked.items() if needed[name] <= len(x)}
    arrays, chances = pairwise.compare([x], [y], source, checked, backend)
    values = {name: array[0, 0] for name, array in arrays.items()}
    if metrics is None:
        values = {name: value for name, value in values.items() if not math.isnan(float(value))}
    deferred = {"x": x, "y": y} if "defer" in checks else {}
    for name, value in values.items():
        _check.raise_if_nan(value, pairwise.UNDEFINED.get(name, ""), **deferred)
    if chances is not None:
        _options.warn_if_high_by_chance(float(chances.max()))
    return values
