"""Controls that the published study lacks: for the amount removed, and for noise in function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.correlations import (
    Floats,
    centred_ranks,
    check_columns,
    check_names,
    compute_correlations,
    correlate,
    group_rows,
    make_rows,
    summarise,
    to_numbers,
)
from repsim_kernels.experiments.columns import GROUP_KEYS, HALVES, half_column

# A residual below this share of a column's length is rounding: the controls explain the column.
_EXPLAINED = 1e-9


def compute_partial_correlations(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    controls: Sequence[str] = ("size", "energy"),
) -> pd.DataFrame:
    """Partial Spearman correlation of each distance with each change, given control columns.

    Parameters
    ----------
    table : DataFrame
        One row per cell.
    distances, changes : sequence of str
        Numeric columns.
    controls : sequence of str
        Numeric columns that are held fixed; by default the number of neurons of a cell and its
        share of the representation's energy.

    Returns
    -------
    DataFrame
        One row per group, distance and change: ``model``, ``class``, ``layer``, ``distance``,
        ``change``, ``spearman`` and ``n``. NaN if one of the columns holds a NaN, or if the ranks
        of either side are constant or a linear function of the ranks of ``controls``.

    Raises
    ------
    StatsError
        A column is missing, duplicated or of the wrong kind (``model``, ``class`` and ``layer``
        hold names, all others numbers), or the table has no rows.

    Notes
    -----
    The correlation between the residuals of both sides' ranks, after a least-squares fit to the
    ranks of ``controls``. Source: Kendall, Biometrika, 1942.
    """
    check_columns(table, by=GROUP_KEYS, distances=distances, changes=changes, controls=controls)
    check_names(table, by=GROUP_KEYS)
    columns = [to_numbers(table, names) for names in (distances, changes, controls)]
    keys, blocks = group_rows(table, GROUP_KEYS)
    rho = np.empty((len(keys), len(distances), len(changes)))
    size = np.empty(len(keys), dtype=np.int64)
    for groups, index in blocks:
        x, y, z = (centred_ranks(column[index]) for column in columns)
        rho[groups] = correlate(_residuals(x, z), _residuals(y, z))
        size[groups] = index.shape[1]
    return make_rows(keys, distances, changes, size, spearman=rho)


def _residuals(x: Floats, z: Floats) -> Floats:
    """Residuals of x (g, n, a) after regression on z (g, n, q); 0 for those that are rounding."""
    unknown = np.isnan(z).any(axis=(1, 2), keepdims=True)
    u, s, _ = np.linalg.svd(np.where(unknown, 0, z), full_matrices=False)
    u = u * (s > _EXPLAINED * s[:, :1])[:, None, :]
    residuals = x - u @ (u.mT @ x)
    length, total = (np.linalg.norm(side, axis=1, keepdims=True) for side in (residuals, x))
    residuals = np.where(length <= _EXPLAINED * total, 0, residuals)
    return np.where(unknown, np.nan, residuals)


def measure_reliability(table: pd.DataFrame, changes: Sequence[str]) -> pd.DataFrame:
    """Reliability of each function change: from two halves of the images, or from its error.

    Parameters
    ----------
    table : DataFrame
        One row per cell. For a change ``c`` with columns ``c_odd`` and ``c_even``, measured on
        every other image, these are compared. For one with a standard error, ``c_error``, the
        error is compared with the change. A change with neither gets no row.
    changes : sequence of str
        Numeric columns.

    Returns
    -------
    DataFrame
        ``model``, ``change``, ``reliability`` (1: no noise; NaN: unknown), ``source`` ("halves" or
        "draws") and ``groups``, the number of groups that it is averaged over.

    Notes
    -----
    Halves: Spearman's correlation r between them, averaged over groups and stepped up to all
    images, 2 r / (1 + r). Source: Spearman, and Brown, British Journal of Psychology, 1910.
    Draws: 1 minus the mean squared error divided by the variance of the change, averaged over
    groups; an upper bound, because all draws use the same images.
    """
    parts = []
    for change in changes:
        if all(half_column(change, half) in table.columns for half in HALVES):
            rows, source = _split_half_reliability(table, change), "halves"
        elif f"{change}_error" in table.columns:
            rows, source = _draw_reliability(table, change), "draws"
        else:
            continue
        parts.append(rows.assign(change=change, source=source))
    names = ["model", "change", "reliability", "source", "groups"]
    return pd.concat(parts, ignore_index=True)[names] if parts else pd.DataFrame(columns=names)


def _split_half_reliability(table: pd.DataFrame, change: str) -> pd.DataFrame:
    odd, even = (half_column(change, half) for half in HALVES)
    means = summarise(compute_correlations(table, [odd], [even]))
    r = means["spearman"]
    return means[["model"]].assign(
        reliability=2 * r / (1 + r), groups=means["groups"] - means["nan_groups"]
    )


def _draw_reliability(table: pd.DataFrame, change: str) -> pd.DataFrame:
    squared = table.assign(squared=table[f"{change}_error"] ** 2)
    groups = squared.groupby(GROUP_KEYS, sort=True, observed=True, dropna=False)
    variance = groups[change].var()
    share = 1 - groups["squared"].mean() / variance.where(variance > 0)
    by_model = share.groupby("model", sort=False, observed=True, dropna=False)
    return by_model.agg(reliability="mean", groups="count").reset_index()


def correct_for_noise(means: pd.DataFrame, reliabilities: pd.DataFrame) -> pd.DataFrame:
    """Correct mean correlations for the noise in the measured function changes.

    Parameters
    ----------
    means : DataFrame
        The result of :func:`summarise`.
    reliabilities : DataFrame
        The result of :func:`measure_reliability`.

    Returns
    -------
    DataFrame
        ``means`` with the columns ``reliability`` and ``corrected``: ``spearman`` divided by the
        square root of the reliability; NaN if the reliability is unknown or not above 0. It can
        leave [-1, 1] if the reliability is too low for a correction.

    Notes
    -----
    The distances have no noise, so only one side is corrected. Source: Spearman, American Journal
    of Psychology, 1904.
    """
    keys = ["model", "change"]
    table = means.merge(reliabilities[[*keys, "reliability"]], on=keys, how="left")
    reliability = table["reliability"].astype(np.float64)
    return table.assign(
        reliability=reliability,
        corrected=table["spearman"] / np.sqrt(reliability.where(reliability > 0)),
    )
