"""Noise ceilings: the best score that a model can have, given the noise of the measurements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from repsim_kernels import _arrays, _check, _metrics, _options
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array, ArrayLike, Tensor
from repsim_kernels.errors import ConstantError, ShapeError
from repsim_kernels.ops import pairwise

METRICS = tuple(metric.name for metric in _metrics.METRICS if metric.ceiling)
_MAX_SPLITS = 100


class Ceiling(NamedTuple):
    """Bounds on the score of the best model, and the reliability of the data, from `ceiling`.

    Attributes
    ----------
    lower : array, (), float64
        Mean similarity of a repeat with the average of the others.
    upper : array, (), float64
        Mean similarity of a repeat with the average of all, itself included.
    split_half : array, (), float64
        Mean similarity of the averages of two halves of the repeats.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> repeats = np.random.default_rng(0).standard_normal((4, 30, 10))
    >>> rk.ceiling(repeats, metric="rsa")._fields
    ('lower', 'upper', 'split_half')
    """

    lower: Array
    upper: Array
    split_half: Array


def ceiling(
    repeats: ArrayLike | Sequence[ArrayLike],
    *,
    metric: str = "cka",
    debiased: bool = True,
    spearman_brown: bool = False,
    seed: int = 0,
    backend: str | None = None,
    **options: Any,
) -> Ceiling:
    """Return the noise ceiling of CKA or RSA, from repeats of a measurement or several subjects.

    Parameters
    ----------
    repeats : array, (r, n, p), or sequence of r arrays, (n, p_s)
        Repeated measurements of the same n stimuli with the same p neurons, as one array; or the
        activations of r >= 2 subjects, as a list. float16 | bfloat16 | float32 | float64; integers
        are converted to float64.
    metric : {"cka", "cka_debiased", "rsa"}
        Metric of the scores.
    debiased : bool
        Whether "cka" is debiased. Noise of many neurons makes biased CKA approach 1, and with it
        the ceiling.
    spearman_brown : bool
        Whether to extrapolate ``split_half`` from half of the repeats to all of them, 2s / (1 + s).
        Off by default. This is exact for averages of matrices with independent noise (a list), but
        not for averages of activations (an array).
    seed : int
        Seed of the halves, at least 0.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of the first array.
    **options
        Options of the metric's own function, as in `pairwise`.

    Returns
    -------
    ceiling : Ceiling
        ``lower``, ``upper`` and ``split_half``: scalars like the input's arrays, similarities.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    The score of a model is its mean similarity with each repeat or subject. No model can score more
    than their average does, which is the upper bound. The average of the others is a noisy version
    of the true model, which is therefore expected to score more than the lower bound. For RSA,
    vectors of distances are averaged as by Nili et al.: z-scored ("pearson"), ranked ("spearman";
    the average is not ranked again) or of unit norm ("cosine"). For CKA, centred Gram matrices of
    unit norm are averaged, U-centred if debiased. Both bounds then follow from the r² similarities
    between the repeats.

    ``split_half`` is the mean over all ways to split the repeats into halves if there are at most
    100 (200 for odd r), and otherwise over 100 random ones. An array's activations are averaged in
    each half, as before a comparison with a model. Subjects have different neurons: their distances
    or Gram matrices are averaged, as for the bounds.
    Source: Nili, Wingfield, Walther, Su, Marslen-Wilson & Kriegeskorte 2014, "A toolbox for
    representational similarity analysis", PLOS Computational Biology 10; Spearman 1910 and Brown
    1910, British Journal of Psychology 3.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> signal = rng.standard_normal((100, 10))  # 100 stimuli, 10 neurons
    >>> repeats = signal + rng.standard_normal((6, 100, 10))
    >>> for name, value in rk.ceiling(repeats)._asdict().items():
    ...     print(f"{name:12}{value:.3f}")
    lower       0.383
    upper       0.605
    split_half  0.553
    """
    metrics = pairwise.check_one_metric(metric, debiased, options, METRICS)
    spearman_brown = _options.check_flag(spearman_brown, "spearman_brown")
    seed = _options.check_count(seed, "seed", minimum=0)
    checks = pairwise.choose_check(metrics)
    checks.pop("defer", None)
    xs, source = _check.check_representations(repeats, "repeats", **checks)
    if len(xs) < 2:
        raise ShapeError("repeats: one; expected at least two repeats or subjects")
    similarities = _compare(xs, None, source, metrics, backend)
    halves = _choose_halves(len(xs), seed)
    if getattr(repeats, "ndim", 0) == 3 and options.get("kernel") != "precomputed":
        averages = (([_average(xs, half)] for half in pair) for pair in halves)
        splits = [_compare(a, b, source, metrics, backend)[0, 0] for a, b in averages]
    else:
        splits = [_compare_averages(similarities, *pair) for pair in halves]
    split_half = np.mean(splits)
    if spearman_brown:
        split_half = 2 * split_half / (1 + split_half)
    lower, upper = _compute_bounds(similarities)
    if np.isnan(lower + upper + split_half):
        raise ConstantError("repeats: their average is zero; expected repeats that agree more")
    return Ceiling(*map(source.restore, (lower, upper, np.float64(split_half))))


def _compare(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    source: Source,
    metrics: dict[str, dict[str, Any]],
    backend: str | None,
) -> Array:
    """Return the metric of all pairs, (L, M)."""
    (name,) = metrics
    values, _ = pairwise.compare(xs, ys, source, metrics, backend)
    value = _check.raise_if_nan(values[name], pairwise.UNDEFINED[name].replace("x or y", "repeats"))
    if ys is None:
        value = pairwise.compare_with_itself(value, name, metrics[name])
    return _arrays.to_numpy(value)


def _compute_bounds(similarities: Array) -> tuple[Any, Any]:
    """Return the lower and the upper bound from the inner products (r, r) of unit vectors."""
    with_all = similarities.sum(1)
    total = with_all.sum()
    others = total - 2 * with_all + 1  # squared norm of the sum of the others
    return (
        np.mean((with_all - 1) / _compute_norms(others)),
        np.mean(with_all / _compute_norms(total)),
    )


def _compare_averages(similarities: Array, a: list[int], b: list[int]) -> Any:
    """Return the cosine of the averages of two sets of unit vectors, from their inner products."""
    within = (similarities[np.ix_(half, half)].sum() for half in (a, b))
    return similarities[np.ix_(a, b)].sum() / np.prod([_compute_norms(w) for w in within])


def _compute_norms(squares: Any) -> Any:
    """Return square roots, NaN for what is zero but for rounding."""
    return np.sqrt(np.where(squares > 1e-12, squares, np.nan))


def _choose_halves(r: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return pairs of complementary halves of r repeats: all, or `_MAX_SPLITS` random ones."""
    rng, size = np.random.default_rng(seed), r // 2
    firsts: Iterable[Any]
    if math.comb(r, size) > 2 * _MAX_SPLITS:
        firsts = (rng.permutation(r)[:size].tolist() for _ in range(_MAX_SPLITS))
    else:
        firsts = itertools.combinations(range(r), size)
        if r % 2 == 0:  # each split appears twice
            firsts = itertools.islice(firsts, math.comb(r, size) // 2)
    return [(list(first), [s for s in range(r) if s not in first]) for first in firsts]


def _average(xs: list[Tensor], indices: list[int]) -> Tensor:
    """Return the mean of some tensors, in float64."""
    total = xs[indices[0]].double()
    for i in indices[1:]:
        total = total + xs[i]
    return total / len(indices)
