"""Rank correlations of distances with function changes, within each group of cells."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from numpy.typing import NDArray

from repsim_kernels.experiments.columns import ALL_METRICS, BASELINE, CHANGES, GROUP_KEYS
from repsim_kernels.experiments.errors import StatsError

#: The columns of the result of `compute_correlations` after those that name the group.
RESULTS = ("distance", "change", "spearman", "kendall", "n")
_SIGNS = 2**25  # signs of differences in memory at once
_LARGE = 400  # cells in a group above which sorting is faster than comparing all pairs (measured)

Floats = NDArray[np.float64]


def distance_columns(table: pd.DataFrame) -> list[str]:
    """The distances in a run's table: its metrics, then the baseline."""
    return [name for name in (*ALL_METRICS, BASELINE) if name in table.columns]


def change_columns(table: pd.DataFrame) -> list[str]:
    """The function changes in a run's table."""
    return [name for name in CHANGES if name in table.columns]


def compute_correlations(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    by: Sequence[str] = GROUP_KEYS,
    *,
    similarities: Sequence[str] = (),
) -> pd.DataFrame:
    """Spearman's and Kendall's rank correlations of distances with changes, within each group.

    Parameters
    ----------
    table : DataFrame
        One row per cell, with the columns of ``by``, ``distances`` and ``changes``. If there is a
        column ``cell``, it must differ within each group.
    distances, changes : sequence of str
        Numeric columns.
    by : sequence of str
        Columns whose values together name a group.
    similarities : sequence of str
        The columns among ``distances`` that are largest where nothing changed. They are negated.

    Returns
    -------
    DataFrame
        One row per group, distance and change: the columns of ``by``, then ``distance``,
        ``change``, ``spearman`` and ``kendall`` (τ-b), in [-1, 1], and ``n``, the number of cells.
        Tied values share their mean rank. Both are NaN if either side is constant or has a
        missing value, or if the group has one cell. Infinite values rank beyond all others.

    Raises
    ------
    StatsError
        A column is missing, duplicated or of the wrong kind (those of ``by`` hold names, all
        others numbers), one of ``by`` has the name of a column of the result, the table has no
        rows, or a cell is duplicated.

    Notes
    -----
    Groups of equal size are computed together. Kendall's τ-b needs the signs of all n² differences
    of a column; groups of more than 400 cells are sorted instead, one after another.
    Source: Spearman, American Journal of Psychology, 1904; Kendall, Biometrika, 1945 (τ-b).
    """
    by, distances, changes = list(by), list(distances), list(changes)
    _check(table, by, distances, changes, similarities)
    keys, blocks = group_rows(table, by)
    sides = [to_numbers(table, names) for names in (distances, changes)]
    sides[0] = sides[0] * [-1.0 if name in similarities else 1.0 for name in distances]
    shape = len(keys), len(distances), len(changes)
    spearman, kendall = np.empty(shape), np.empty(shape)
    size = np.empty(len(keys), dtype=np.int64)
    for groups, index in blocks:
        x, y = (side[index] for side in sides)
        spearman[groups] = correlate(centred_ranks(x), centred_ranks(y))
        kendall[groups] = _kendall(x, y)
        size[groups] = index.shape[1]
    return make_rows(keys, distances, changes, size, spearman=spearman, kendall=kendall)


def group_rows(
    table: pd.DataFrame, by: Sequence[str]
) -> tuple[pd.DataFrame, Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Return the sorted keys of all groups, and blocks of groups of equal size.

    A block is the indices of its groups and, for each, the indices of its rows, (groups, size).
    """
    groups = table.groupby(list(by), sort=True, observed=True, dropna=False)
    code = groups.ngroup().to_numpy()
    size = np.bincount(code)
    order, first = np.argsort(code, kind="stable"), np.cumsum(size) - size

    def blocks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for n in np.unique(size):
            (same_size,) = np.nonzero(size == n)
            n_blocks = -(-len(same_size) * int(n) ** 2 // _SIGNS)
            for block in np.array_split(same_size, n_blocks):
                yield block, order[first[block][:, None] + np.arange(n)]

    return groups.size().index.to_frame(index=False), blocks()


def make_rows(
    keys: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    size: NDArray[np.int64],
    **values: Floats,
) -> pd.DataFrame:
    """Make a row for each group, distance and change from values (groups, distances, changes)."""
    pairs = len(distances) * len(changes)
    rows = keys.loc[keys.index.repeat(pairs)].reset_index(drop=True)
    return rows.assign(
        distance=np.tile(np.repeat(distances, len(changes)), len(keys)),
        change=np.tile(changes, len(keys) * len(distances)),
        **{name: value.ravel() for name, value in values.items()},
        n=size.repeat(pairs),
    )


def centred_ranks(values: Floats) -> Floats:
    """Ranks minus their mean along the second-last axis, (…, n, columns); ties share their mean."""
    ranks = scipy.stats.rankdata(values, axis=-2) - (values.shape[-2] + 1) / 2
    return np.where(np.isnan(values).any(-2, keepdims=True), np.nan, ranks)


def correlate(x: Floats, y: Floats) -> Floats:
    """Correlations (g, a, b) of centred columns (g, n, a) and (g, n, b); NaN for constants."""
    norms = (np.sqrt((side * side).sum(-2)) for side in (x, y))
    a, b = (np.where(norm > 0, norm, np.nan) for norm in norms)
    return np.clip(x.mT @ y / (a[:, :, None] * b[:, None, :]), -1.0, 1.0)


def _kendall(x: Floats, y: Floats) -> Floats:
    """Kendall's τ-b of values (g, n, a) and (g, n, b): (g, a, b)."""
    if x.shape[1] > _LARGE:
        tau = [
            [[scipy.stats.kendalltau(u, v).statistic for v in b.T] for u in a.T]
            for a, b in zip(x, y, strict=True)
        ]
        return np.array(tau)
    s, t = _difference_signs(x), _difference_signs(y)
    norms = (np.sqrt((side * side).sum(-1, dtype=np.float64)) for side in (s, t))
    a, b = (np.where(norm > 0, norm, np.nan) for norm in norms)
    return np.clip(s @ t.mT / (a[:, :, None] * b[:, None, :]), -1.0, 1.0)


def _difference_signs(values: Floats) -> NDArray[np.float32]:
    """Signs of all differences within a column of (g, n, a), as (g, a, n²); sums are exact."""
    v = values.mT
    signs = (v[..., :, None] > v[..., None, :]).astype(np.float32)
    signs -= v[..., :, None] < v[..., None, :]
    signs[np.isnan(v).any(-1)] = np.nan
    return signs.reshape(*v.shape[:2], -1)


def summarise(correlations: pd.DataFrame, by: Sequence[str] = ("model",)) -> pd.DataFrame:
    """Mean correlation over the groups, for each model, distance and change.

    Parameters
    ----------
    correlations : DataFrame
        The result of :func:`compute_correlations`.
    by : sequence of str
        Columns whose values are summarised separately.

    Returns
    -------
    DataFrame
        The columns of ``by``, then ``distance``, ``change``, ``spearman`` and ``kendall`` (means
        over the groups that have a correlation), ``groups`` (the number of groups) and
        ``nan_groups`` (the number of groups without a correlation, which the mean leaves out).
    """
    keys = [*by, "distance", "change"]
    table = (
        correlations.groupby(keys, sort=False, observed=True, dropna=False)
        .agg(
            spearman=("spearman", "mean"),
            kendall=("kendall", "mean"),
            groups=("spearman", "size"),
            n_known=("spearman", "count"),
        )
        .reset_index()
    )
    table["nan_groups"] = table["groups"] - table.pop("n_known")
    return table


def tabulate_means(per_group: pd.DataFrame) -> pd.DataFrame:
    """Mean correlations, with a row per model and metric and a column per function change."""
    table = summarise(per_group)
    order = {key: list(table[key].unique()) for key in ("model", "distance", "change")}
    wide = table.pivot(index=["model", "distance"], columns="change", values="spearman")
    rows = pd.MultiIndex.from_product([order["model"], order["distance"]])
    return wide.reindex(index=rows, columns=order["change"])


def _check(
    table: pd.DataFrame,
    by: Sequence[str],
    distances: Sequence[str],
    changes: Sequence[str],
    similarities: Sequence[str],
) -> None:
    check_columns(table, by=by, distances=distances, changes=changes)
    check_names(table, by=by)
    if reserved := [name for name in by if name in RESULTS]:
        raise StatsError(
            f"by: {reserved[0]!r} is the name of a column of the result; expected another name"
        )
    for name in similarities:
        if name not in distances:
            raise StatsError(f"similarities: {name!r} is not among distances {list(distances)}")
    if "cell" in table.columns and "cell" not in by:
        check_names(table, cell=["cell"])
        duplicates = table.duplicated([*by, "cell"])
        if count := int(duplicates.sum()):
            row = table.iloc[int(duplicates.to_numpy().argmax())][[*by, "cell"]]
            which = ", ".join(f"{name} {value}" for name, value in row.items())
            raise StatsError(
                f"table: {count} duplicate row{'' if count == 1 else 's'}; the first is {which}; "
                f"expected one row per cell of a group by {', '.join(by)}"
            )


def check_columns(table: pd.DataFrame, **arguments: Sequence[str]) -> None:
    """Raise StatsError unless each argument names distinct, existing columns of some rows."""
    columns = ", ".join(map(str, table.columns))
    for argument, names in arguments.items():
        if not names:
            raise StatsError(f"{argument}: empty; expected some of {columns}")
        if repeated := [name for name in names if list(names).count(name) > 1]:
            raise StatsError(f"{argument}: {repeated[0]!r} is repeated; expected distinct names")
        for name in names:
            count = list(table.columns).count(name)
            if not count:
                raise StatsError(
                    f"{argument}: the table has no column {name!r}; expected some of {columns}"
                )
            if count > 1:
                raise StatsError(
                    f"{argument}: the table has {count} columns {name!r}; expected one"
                )
    if table.empty:
        raise StatsError("table: no rows; expected one per cell")


def check_names(table: pd.DataFrame, **arguments: Sequence[str]) -> None:
    """Raise StatsError if a column holds unhashable values, which can't name a group or cell."""
    for argument, names in arguments.items():
        for name in names:
            if not is_comparable(table[name]):
                raise StatsError(
                    f"{argument}: column {name!r} holds lists or similar values; expected names"
                )


def is_comparable(column: pd.Series) -> bool:
    """Whether the values of a column can be compared for equality; lists cannot."""
    return pd.api.types.is_numeric_dtype(column) or all(map(pd.api.types.is_hashable, column))


def to_numbers(table: pd.DataFrame, names: Sequence[str]) -> Floats:
    """Convert columns to float64, (rows, columns); missing values become NaN.

    Raises
    ------
    StatsError
        A column holds anything other than real numbers.
    """
    for name in names:
        dtype = table[name].dtype
        real = pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype)
        if not real:
            example = _describe_non_number(table[name])
            raise StatsError(f"table: column {name!r} is {dtype}{example}; expected numbers")
    numbers: Floats = table[list(names)].to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers


def _describe_non_number(column: pd.Series) -> str:
    """Name the first value that can't be read as a number, or the first that isn't a number."""
    non_numbers = [
        (row, value)
        for row, value in enumerate(column, 1)
        if not (pd.api.types.is_number(value) or (pd.api.types.is_scalar(value) and pd.isna(value)))
    ]
    if not non_numbers:
        return ""
    row, value = next((pair for pair in non_numbers if not _is_readable(pair[1])), non_numbers[0])
    return f", such as {' '.join(reprlib.repr(value).split())} in row {row}"


def _is_readable(value: object) -> bool:
    """Whether a text can be read as a number; unlike Python, CSV has no numbers such as "1_000"."""
    try:
        return isinstance(value, str) and "_" not in value and float(value) is not None
    except ValueError:
        return False
