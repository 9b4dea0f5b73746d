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
    labels: ArrayLike | None = None,
    folds: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    shrinkage: str | None = None,
    backend: str | None = None,
) -> Array:
    """Representational dissimilarity matrix (RDM): the distances of all pairs of conditions.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n stimuli or trials by p neurons, voxels or channels. Integers are converted to
        float64.
    distance : {"euclidean", "sqeuclidean", "correlation", "cosine", "mahalanobis", "crossnobis"}
        Distance between the patterns of two conditions. The first five are as in SciPy's ``pdist``;
        the first four are those that `rsa` compares. "crossnobis" is the crossvalidated squared
        Mahalanobis distance, divided by p.
    labels : (n,), optional
        The condition of each row, integers or strings. Rows of a condition are averaged. By
        default, each row is a condition of its own; "crossnobis" needs labels.
    folds : (n,), optional
        For "crossnobis": the fold of each row, usually its run, integers or strings. Each condition
        needs a row in every fold; several are averaged. By default, the k-th row of each condition
        is in fold k, for which all conditions must have equally many rows.
    noise : array, optional
        For "mahalanobis" and "crossnobis", the covariance Σ of the noise, in one of three forms:

        * a covariance (p, p), symmetric up to 1e-5 of its largest entry and positive definite. Not
          a precision;
        * residuals (m, p), from which Σ is estimated: any other array of two dimensions;
        * labels (n,) of groups of the rows of x: Σ is estimated from the residuals of x within
          them. Usually they are the conditions, and for "crossnobis" the conditions of each fold.

        "mahalanobis" needs it; "crossnobis" uses Σ = I without it.
    shrinkage : {"ledoit-wolf", "diagonal"}, optional
        How Σ is made better conditioned. Residuals are shrunk towards a multiple of the identity,
        as in Ledoit & Wolf 2004, unless it is "diagonal": only the variances are used (univariate
        noise normalisation). A covariance is used as it is, or only its diagonal.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    distances : array like x, (N,), float64
        For N = n_cond(n_cond - 1)/2 pairs of conditions in sorted order of their labels (of rows in
        their order without labels), in the order of ``pdist``, which SciPy's ``squareform``
        expands. In the units of x for "euclidean", squared for "sqeuclidean" and for "crossnobis"
        without noise; otherwise without a unit. Not negative, except for "crossnobis".

    Warns
    -----
    DegenerateWarning
        If Σ is estimated from residuals that contain differences between folds.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    LabelError
        If there are fewer than two conditions or folds, a condition has no row in one of the folds
        or, for "crossnobis", only one row. The message names the condition.
    ConstantError
        If a pattern is zero (for "cosine") or constant (for "correlation"), or a neuron has no
        variance in the noise, for shrinkage="diagonal".
    ConvergenceError
        If Σ is singular to rounding.

    Notes
    -----
    With δ = a - b for the patterns a and b of two conditions, their Mahalanobis distance is
    √(δ Σ⁻¹ δᵀ). Their crossnobis distance is the mean over all pairs f ≠ g of K folds of
    δ_f Σ⁻¹ δ_gᵀ / p. It is not biased by noise that is independent between folds: if two conditions
    have the same expected pattern, its expectation is 0, and it is negative about half of the time.
    That requires a Σ that does not depend on the differences between folds. Residuals within
    conditions but across folds contain these, and make distances too large if they are few: for 24
    rows of 50 neurons and unit noise, equal conditions were 0.08 apart on average, and 0.03 with
    "diagonal".

    The covariance of residuals is that of scikit-learn's ``LedoitWolf().fit(residuals)``: they are
    centred, and products divided by m. Within conditions, it is also multiplied by n / (n - number
    of conditions), which corrects for the means that were subtracted. If p > m, Σ⁻¹ is applied
    through m x m matrices, and no p x p matrix is formed.

    Patterns that are equal have distance exactly 0; distances of close ones are computed from their
    difference, not from the Gram matrix.

    Sources: Kriegeskorte, Mur & Bandettini 2008, "Representational similarity analysis: connecting
    the branches of systems neuroscience", Frontiers in Systems Neuroscience 2; Walther et al. 2016,
    "Reliability of dissimilarity measures for multi-voxel pattern analysis", NeuroImage 137; Ledoit
    & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", Journal
    of Multivariate Analysis 88.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> labels = np.tile(["face", "house", "tree"], 8)  # 8 runs of 3 conditions
    >>> patterns = {"face": 0.0, "house": 0.0, "tree": 1.0}
    >>> x = np.array([[patterns[c]] for c in labels]) + rng.standard_normal((24, 50))
    >>> rk.rdm(x, labels=labels).round(2)  # noise separates face from house
    array([4.03, 8.34, 7.55])
    >>> residuals = rng.standard_normal((300, 50))  # for example those of a GLM
    >>> rk.rdm(x, distance="crossnobis", labels=labels, noise=residuals).round(2)
    array([0.08, 1.17, 0.91])
    """
    distance = _options.check_rdm_distance(distance)
    x, source = _check.check_representation(x, allow_constant=True, allow_batch=False)
    groups = _check_conditions.check_conditions(labels, folds, len(x), distance)
    checked_noise = _check_noise.check_noise(noise, shrinkage, x, distance, groups, source)
    distances = _dispatch.call(
        "rdm", backend, source, x, distance=distance, groups=groups, noise=checked_noise
    )
    if math.isnan(float(distances.sum())):
        raise _explain_undefined(_arrays.to_numpy(distances), distance, labels, len(x))
    return distances


def _explain_undefined(distances: Any, distance: str, labels: Any, n: int) -> Exception:
    """Return the error for distances (N,) some of which are NaN."""
    if distance in ("mahalanobis", "crossnobis"):
        return ConvergenceError(
            "noise: its covariance is not positive definite, or singular to rounding; expected a "
            "positive definite one, more residuals, or shrinkage='diagonal'"
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
