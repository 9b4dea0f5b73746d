"""Intervals and tests over clusters: jackknife and flips of sign."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from numpy.typing import ArrayLike

from repsim_kernels.experiments.analysis.correlations import Floats, check_columns
from repsim_kernels.experiments.errors import StatsError

_EXACT = 13  # classes, up to which all flips of sign are taken
_DRAWS = 10_000  # of flips, beyond
_TIE = 1e-12  # of the largest sum: two sums that differ by rounding are equal


def fisher_z(rho: ArrayLike, n: ArrayLike) -> Floats:
    """Fisher's z of Spearman correlations, arctanh ρ, finite at ±1.

    Parameters
    ----------
    rho : array
        Correlations of ranks; NaN stays NaN.
    n : array
        How many ranks each is of, at least 2; broadcast against ``rho``.

    Returns
    -------
    array
        Of n untied ranks, correlations lie 12 / (n (n² - 1)) apart. Values nearer to ±1 than half
        a step are taken as that: ±(1 - 6 / (n (n² - 1))).
    """
    rho, n = np.asarray(rho, dtype=np.float64), np.asarray(n, dtype=np.float64)
    most = 1 - 6 / np.where(n > 1, n * (n * n - 1), np.nan)
    return np.arctanh(np.clip(rho, -most, most))


def jackknife(sums: Floats, counts: Floats, level: float = 0.95) -> tuple[Floats, Floats, Floats]:
    """Mean of all values, and its jackknife-t interval over clusters.

    Parameters
    ----------
    sums, counts : array, (..., k)
        Per cluster the sum of its values, and how many it has. Those that have none don't count.
    level : float
        Coverage that is asked for.

    Returns
    -------
    estimate, low, high : array, (...)
        low and high are NaN for fewer than two clusters, the estimate for none.

    Notes
    -----
    Pseudo-values k θ - (k - 1) θ without cluster i; their standard error times Student's t with
    k - 1 degrees of freedom, about θ. Source: Tukey, Annals of Mathematical Statistics, 1958.
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
    """Two-sided p of a mean of 0 by flipping signs: (..., k) to (...); NaN for k < 2.

    All 2^k flips for at most 13 values, and (1 + extremes) / (1 + draws) of 10,000 drawn flips
    for more.
    """
    k = values.shape[-1]
    if k < 2:
        return np.full(values.shape[:-1], np.nan)
    if k <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=k)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (_DRAWS, k))
    least = np.abs(values.sum(-1)) - _TIE * np.abs(values).sum(-1)
    extreme = (np.abs(values @ signs.T) >= least[..., None]).sum(-1)
    return extreme / len(signs) if k <= _EXACT else (1 + extreme) / (1 + _DRAWS)


def holm(p: ArrayLike) -> Floats:
    """Holm's step-down adjusted p values. NaN stays NaN, and does not count as a test.

    Source: Holm, Scandinavian Journal of Statistics, 1979.
    """
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    adjusted = np.array(p, dtype=np.float64)
    if (known := ~np.isnan(adjusted)).any():
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted


def intervals(
    per_group: pd.DataFrame,
    by: Sequence[str] = ("model",),
    cluster: str = "class",
) -> pd.DataFrame:
    """Mean Spearman correlation over groups, with its 95 % jackknife-t interval over the classes.

    Parameters
    ----------
    per_group : DataFrame
        What :func:`correlations` returns.
    by : sequence of str
        Columns to keep apart.
    cluster : str
        The column of the unit that was sampled; groups of one are not independent.

    Returns
    -------
    DataFrame
        The columns of ``by``, then ``distance``, ``change``, ``estimate`` (mean over the groups
        that have a correlation), ``low`` and ``high`` (clipped to [-1, 1]; NaN for fewer than two
        clusters), ``clusters`` (with such a group), ``groups`` and ``nan_groups``.

    Raises
    ------
    StatsError
        A column is missing, is to be kept apart and the cluster at once, or there are no rows.
    """
    keys = [*by, "distance", "change"]
    check_columns(per_group, per_group=[*keys, "spearman"], cluster=[cluster])
    if cluster in keys:
        raise StatsError(f"cluster: {cluster!r} is kept apart; expected a column not in {keys}")
    groups = per_group.groupby(keys, sort=False, observed=True, dropna=False)
    code, size = groups.ngroup().to_numpy(), groups.size()
    unit, units = pd.factorize(per_group[cluster], use_na_sentinel=False)
    value = per_group["spearman"].to_numpy(dtype=np.float64)
    known = ~np.isnan(value)
    shape = len(size), len(units)
    at = (code * shape[1] + unit)[known]
    cells = shape[0] * shape[1]
    counts, sums = (
        np.bincount(at, weights, cells).reshape(shape).astype(np.float64)
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
    """a / b, NaN where b is 0."""
    b = np.asarray(b, dtype=np.float64)
    return a / np.where(b == 0, np.nan, b)
