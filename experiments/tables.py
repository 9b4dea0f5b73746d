"""Tables of cells from anywhere: read, and looked through for what would mislead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from .stats import StatsError, check_columns, correlations
from .store import replacing

_AGAINST = 0.2  # of a median correlation below 0: smaller ones are common among changes
SUFFIXES = (".csv", ".parquet")


def read(path: str | os.PathLike[str], cell: Sequence[str] = ("cell",)) -> pd.DataFrame:
    """Read a table, one row per cell.

    Parameters
    ----------
    path : path
        A CSV file with a line of column names, or a Parquet file.
    cell : sequence of str
        The columns that tell a group's cells apart; one ``cell`` takes their place. By default
        the column of that name, if there is one.

    Raises
    ------
    StatsError
        The file is of another kind or can't be read as its own, or lacks a column of ``cell``.
    OSError
        There is no such file.
    """
    path = Path(path)
    check_suffix("table", path)
    reader = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
    try:
        table = reader(path)
    except (ValueError, ImportError) as error:  # of pandas and of pyarrow
        reason = str(error).strip().splitlines()[0]
        raise StatsError(f"table: {path} can't be read ({reason})") from None
    if list(cell) == ["cell"]:
        return table
    check_columns(table, cell=cell)
    number = table.groupby(list(cell), sort=True, dropna=False).ngroup()
    return table.drop(columns=list(cell)).assign(cell=number)


def check_suffix(argument: str, path: Path) -> None:
    """Raise StatsError where a file's name says neither CSV nor Parquet."""
    if path.suffix not in SUFFIXES:
        raise StatsError(f"{argument}: {path} ends with {path.suffix!r}; expected .csv or .parquet")


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table as what its name ends with."""
    check_suffix("out", path)
    with replacing(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)


def remarks(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    by: Sequence[str],
    similarities: Sequence[str] = (),
) -> list[str]:
    """What a reader of the table's correlations should know, a line each.

    Parameters
    ----------
    table, distances, changes, by, similarities
        As :func:`experiments.stats.correlations` takes them.

    Returns
    -------
    list of str
        Groups with fewer cells than others; rows that are there twice; names that differ within a
        group, which may be several groups taken as one; missing values; and columns that run
        against each other, or distances that look like similarities.
    """
    groups = table.groupby(list(by), sort=True, observed=True, dropna=False)
    size, found = groups.size(), []
    if (size < size.max()).any():
        short = int((size < size.max()).sum())
        found.append(
            f"{short} of {len(size)} groups have fewer than {size.max()} cells, "
            f"the least {size.min()}"
        )
    if "cell" not in table.columns and (twice := int(table.duplicated().sum())):
        found.append(f"{twice} rows are the same as another in every column")
    taken = {*by, *distances, *changes, "cell"}
    for name in (name for name in table.columns if name not in taken):
        if pd.api.types.is_numeric_dtype(table[name]):
            continue
        mixed = int((groups[name].nunique(dropna=False) > 1).sum())
        if mixed:
            found.append(
                f"column {name!r} differs within {mixed} of {len(size)} groups; "
                "where it tells groups apart, it belongs to by"
            )
    for name in (*distances, *changes):
        if missing := int(table[name].isna().sum()):
            found.append(f"column {name!r} has no value in {missing} of {len(table)} rows")
    for name in distances:
        values = table[name].dropna()
        if name not in similarities and values.between(0, 1).all() and values.median() > 0.5:
            found.append(
                f"column {name!r} lies within 0 and 1, mostly above 1/2: "
                "if it is a similarity, name it in similarities"
            )
    return [
        *found,
        *_against(table, distances, by, similarities),
        *_against(table, changes, by, ()),
    ]


def _against(
    table: pd.DataFrame, names: Sequence[str], by: Sequence[str], similarities: Sequence[str]
) -> list[str]:
    """Columns that mostly fall within a group where most others rise."""
    rho = correlations(table, names, names, by)
    middle = rho.groupby(["distance", "change"])["spearman"].median().unstack().fillna(0)
    middle = middle.loc[list(names), list(names)].to_numpy()
    turned = np.array([-1.0 if name in similarities else 1.0 for name in names])
    middle = middle * turned[:, None] * turned
    side = np.linalg.eigh(middle)[1][:, -1] > 0  # the two sides that agree best within
    if side.sum() > len(names) / 2:
        side = ~side
    least = middle[side][:, ~side].min(initial=0)
    if least > -_AGAINST:
        return []
    these, those = ([n for n, mine in zip(names, of, strict=True) if mine] for of in (side, ~side))
    return [
        f"{', '.join(these)} against {', '.join(those)}: they run against each other within "
        f"groups (median correlation down to {least:.2f}); are some similarities, or a sign turned?"
    ]
