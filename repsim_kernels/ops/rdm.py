"""Representational dissimilarity matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from repsim_kernels import (
    _arrays,
    _check,
    _check_conditions,
    _check_noise,
    _dispatch,
    _options,
)
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import ConstantError, ConvergenceError


def rdm(
    x: ArrayLike,
    *,
    distance: str = "euclidean",
    labels: Any = None,
    folds: Any = None,
    noise: Any = None,
    shrinkage: str | None = None,
    backend: str | None = None,
) -> Array:
    distance = _options.check_rdm_distance(distance)
    x, source = _check.check_representation(x, allow_constant=True, allow_batch=False)
    averages = _check_conditions.check_conditions(labels, folds, len(x), distance)
    checked_noise = _check_noise.check_noise(noise, shrinkage, x, distance, source)
    distances = _dispatch.call(
        "rdm", backend, source, x, distance=distance, averages=averages, noise=checked_noise
    )
    if math.isnan(float(distances.sum())):
        raise _explain_undefined(_arrays.to_numpy(distances), distance, labels, len(x))
    return distances


def _explain_undefined(distances: Any, distance: str, labels: Any, n: int) -> Exception:
    """Return the error for distances (N,) some of which are NaN."""
    if distance in ("mahalanobis", "crossnobis"):
        return ConvergenceError(
            "noise: its covariance is singular to rounding; expected a positive definite one: pass "
            "more residuals, or shrinkage='diagonal'"
        )
    undefined = np.isnan(distances)
    n_cond = math.isqrt(2 * len(distances)) + 1
    i, j = (pair[undefined] for pair in np.triu_indices(n_cond, 1))
    counts = np.bincount(np.concatenate([i, j]), minlength=n_cond)
    candidates = np.flatnonzero(counts == counts.max())[: 2 if n_cond == 2 else 1]
    if labels is None:
        what, names = "stimulus", [str(k) for k in candidates]
    else:
        sorted_names = _check_conditions.check_names(labels, "labels", n)[0]
        what, names = "condition", [repr(sorted_names[k].item()) for k in candidates]
    state = "zero" if distance == "cosine" else "the same in every neuron"
    return ConstantError(
        f"x: {what} {' or '.join(names)} is {state}, so that its {distance} distances are not "
        "defined; expected another distance, or patterns that vary"
    )
