"""What the published study lacks: controls for how much was removed, and for noise in function."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.correlations import (
    Floats,
    centred_ranks,
    check_columns,
    check_names,
    correlate,
    correlations,
    grouped,
    numbers_of,
    rows_of,
    summary,
)
from repsim_kernels.experiments.columns import GROUP_KEYS, HALVES, half_column

_EXPLAINED = 1e-9  # of a column's length: what rounding leaves of ranks that the controls explain


def partial_correlations(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    given: Sequence[str] = ("size", "energy"),
) -> pd.DataFrame:
    """Spearman's correlation of each distance with each change once others are held fixed.

    Parameters
    ----------
    table : DataFrame
        One row per cell.
    distances, changes : sequence of str
        Numeric columns.
    given : sequence of str
        Numeric columns that are held fixed: by default how many neurons a cell has, and its share
        of the representation's energy.

    Returns
    -------
    DataFrame
        One row per group, distance and change: ``model``, ``class``, ``layer``, ``distance``,
        ``change``, ``spearman`` and ``n``. NaN where one of the columns holds a NaN, and where
        the ranks of either side are constant or a linear function of those of ``given``.

    Raises
    ------
    StatsError
        A column is missing, is there twice, doesn't hold numbers (``model``, ``class``, ``layer``:
        names), or there are no rows.

    Notes
    -----
    The correlation of what is left of either side's ranks after least squares on the ranks of
    ``given``. Source: Kendall, Biometrika, 1942.
    """
    check_columns(table, by=GROUP_KEYS, distances=distances, changes=changes, given=given)
    check_names(table, by=GROUP_KEYS)
    columns = [numbers_of(table, names) for names in (distances, changes, given)]
    keys, blocks = grouped(table, GROUP_KEYS)
    found = np.empty((len(keys), len(distances), len(changes)))
    size = np.empty(len(keys), dtype=np.int64)
    for groups, index in blocks:
        x, y, z = (centred_ranks(column[index]) for column in columns)
        found[groups] = correlate(_left(x, z), _left(y, z))
        size[groups] = index.shape[1]
    return rows_of(keys, distances, changes, size, spearman=found)


def _left(x: Floats, z: Floats) -> Floats:
    """What the columns of z (g, n, q) leave of those of x (g, n, a); 0 where that is rounding."""
    unknown = np.isnan(z).any(axis=(1, 2), keepdims=True)
    u, s, _ = np.linalg.svd(np.where(unknown, 0, z), full_matrices=False)
    u = u * (s > _EXPLAINED * s[:, :1])[:, None, :]
    left = x - u @ (u.mT @ x)
    length, whole = (np.linalg.norm(side, axis=1, keepdims=True) for side in (left, x))
    left = np.where(length <= _EXPLAINED * whole, 0, left)
    return np.where(unknown, np.nan, left)


def reliability(table: pd.DataFrame, changes: Sequence[str]) -> pd.DataFrame:
    """How far each function change agrees with itself: measured on other images, or drawn anew.

    Parameters
    ----------
    table : DataFrame
        One row per cell. Of a change ``c`` that has columns ``c_odd`` and ``c_even``, measured on
        every other image, these are compared; of one that has a standard error, ``c_error``, the
        error is compared with the change. A change that has neither has no reliability.
    changes : sequence of str
        Numeric columns.

    Returns
    -------
    DataFrame
        ``model``, ``change``, ``reliability`` (1 is without noise; NaN where nothing is known),
        ``source`` ("halves" or "draws") and ``groups``, of which it is known.

    Notes
    -----
    Halves: Spearman's correlation between them, averaged over groups, r, and stepped up to all
    images, 2 r / (1 + r). Source: Spearman, and Brown, British Journal of Psychology, 1910.
    Draws: 1 less the mean squared error over the variance of the change, averaged over groups;
    images are the same, so that this is an upper bound.
    """
    parts = []
    for change in changes:
        if all(half_column(change, which) in table.columns for which in HALVES):
            found, source = _of_halves(table, change), "halves"
        elif f"{change}_error" in table.columns:
            found, source = _of_draws(table, change), "draws"
        else:
            continue
        parts.append(found.assign(change=change, source=source))
    names = ["model", "change", "reliability", "source", "groups"]
    return pd.concat(parts, ignore_index=True)[names] if parts else pd.DataFrame(columns=names)


def _of_halves(table: pd.DataFrame, change: str) -> pd.DataFrame:
    odd, even = (half_column(change, which) for which in HALVES)
    found = summary(correlations(table, [odd], [even]))
    r = found["spearman"]
    return found[["model"]].assign(
        reliability=2 * r / (1 + r), groups=found["groups"] - found["nan_groups"]
    )


def _of_draws(table: pd.DataFrame, change: str) -> pd.DataFrame:
    squared = table.assign(squared=table[f"{change}_error"] ** 2)
    groups = squared.groupby(GROUP_KEYS, sort=True, observed=True, dropna=False)
    variance = groups[change].var()
    share = 1 - groups["squared"].mean() / variance.where(variance > 0)
    by_model = share.groupby("model", sort=False, observed=True, dropna=False)
    return by_model.agg(reliability="mean", groups="count").reset_index()


def corrected(means: pd.DataFrame, reliabilities: pd.DataFrame) -> pd.DataFrame:
    """Mean correlations as they would be if the function change were measured without noise.

    Parameters
    ----------
    means : DataFrame
        What :func:`summary` returns.
    reliabilities : DataFrame
        What :func:`reliability` returns.

    Returns
    -------
    DataFrame
        ``means`` with the columns ``reliability`` and ``corrected``: ``spearman`` over the root
        of the reliability. NaN where that is not above 0 or not known. It can leave [-1, 1],
        where the reliability is too low to correct for.

    Notes
    -----
    Distances have no noise of their own to correct for. Source: Spearman, American Journal of
    Psychology, 1904.
    """
    keys = ["model", "change"]
    table = means.merge(reliabilities[[*keys, "reliability"]], on=keys, how="left")
    known = table["reliability"].astype(np.float64)
    return table.assign(
        reliability=known, corrected=table["spearman"] / np.sqrt(known.where(known > 0))
    )
