"""Similarities calibrated by their null distribution under permutations of the stimuli."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from repsim_kernels import (
    _arrays,
    _check,
    _check_layers,
    _check_permutations,
    _dispatch,
    _metrics,
    _options,
)
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import BackendUnavailable, OptionError, ShapeError
from repsim_kernels.ops import pairwise

METRICS = tuple(metric.name for metric in _metrics.METRICS if metric.calibration)

_PERMUTATIONS = 200  # by default
# How far rounding may separate equal sums of one block of products, in float64.
_ROUNDING = 1e-12
# The fewest stimuli for which the third moment of permutations has all its terms.
_MIN_STIMULI_OF_MOMENTS = 6


class Calibrated(NamedTuple):
    """Similarities with what permutations of the stimuli say about them.

    Attributes
    ----------
    score : array, (L, M), or ()
        The similarities.
    p_value : array, (L, M), or ()
        The share of the null and the observed similarity that is at least the observed one.
    threshold : array, (L, M), or ()
        The critical value at level alpha.
    calibrated : array, (L, M), or ()
        The similarities on a scale where the threshold is 0 and the largest possible value is 1.
    null : array, (K, L, M), or (K,)
        The similarities under each permutation; for null="moments" the mean, variance and
        skewness of their distribution, (3, L, M), or (3,).

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x, y = np.random.default_rng(0).standard_normal((2, 100, 10))
    >>> result = rk.calibrate(x, x + y)
    >>> result.null.shape
    (200,)
    >>> bool(result.score > result.threshold)
    True
    """

    score: Array
    p_value: Array
    threshold: Array
    calibrated: Array
    null: Array


def calibrate(
    xs: ArrayLike | Sequence[ArrayLike],
    ys: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    metric: str = "cka",
    permutations: int = _PERMUTATIONS,
    alpha: float = 0.05,
    aggregate: str | None = None,
    null: str = "permutation",
    strata: ArrayLike | Sequence[str] | None = None,
    indices: ArrayLike | None = None,
    seed: int = 0,
    backend: str | None = None,
    **options: Any,
) -> Calibrated:
    """Similarities with their null distribution: what unrelated representations would score.

    The stimuli of one side are permuted, which keeps each representation and breaks their
    correspondence.

    Parameters
    ----------
    xs : array (n, p), or sequence of L arrays (n, p_i), float16 | bfloat16 | float32 | float64
        Activations for the same n stimuli. Integers are converted to float64.
    ys : array (n, q), or sequence of M arrays (n, q_j), optional
        The other representations; by default `xs`.
    metric : str
        One of "cka", "cka_debiased", "rsa", "procrustes", "cca" (with ``squared=True``),
        "mutual_knn", "cknna" and "jaccard_knn". See Notes for what a permutation costs.
    permutations : int
        Number K of permutations. No p-value is below 1 / (K + 1).
    alpha : float
        Level of the threshold, in (0, 1).
    aggregate : {"max", "mean"}, optional
        Calibrate the largest or the mean similarity of all pairs of representations instead of each
        pair. The threshold of the largest holds for all pairs together: where no pair is related,
        any of them exceeds it with a probability of at most alpha. If ys is None, pairs of a
        representation and itself are left out.
    null : {"permutation", "moments"}
        "moments": the p-value and threshold of a Pearson III distribution with the exact mean,
        variance and skewness over all permutations, without drawing any; for "cka" and
        "cka_debiased", n >= 6, without `aggregate`, `strata` and `indices`.
    strata : integers or strings, (n,), optional
        Stimuli are permuted only among those with the same label, such as one recording session:
        what differs between strata then can't make a similarity significant.
    indices : integers, (K, n), optional
        The permutations, in place of drawn ones: stimulus i of x is compared with stimulus
        ``indices[a, i]`` of y.
    seed : int
        Seed of the permutations, which do not depend on the device.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of xs. "reference" only with
        null="permutation".
    **options
        Options of the metric's own function, as in `pairwise`.

    Returns
    -------
    result : Calibrated
        A named tuple of arrays like xs, float64. For K permutations, and τ the
        ⌈(1 - alpha)(K + 1)⌉-th smallest of the similarity s and its null together:

        * score, (L, M): s, as `pairwise` returns it.
        * p_value, (L, M): (1 + the number of null values that are at least s) / (K + 1).
        * threshold, (L, M): τ.
        * calibrated, (L, M): (s - τ) / (1 - τ), or 0 if s is below τ.
        * null, (K, L, M): the similarities under each permutation, the same one for all pairs.

        For one representation on each side, and for an aggregate, (L, M) is ().

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, LabelError, OptionError,
    BackendUnavailable
        OptionError also for distances and for metrics without a cheap null.

    Warns
    -----
    DegenerateWarning
        If no p-value can be as small as alpha, since permutations < 1 / alpha - 1 or the strata
        leave too few different ones. The message states how many are needed. Also if the function
        of a metric warns about a missing ridge.

    Notes
    -----
    What depends on features is made once for each representation; the number of neurons is then
    without effect. Each permutation and pair costs:

    * "cka" and "cka_debiased" (all kernels), "rsa" (all distances and comparisons; ranks are made
      once) and "cca": n² operations, half of the inner product of two n x n matrices. The matrices
      are kept: 4 n² bytes per representation of the longer list, 8 n² bytes per one of the other,
      and about 20 n² bytes (75 n² for "rsa") for making them one after the other.
    * "procrustes": a product of two n x r factors and the singular values of the result, r³, with
      r at most the neurons or the stimuli.
    * "mutual_knn", "cknna" and "jaccard_knn": n k log(n k) operations.

    Distances are refused, as are "pwcca", "svcca", "linear_predictivity" and "cca" without
    ``squared=True``, which have no cheap null.

    Null values within 1e-12 of s are set to s, and so are those of a permutation that exchanges
    only equal stimuli, except for metrics of neighbours, which take tied stimuli in their
    order: p-values do not depend on how a machine rounds. The stimuli must be
    exchangeable where the representations are unrelated; neighbouring frames of a film are not.

    Where a pair is not related, its p-value is at most alpha with a probability of at most alpha.
    The smallest of many p-values is below alpha far more often: use `aggregate`. With "moments", p
    is approximate: only three moments of the null are exact. The null is skewed, so that a normal
    distribution with the first two would be far off (docs/metrics.md, "Calibration").

    Source: Gröger, Wen & Brbić 2026, "Revisiting the Platonic Representation Hypothesis: An
    Aristotelian View", ICML, for the threshold and the scale; Kazi-Aoual, Hitier, Sabatier &
    Lebreton 1995, "Refined approximations to permutation tests for multivariate inference",
    Computational Statistics & Data Analysis 20, for the moments.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> noise = [rng.standard_normal((50, 500)) for _ in range(3)]
    >>> score, p_value, threshold, calibrated, null = rk.calibrate(noise[0], noise[1])
    >>> print(f"{score:.3f}, threshold {threshold:.3f}, p = {p_value:.2f}")
    0.906, threshold 0.912, p = 0.71

    A map of layers, with the threshold of its largest value:

    >>> related = noise[0] + noise[1]
    >>> layers = rk.calibrate([noise[0], related], noise, metric="cka_debiased")
    >>> layers.p_value.round(3)
    array([[0.005, 0.637, 0.368],
           [0.005, 0.005, 0.373]])
    >>> largest = rk.calibrate([noise[0], related], noise, metric="cka_debiased", aggregate="max")
    >>> layers.score > largest.threshold
    array([[ True, False, False],
           [ True,  True, False]])
    """
    own = check_calibration(metric, options)
    alpha = _check_permutations.check_alpha(alpha)
    permutations = _options.check_count(permutations, "permutations")
    seed = _options.check_count(seed, "seed", minimum=0)
    _options.check_choice(null, "null", ("permutation", "moments"))
    if aggregate is not None:
        _options.check_choice(aggregate, "aggregate", ("max", "mean"))
    if null == "moments":
        _refuse_with_moments(
            metric, backend, permutations, seed, aggregate=aggregate, strata=strata, indices=indices
        )
    checks = pairwise.choose_check({metric: own})
    if null == "moments" and own["kernel"] != "precomputed":
        checks["min_stimuli"] = _MIN_STIMULI_OF_MOMENTS
    sides = _check_layers.check_sides(xs, ys, **checks)
    n = len(sides.xs[0])
    if null == "moments":
        if n < _MIN_STIMULI_OF_MOMENTS:  # of kernel matrices
            raise ShapeError(
                f"xs: {n} stimuli with null='moments'; expected at least {_MIN_STIMULI_OF_MOMENTS}"
            )
        values = _call_kernel("calibrate_by_moments", sides, metric, own, backend, alpha=alpha)
        result = _scale(*values)
    else:
        indices = _choose_permutations(n, permutations, alpha, strata, indices, seed)
        observed, distribution = _compute_null(sides, metric, own, indices, backend)
        if aggregate is not None:
            pairs = _select_pairs(observed.shape, ys is None)
            observed, distribution = _reduce_pairs(observed, distribution, pairs, aggregate)
        result = _summarize(observed, distribution, alpha)
    if sides.is_pair and aggregate is None:
        result = Calibrated(*(a[..., 0, 0] for a in result))
    return sides.source.restore(result)


def check_calibration(metric: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Check that a metric has a cheap null; return its options, with defaults."""
    known = pairwise.PAIR_METRICS.get(metric) if isinstance(metric, str) else None
    if known is not None and known.kind == "distance":
        raise OptionError(
            f"metric: {metric!r}, a distance; expected a similarity, such as 'procrustes'"
        )
    if known is not None and not known.calibration:
        expected = ", ".join(map(repr, METRICS))
        raise OptionError(f"metric: {metric!r} has no cheap null; expected one of {expected}")
    name = _options.check_choice(metric, "metric", METRICS)
    own = pairwise.check_metric_options((name,), options)[name]
    if name == "cca" and not own["squared"]:
        raise OptionError(
            "metric: 'cca' with squared=False has no cheap null; expected squared=True"
        )
    return own


def _refuse_with_moments(
    metric: str, backend: str | None, permutations: int, seed: int, **others: Any
) -> None:
    """Raise an error for arguments that the moments of all permutations can't have."""
    requested = _dispatch.get_requested_backend(backend)
    if requested not in (None, "torch"):
        raise BackendUnavailable(
            f"null: 'moments' with backend {requested!r}; expected 'permutation', or backend "
            "'torch'"
        )
    if metric not in ("cka", "cka_debiased"):
        raise OptionError(
            f"null: 'moments' with metric {metric!r}; expected 'permutation', or metric 'cka' or "
            "'cka_debiased'"
        )
    others |= {
        "permutations": None if permutations == _PERMUTATIONS else permutations,
        "seed": seed or None,
    }
    for name, value in others.items():
        if value is not None:
            raise OptionError(
                f"{name}: {_options.short_repr(value)}, but null='moments' has none; expected the "
                "default, or null='permutation'"
            )


def _choose_permutations(
    n: int,
    permutations: int = _PERMUTATIONS,
    alpha: float = 0.05,
    strata: Any = None,
    indices: Any = None,
    seed: int = 0,
) -> Array:
    """Check or draw permutations of n stimuli (K, n); warn if there are too few for alpha."""
    if indices is not None:
        drawn = {"permutations": permutations != _PERMUTATIONS, "seed": seed != 0}
        for name, is_set in (drawn | {"strata": strata is not None}).items():
            if is_set:
                raise OptionError(
                    f"{name}: together with indices, which are used as they are; expected the "
                    "default"
                )
        values = _check_permutations.check_indices(indices, n)
        _check_permutations.warn_if_too_few(len(values), alpha)
        return values
    labels = np.zeros(n, dtype=np.int64)
    if strata is not None:
        labels = _check_permutations.check_strata(strata, n)
    _check_permutations.warn_if_too_few(permutations, alpha, labels)
    return _check_permutations.draw_permutations(labels, permutations, seed)


def _compute_null(
    sides: _check_layers.Sides,
    metric: str,
    options: dict[str, Any],
    indices: Array,
    backend: str | None,
) -> tuple[Array, Array]:
    """Return similarities (L, M) and those under permutations of ys, (K, L, M), NumPy arrays."""
    return _call_kernel("calibrate", sides, metric, options, backend, indices=indices)


def _call_kernel(
    operation: str,
    sides: _check_layers.Sides,
    metric: str,
    options: dict[str, Any],
    backend: str | None,
    **arguments: Any,
) -> Any:
    """Return the results of a kernel for checked arguments as NumPy arrays, the scores first."""
    xs, ys, source, *_ = sides
    n = len(xs[0])
    p, q = (max(x.shape[1] for x in side) for side in (xs, ys or xs))
    if pairwise.PAIR_METRICS[metric].cca_ridge:
        _options.warn_if_degenerate(metric, n, p, q, options["ridge"], options["penalty"])
    options = dict(options)
    arguments["precision"] = options.pop("precision", None)
    result = _dispatch.call(
        operation, backend, source, xs, ys, metric=metric, options=options, **arguments
    )
    scores, *others = (_arrays.to_numpy(array) for array in result)
    _check.raise_if_nan(scores, pairwise.UNDEFINED.get(metric, ""), **sides.by_name)
    if ys is None:
        scores = pairwise.compare_with_itself(scores, metric, options)
    return scores, *others


def _select_pairs(shape: tuple[int, int], with_itself: bool) -> Array:
    """Return which pairs (L, M) an aggregate has: all of them, or all but the diagonal."""
    pairs = ~np.eye(*shape, dtype=bool) if with_itself else np.ones(shape, dtype=bool)
    if not pairs.any():
        raise OptionError(
            "aggregate: a single representation and itself, which is no pair; expected ys, or "
            "several xs"
        )
    return pairs


def _reduce_pairs(
    observed: Array, null: Array, pairs: Array, aggregate: str
) -> tuple[Array, Array]:
    """Return the largest or the mean similarity of pairs, (), and its null, (K,)."""
    reduce = np.max if aggregate == "max" else np.mean
    return reduce(observed[pairs]), reduce(null[:, pairs], axis=1)


def _summarize(observed: Array, null: Array, alpha: float) -> Calibrated:
    """Calibrate similarities (…) by their null (K, …), in NumPy."""
    count = len(null)
    null = np.where(abs(null - observed) <= _ROUNDING, observed, null)
    p_value = (1 + (null >= observed).sum(0)) / (count + 1)
    rank = _check_permutations.find_threshold_rank(count, alpha)
    threshold = np.sort(np.concatenate([null, observed[None]]), axis=0)[rank - 1]
    return _scale(observed, p_value, threshold, null)


def _scale(score: Array, p_value: Array, threshold: Array, null: Array) -> Calibrated:
    """Return the result, with scores on a scale from the threshold to 1."""
    room = 1 - threshold
    calibrated = np.divide(
        score - threshold, room, out=np.zeros_like(score), where=np.asarray(room > 0)
    )
    return Calibrated(score, p_value, threshold, np.clip(calibrated, 0, 1), null)
