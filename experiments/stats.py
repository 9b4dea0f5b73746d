"""Rank correlations of distances with function changes, one per group of cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.ops.ablation import METRICS as METRICS

#: Changes of network performance, and of linear decodability by probe; of a table those it has.
PERFORMANCE = ("rank_deficit", "log_probability", "probability", "top1", "top5")
PROBES = {
    "ridge": ("decodability_refit", "decodability_frozen", "margin_refit", "margin_frozen"),
    "paper": ("decodability_paper",),
}
CHANGES = (*PERFORMANCE, *(name for names in PROBES.values() for name in names))


class StatsError(ValueError):
    """A table lacks a column, or holds nothing to correlate."""


def correlations(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    by: Sequence[str] = ("model", "class", "layer"),
) -> pd.DataFrame:
    """Spearman's rank correlation of each distance with each change, within each group.

    Parameters
    ----------
    table : DataFrame
        One row per cell; the columns of ``by``, ``distances`` and ``changes``.
    distances, changes : sequence of str
        Numeric columns.
    by : sequence of str
        Columns whose values together name a group.

    Returns
    -------
    DataFrame
        One row per group, distance and change: the columns of ``by``, then ``distance``,
        ``change``, ``spearman`` in [-1, 1] and ``n``, the number of cells. Tied values share
        their mean rank. ``spearman`` is NaN where either side is constant or holds a NaN, and
        where a group has one cell.

    Raises
    ------
    StatsError
        A column is missing, not numeric, or there are no rows.

    Notes
    -----
    All groups at once: the sums of every group come from one ``bincount`` per pair of columns.
    Source: Spearman, American Journal of Psychology, 1904.
    """
    by, distances, changes = list(by), list(distances), list(changes)
    _check(table, by, distances, changes)
    groups = table.groupby(by, sort=True, observed=True, dropna=False)
    code = groups.ngroup().to_numpy()
    size = np.bincount(code)
    columns = list(dict.fromkeys([*distances, *changes]))
    ranks = groups[columns].rank()
    # Ranks and their mean are multiples of 1/2, so a constant column is centred to exactly zero.
    centred = {name: ranks[name].to_numpy() - (size[code] + 1) / 2 for name in columns}
    norm = {name: np.sqrt(np.bincount(code, v * v)) for name, v in centred.items()}

    keys = groups.size().index.to_frame(index=False)
    parts = []
    for distance in distances:
        for change in changes:
            with np.errstate(invalid="ignore", divide="ignore"):
                rho = np.bincount(code, centred[distance] * centred[change])
                rho = rho / (norm[distance] * norm[change])
            part = keys.assign(
                distance=distance, change=change, spearman=np.clip(rho, -1.0, 1.0), n=size
            )
            parts.append(part)
    # A stable sort of the group's number keeps the given order of distances and changes.
    order = np.argsort(np.tile(np.arange(len(keys)), len(parts)), kind="stable")
    return pd.concat(parts, ignore_index=True).iloc[order].reset_index(drop=True)


def summary(correlations: pd.DataFrame, by: Sequence[str] = ("model",)) -> pd.DataFrame:
    """Mean correlation over the groups, for each model, distance and change.

    Parameters
    ----------
    correlations : DataFrame
        What :func:`correlations` returns.
    by : sequence of str
        Columns to keep apart.

    Returns
    -------
    DataFrame
        The columns of ``by``, then ``distance``, ``change``, ``spearman`` (the mean over the
        groups that have a correlation), ``groups`` (how many there are) and ``nan_groups`` (how
        many of them have none and are left out of the mean).
    """
    keys = [*by, "distance", "change"]
    groups = correlations.groupby(keys, sort=False, observed=True, dropna=False)["spearman"]
    table = groups.agg(spearman="mean", groups="size", known="count").reset_index()
    table["nan_groups"] = table["groups"] - table.pop("known")
    return table


def _check(
    table: pd.DataFrame, by: Sequence[str], distances: Sequence[str], changes: Sequence[str]
) -> None:
    for argument, names in (("by", by), ("distances", distances), ("changes", changes)):
        if not names:
            raise StatsError(f"{argument}: is empty; expected at least one column")
        missing = [name for name in names if name not in table.columns]
        if missing:
            raise StatsError(
                f"{argument}: the table has no column {missing[0]!r}; "
                f"expected some of {', '.join(map(str, table.columns))}"
            )
    for name in (*distances, *changes):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise StatsError(f"table: column {name!r} is {table[name].dtype}; expected numbers")
    if table.empty:
        raise StatsError("table: has no rows; expected one per cell")
