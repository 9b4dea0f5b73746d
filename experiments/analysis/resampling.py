"""Jackknife intervals and sign-flip tests over clusters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from numpy.typing import ArrayLike

from repsim_kernels.experiments.analysis.correlations import Floats, check_columns
from repsim_kernels.experiments.errors import StatsError

_EXACT = 13  # up to this number of values, all sign flips are computed
_DRAWS = 10_000  # random sign flips for more values
_TIE = 1e-12  # share of the largest sum; sums that differ by less are equal up to rounding


def fisher_z(rho: ArrayLike, n: ArrayLike) -> Floats:
    """Fisher's z of Spearman correlations, arctanh ρ, made finite at ±1.

    Parameters
    ----------
    rho : array
        Correlations of ranks; NaN stays NaN.
    n : array
        Number of ranks behind each correlation, at least 2; broadcast against ``rho``.

    Returns
    -------
    array
        Correlations of n untied ranks are multiples of a step, 12 / (n (n² - 1)), apart. Values
        within half a step of ±1 are clipped to half a step: ±(1 - 6 / (n (n² - 1))).
    """
    rho, n = np.asarray(rho, dtype=np.float64), np.asarray(n, dtype=np.float64)
    limit = 1 - 6 / np.where(n > 1, n * (n * n - 1), np.nan)
    return np.arctanh(np.clip(rho, -limit, limit))


def jackknife(sums: Floats, counts: Floats, level: float = 0.95) -> tuple[Floats, Floats, Floats]:
    """Mean of all values, with its jackknife-t interval over clusters.

    Parameters
    ----------
    sums, counts : array, (..., k)
        Sum and number of the values of each cluster. Clusters without values are ignored.
    level : float
        Nominal coverage.

    Returns
    -------
    estimate, low, high : array, (...)
        low and high are NaN for fewer than two clusters; the estimate is NaN for none.

    Notes
    -----
    The pseudo-value of cluster i is k θ - (k - 1) θ₋ᵢ, with θ₋ᵢ the mean without that cluster. The
    interval is θ ± the pseudo-values' standard error times Student's t with k - 1 degrees of
    freedom. Source: Tukey, Annals of Mathematical Statistics, 1958.
    """
    known = counts > 0
    k = known.sum(-1)
    total, size = sums.sum(-1), counts.sum(-1)
    estimate = _ratio(total, size)
    without = _ratio(total[..., None] - sums, size[..., None] - counts)
    pseudo = k[..., None] * estimate[..., None] - (k[..., None] - 1) * without
    centre = _ratio(np.where(known, pseudo, 0).sum(-1), k)
    squares = np.where(known, (pseudo - centre[..., None]) ** 2, 0).sum(-1)
    error = np.sqrt(_ratio(squares, k * (k - 1)))
    reach = error * scipy.stats.t.ppf((1 + level) / 2, np.where(k > 1, k - 1, np.nan))
    return estimate, estimate - reach, estimate + reach


def sign_flips(values: Floats) -> Floats:
    """Two-sided p that the mean of (..., k) values is 0, by sign flips: (...); NaN for k < 2.

    Exact for at most 13 values, from all 2^k flips; otherwise (1 + extremes) / (1 + draws) with
    10,000 random flips.
    """
    k = values.shape[-1]
    if k < 2:
        return np.full(values.shape[:-1], np.nan)
    if k <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=k)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (_DRAWS, k))
    threshold = np.abs(values.sum(-1)) - _TIE * np.abs(values).sum(-1)
    n_extreme = (np.abs(values @ signs.T) >= threshold[..., None]).sum(-1)
    return n_extreme / len(signs) if k <= _EXACT else (1 + n_extreme) / (1 + _DRAWS)


def holm(p: ArrayLike) -> Floats:
    """Holm's step-down adjusted p values. NaN stays NaN and does not count as a test.

    Source: Holm, Scandinavian Journal of Statistics, 1979.
    """
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    adjusted = np.array(p, dtype=np.float64)
    if (known := ~np.isnan(adjusted)).any():
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted


def compute_intervals(
    per_group: pd.DataFrame,
    by: Sequence[str] = ("model",),
    cluster: str = "class",
) -> pd.DataFrame:
    """Mean Spearman correlation over groups, with its 95 % jackknife-t interval over clusters.

    Parameters
    ----------
    per_group : DataFrame
        The result of :func:`compute_correlations`.
    by : sequence of str
        Columns whose values are summarised separately.
    cluster : str
        The column of the sampled unit; the groups of one cluster are not independent.

    Returns
    -------
    DataFrame
        The columns of ``by``, then ``distance``, ``change``, ``estimate`` (mean over the groups
        that have a correlation), ``low`` and ``high`` (clipped to [-1, 1]; NaN for fewer than two
        clusters), ``clusters`` (the number of those with such a group), ``groups`` and
        ``nan_groups``.

    Raises
    ------
    StatsError
        A column is missing, ``cluster`` is among ``by``, or there are no rows.
    """
    keys = [*by, "distance", "change"]
    check_columns(per_group, per_group=[*keys, "spearman"], cluster=[cluster])
    if cluster in keys:
        raise StatsError(f"cluster: {cluster!r} is in by; expected a column not in {keys}")
    groups = per_group.groupby(keys, sort=False, observed=True, dropna=False)
    code, size = groups.ngroup().to_numpy(), groups.size()
    unit, units = pd.factorize(per_group[cluster], use_na_sentinel=False)
    value = per_group["spearman"].to_numpy(dtype=np.float64)
    known = ~np.isnan(value)
    shape = len(size), len(units)
    index = (code * shape[1] + unit)[known]
    length = shape[0] * shape[1]
    counts, sums = (
        np.bincount(index, weights, length).reshape(shape).astype(np.float64)
        for weights in (None, value[known])
    )
    estimate, low, high = jackknife(sums, counts)
    return size.index.to_frame(index=False).assign(
        estimate=estimate,
        low=np.clip(low, -1, 1),
        high=np.clip(high, -1, 1),
        clusters=(counts > 0).sum(1),
        groups=size.to_numpy(),
        nan_groups=size.to_numpy() - counts.sum(1).astype(np.int64),
    )


def _ratio(a: Floats, b: ArrayLike) -> Floats:
    """a / b, with NaN where b is 0."""
    b = np.asarray(b, dtype=np.float64)
    return a / np.where(b == 0, np.nan, b)
