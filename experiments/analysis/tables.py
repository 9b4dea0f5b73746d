"""Tables of cells from anywhere: read, and looked through for what would mislead."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.correlations import (
    check_columns,
    check_names,
    comparable,
    correlations,
    numbers_of,
)
from repsim_kernels.experiments.columns import GROUP_KEYS
from repsim_kernels.experiments.errors import StatsError
from repsim_kernels.experiments.files import find_write_obstacle, replace_file

_AGAINST = 0.2  # of a median correlation below 0: smaller ones are common among changes
SUFFIXES = (".csv", ".parquet")


def read(
    path: str | os.PathLike[str],
    cell: Sequence[str] = ("cell",),
    by: Sequence[str] = GROUP_KEYS,
) -> pd.DataFrame:
    """Read a table, one row per cell.

    Parameters
    ----------
    path : path
        A CSV file with commas and a line of column names, or a Parquet file.
    cell : sequence of str
        The columns that tell a group's cells apart; one ``cell`` takes their place. By default
        the column of that name, if there is one.
    by : sequence of str
        The columns that name a group, those of them that there are.

    Returns
    -------
    DataFrame
        From CSV, the columns of ``cell`` and ``by`` are text as it is written: "NA" and "01" are
        names. Blanks around the names of columns don't count. From Parquet, the named levels of an
        index are columns.

    Raises
    ------
    StatsError
        There is no such file, it is of another kind or can't be read as its own, or it lacks a
        column of ``cell``.
    OSError
        The file may not be read, or is a folder.
    """
    path = Path(path)
    check_suffix("table", path)
    if not path.exists():
        raise StatsError(f"table: there is no file {path}")
    try:
        table = _read_csv(path, {*cell, *by}) if path.suffix == ".csv" else _read_parquet(path)
    except StatsError:
        raise
    except (ValueError, TypeError, LookupError, ImportError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the file's fault
        from repsim_kernels.forward.trace import first_line  # imports torch: only here

        raise StatsError(f"table: {path} can't be read ({first_line(error)})") from None
    if list(cell) == ["cell"]:
        return table
    check_columns(table, cell=cell)
    check_names(table, cell=cell)
    number = table.groupby(list(cell), sort=False, observed=True, dropna=False).ngroup()
    return table.drop(columns=list(cell)).assign(cell=number)


def _read_csv(path: Path, names: set[str]) -> pd.DataFrame:
    """Read a table whose columns of ``names`` are text, whatever it says."""
    line = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
    header = [name.strip() for name in line.iloc[0]]  # of "a, b"
    for mark, separator in ((";", "semicolons"), ("\t", "tabs")):
        if sum(name.count(mark) for name in header) >= len(header):
            raise StatsError(
                f"table: the columns of {path} are separated by {separator}; expected commas, and "
                "points in numbers"
            )
    # By default pandas takes values without a name for an index, and shifts the others.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, low_memory=False)
    except pd.errors.ParserWarning:
        raise StatsError(
            f"table: rows of {path} have more values than its first line has names"
        ) from None
    table.columns = pd.RangeIndex(len(header))
    own = [column for column, name in enumerate(header) if name in names]
    text = pd.read_csv(path, index_col=False, usecols=own, dtype=str, na_filter=False)
    for column, name in zip(own, text.columns, strict=True):
        table[column] = text[name]
    table.columns = pd.Index(header)  # pandas would rename the second of two that are the same
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read a table with the named levels of its index as columns."""
    table = pd.read_parquet(path)
    levels = [name for name in table.index.names if name is not None and name not in table.columns]
    return (table.reset_index(levels) if levels else table).reset_index(drop=True)


def check_suffix(argument: str, path: Path) -> None:
    """Raise StatsError where a file's name says neither CSV nor Parquet."""
    if path.suffix not in SUFFIXES:
        raise StatsError(f"{argument}: {path} ends with {path.suffix!r}; expected .csv or .parquet")


def check_output(path: Path) -> None:
    """Raise StatsError where `write` can't write to a path."""
    check_suffix("out", path)
    if why := find_write_obstacle(path):
        raise StatsError(f"out: {why}")


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table as what its name ends with."""
    check_output(path)
    with replace_file(path) as temporary:
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
        As :func:`correlations` takes them.

    Returns
    -------
    list of str
        Groups with fewer cells than others; rows that are there twice; names that differ within a
        group, which may be several groups taken as one; missing and infinite values; and columns
        that run against each other, or distances that look like similarities.
    """
    # Of two columns of one name neither is asked for, and lists can't be told apart.
    single = table.columns[~table.columns.duplicated(keep=False)]
    told = [name for name in single if comparable(table[name])]
    groups = table.groupby(list(by), sort=True, observed=True, dropna=False)
    size, found = groups.size(), []
    if (size < size.max()).any():
        short = int((size < size.max()).sum())
        found.append(
            f"{short} of {len(size)} groups have fewer than {size.max()} cells, "
            f"the least {size.min()}"
        )
    if "cell" not in table.columns and (twice := int(table.duplicated(told).sum())):
        found.append(f"{twice} rows are the same as another in every column")
    taken = {*by, *distances, *changes, "cell"}
    for name in (name for name in told if name not in taken):
        if pd.api.types.is_numeric_dtype(table[name]):
            continue
        mixed = int((groups[name].nunique(dropna=False) > 1).sum())
        if mixed:
            found.append(
                f"column {name!r} differs within {mixed} of {len(size)} groups; "
                "where it tells groups apart, it belongs to by"
            )
    for name in (*distances, *changes):
        values = numbers_of(table, [name])
        if missing := int(np.isnan(values).sum()):
            found.append(f"column {name!r} has no value in {missing} of {len(table)} rows")
        if infinite := int(np.isinf(values).sum()):
            found.append(
                f"column {name!r} is infinite in {infinite} of {len(table)} rows, "
                "which are ranked beyond all others"
            )
    for name in distances:
        values = pd.Series(numbers_of(table, [name])[:, 0]).dropna()
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
