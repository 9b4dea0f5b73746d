"""Rank correlations of distances with function changes, one per group of cells."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import scipy.stats  # type: ignore[import-untyped]
from numpy.typing import NDArray

from repsim_kernels.experiments.columns import BASELINE, CHANGES, GROUP_KEYS, METRICS
from repsim_kernels.experiments.errors import StatsError

#: What `correlations` says of a group, behind the columns that name it.
RESULTS = ("distance", "change", "spearman", "kendall", "n")
_SIGNS = 2**25  # that are held at a time
_LARGE = 2048  # cells of a group, from where on sorting takes less than comparing all with all

Floats = NDArray[np.float64]


def distance_columns(table: pd.DataFrame) -> list[str]:
    """The distances that a run's table has: its metrics, and the baseline behind them."""
    return [name for name in (*METRICS, BASELINE) if name in table.columns]


def change_columns(table: pd.DataFrame) -> list[str]:
    """The function changes that a run's table has."""
    return [name for name in CHANGES if name in table.columns]


def correlations(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    by: Sequence[str] = GROUP_KEYS,
    *,
    similarities: Sequence[str] = (),
) -> pd.DataFrame:
    """Spearman's and Kendall's rank correlation of distances with changes, within each group.

    Parameters
    ----------
    table : DataFrame
        One row per cell; the columns of ``by``, ``distances`` and ``changes``. A column ``cell``
        tells the rows of a group apart.
    distances, changes : sequence of str
        Numeric columns.
    by : sequence of str
        Columns whose values together name a group.
    similarities : sequence of str
        Those of ``distances`` that are largest where nothing changed. They are negated.

    Returns
    -------
    DataFrame
        One row per group, distance and change: the columns of ``by``, then ``distance``,
        ``change``, ``spearman`` and ``kendall`` (τ-b), in [-1, 1], and ``n``, the number of cells.
        Tied values share their mean rank. Both are NaN where either side is constant or holds a
        missing value, and where a group has one cell. An infinite value is larger than all others.

    Raises
    ------
    StatsError
        A column is missing, is there or named twice, doesn't hold numbers (those of ``by``: names),
        one of ``by`` has the name of a column of the result, there are no rows, or a group has a
        cell twice.

    Notes
    -----
    Groups of one size are taken together. Kendall's needs the signs of all n² differences of a
    column; groups of more than 2,048 cells are sorted instead, one after the other.
    Source: Spearman, American Journal of Psychology, 1904; Kendall, Biometrika, 1945 (τ-b).
    """
    by, distances, changes = list(by), list(distances), list(changes)
    _check(table, by, distances, changes, similarities)
    keys, rows = grouped(table, by)
    sides = [numbers_of(table, names) for names in (distances, changes)]
    sides[0] = sides[0] * [-1.0 if name in similarities else 1.0 for name in distances]
    shape = len(keys), len(distances), len(changes)
    spearman, kendall = np.empty(shape), np.empty(shape)
    size = np.empty(len(keys), dtype=np.int64)
    for groups, index in rows:
        x, y = (side[index] for side in sides)
        spearman[groups] = correlate(centred_ranks(x), centred_ranks(y))
        kendall[groups] = _taus(x, y)
        size[groups] = index.shape[1]
    return rows_of(keys, distances, changes, size, spearman=spearman, kendall=kendall)


def grouped(
    table: pd.DataFrame, by: Sequence[str]
) -> tuple[pd.DataFrame, Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """The names of all groups, sorted; and groups of one size with their rows (groups, size)."""
    groups = table.groupby(list(by), sort=True, observed=True, dropna=False)
    code = groups.ngroup().to_numpy()
    size = np.bincount(code)
    order, first = np.argsort(code, kind="stable"), np.cumsum(size) - size

    def blocks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for n in np.unique(size):
            (mine,) = np.nonzero(size == n)
            for some in np.array_split(mine, -(-len(mine) * int(n) ** 2 // _SIGNS)):
                yield some, order[first[some][:, None] + np.arange(n)]

    return groups.size().index.to_frame(index=False), blocks()


def rows_of(
    keys: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    size: NDArray[np.int64],
    **values: Floats,
) -> pd.DataFrame:
    """A row for each group, distance and change, of values (groups, distances, changes)."""
    pairs = len(distances) * len(changes)
    found = keys.loc[keys.index.repeat(pairs)].reset_index(drop=True)
    return found.assign(
        distance=np.tile(np.repeat(distances, len(changes)), len(keys)),
        change=np.tile(changes, len(keys) * len(distances)),
        **{name: value.ravel() for name, value in values.items()},
        n=size.repeat(pairs),
    )


def centred_ranks(values: Floats) -> Floats:
    """Ranks less their mean along the last axis but one, ties at their mean: (…, n, columns)."""
    ranks = scipy.stats.rankdata(values, axis=-2) - (values.shape[-2] + 1) / 2
    return np.where(np.isnan(values).any(-2, keepdims=True), np.nan, ranks)


def correlate(x: Floats, y: Floats) -> Floats:
    """Of centred columns (g, n, a) and (g, n, b) the correlations (g, a, b); NaN of constants."""
    norms = (np.sqrt((side * side).sum(-2)) for side in (x, y))
    a, b = (np.where(norm > 0, norm, np.nan) for norm in norms)
    return np.clip(x.mT @ y / (a[:, :, None] * b[:, None, :]), -1.0, 1.0)


def _taus(x: Floats, y: Floats) -> Floats:
    """Kendall's τ-b of values (g, n, a) and (g, n, b): (g, a, b)."""
    if x.shape[1] > _LARGE:
        found = [
            [[scipy.stats.kendalltau(u, v).statistic for v in b.T] for u in a.T]
            for a, b in zip(x, y, strict=True)
        ]
        return np.array(found)
    s, t = _signs(x), _signs(y)
    norms = (np.sqrt((side * side).sum(-1, dtype=np.float64)) for side in (s, t))
    a, b = (np.where(norm > 0, norm, np.nan) for norm in norms)
    return np.clip(s @ t.mT / (a[:, :, None] * b[:, None, :]), -1.0, 1.0)


def _signs(values: Floats) -> NDArray[np.float32]:
    """Signs of all differences of a column (g, n, a): (g, a, n²). Their sums are exact."""
    v = values.mT
    signs = (v[..., :, None] > v[..., None, :]).astype(np.float32)
    signs -= v[..., :, None] < v[..., None, :]
    signs[np.isnan(v).any(-1)] = np.nan
    return signs.reshape(*v.shape[:2], -1)


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
        The columns of ``by``, then ``distance``, ``change``, ``spearman`` and ``kendall`` (means
        over the groups that have a correlation), ``groups`` (how many there are) and
        ``nan_groups`` (how many of them have none and are left out of the mean).
    """
    keys = [*by, "distance", "change"]
    table = (
        correlations.groupby(keys, sort=False, observed=True, dropna=False)
        .agg(
            spearman=("spearman", "mean"),
            kendall=("kendall", "mean"),
            groups=("spearman", "size"),
            known=("spearman", "count"),
        )
        .reset_index()
    )
    table["nan_groups"] = table["groups"] - table.pop("known")
    return table


def means(per_group: pd.DataFrame) -> pd.DataFrame:
    """Mean correlations with a row per model and metric, a column per function change."""
    table = summary(per_group)
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
    if taken := [name for name in by if name in RESULTS]:
        raise StatsError(
            f"by: {taken[0]!r} is the name of a column of the result; expected another: rename it"
        )
    for name in similarities:
        if name not in distances:
            raise StatsError(f"similarities: {name!r} is not among distances {list(distances)}")
    if "cell" in table.columns and "cell" not in by:
        check_names(table, cell=["cell"])
        twice = table.duplicated([*by, "cell"])
        if twice.any():
            row = table.iloc[int(twice.to_numpy().argmax())][[*by, "cell"]]
            which = ", ".join(f"{name} {value}" for name, value in row.items())
            raise StatsError(
                f"table: {twice.sum()} rows are of a cell that another row is of, first {which}; "
                f"expected one row per cell of a group by {', '.join(by)}"
            )


def check_columns(table: pd.DataFrame, **arguments: Sequence[str]) -> None:
    """Raise StatsError where an argument doesn't name columns, once each, or there are no rows."""
    columns = ", ".join(map(str, table.columns))
    for argument, names in arguments.items():
        if not names:
            raise StatsError(f"{argument}: is empty; expected some of {columns}")
        if twice := [name for name in names if list(names).count(name) > 1]:
            raise StatsError(f"{argument}: {twice[0]!r} is named twice; expected it once")
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
        raise StatsError("table: has no rows; expected one per cell")


def check_names(table: pd.DataFrame, **arguments: Sequence[str]) -> None:
    """Raise StatsError where a column holds lists, which can't name a group or a cell."""
    for argument, names in arguments.items():
        for name in names:
            if not comparable(table[name]):
                raise StatsError(
                    f"{argument}: column {name!r} holds lists or the like; expected names"
                )


def comparable(column: pd.Series) -> bool:
    """Whether the values of a column are equal or not, which can't be asked of lists."""
    return pd.api.types.is_numeric_dtype(column) or all(map(pd.api.types.is_hashable, column))


def numbers_of(table: pd.DataFrame, names: Sequence[str]) -> Floats:
    """Columns as numbers, (rows, columns); a missing value is NaN.

    Raises
    ------
    StatsError
        One holds anything but real numbers.
    """
    for name in names:
        dtype = table[name].dtype
        real = pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype)
        if not real:
            raise StatsError(
                f"table: column {name!r} is {dtype}{_example(table[name])}; expected numbers"
            )
    numbers: Floats = table[list(names)].to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers


def _example(column: pd.Series) -> str:
    """The first value that can't be read as a number, or else the first that isn't one."""
    others = [
        (row, value)
        for row, value in enumerate(column, 1)
        if not (pd.api.types.is_number(value) or (pd.api.types.is_scalar(value) and pd.isna(value)))
    ]
    if not others:
        return ""
    row, value = next((pair for pair in others if not _is_readable(pair[1])), others[0])
    return f", such as {' '.join(reprlib.repr(value).split())} in row {row}"


def _is_readable(value: object) -> bool:
    """Whether a text is one of a number; Python alone reads "1_000" as one."""
    try:
        return isinstance(value, str) and "_" not in value and float(value) is not None
    except ValueError:
        return False
