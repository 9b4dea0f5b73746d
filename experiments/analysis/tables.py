"""Tables of cells from any source: reading, writing, and checks for misleading contents."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels._files import find_write_obstacle, replace_file
from repsim_kernels.experiments.analysis.correlations import (
    check_columns,
    check_names,
    compute_correlations,
    is_comparable,
    to_numbers,
)
from repsim_kernels.experiments.columns import GROUP_KEYS
from repsim_kernels.experiments.errors import StatsError

_OPPOSED = 0.2  # columns with a median correlation of -0.2 or less; weaker ones are common
SUFFIXES = (".csv", ".parquet")


def read_table(
    path: str | os.PathLike[str],
    cell: Sequence[str] = ("cell",),
    by: Sequence[str] = GROUP_KEYS,
) -> pd.DataFrame:
    """Read a table, one row per cell.

    Parameters
    ----------
    path : path
        A CSV file, separated by commas and with a line of column names, or a Parquet file.
    cell : sequence of str
        The columns that together identify a cell of a group; a single column ``cell`` replaces
        them. By default the column of that name, if there is one.
    by : sequence of str
        The columns that name a group; missing ones are ignored.

    Returns
    -------
    DataFrame
        From CSV, the columns of ``cell`` and ``by`` are text exactly as written: "NA" and "01" are
        names. Blanks around column names are ignored. From Parquet, the named levels of an index
        become columns.

    Raises
    ------
    StatsError
        The file does not exist, has another suffix, can't be parsed, or lacks a column of
        ``cell``.
    OSError
        The file can't be opened, or is a folder.
    """
    path = Path(path)
    check_suffix("table", path)
    if not path.exists():
        raise StatsError(f"table: {path} does not exist; expected a CSV or Parquet file")
    try:
        table = _read_csv(path, {*cell, *by}) if path.suffix == ".csv" else _read_parquet(path)
    except StatsError:
        raise
    except (ValueError, TypeError, LookupError, ImportError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system refused; nothing is wrong with the file's content
        from repsim_kernels.forward.trace import first_line  # here, since it imports torch

        raise StatsError(f"table: {path} can't be read ({first_line(error)})") from None
    if list(cell) == ["cell"]:
        return table
    check_columns(table, cell=cell)
    check_names(table, cell=cell)
    number = table.groupby(list(cell), sort=False, observed=True, dropna=False).ngroup()
    return table.drop(columns=list(cell)).assign(cell=number)


def _read_csv(path: Path, names: set[str]) -> pd.DataFrame:
    """Read a CSV file, with the columns among ``names`` as text."""
    line = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
    header = [name.strip() for name in line.iloc[0]]  # "a, b" has a blank
    for mark, separator in ((";", "semicolons"), ("\t", "tabs")):
        if sum(name.count(mark) for name in header) >= len(header):
            raise StatsError(
                f"table: the columns of {path} are separated by {separator}; expected commas, and "
                "points in numbers"
            )
    # By default pandas uses values without a name as an index, and shifts the others.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, low_memory=False)
    except pd.errors.ParserWarning:
        raise StatsError(
            f"table: rows of {path} have more values than the first line has names"
        ) from None
    table.columns = pd.RangeIndex(len(header))
    text_columns = [column for column, name in enumerate(header) if name in names]
    text = pd.read_csv(path, index_col=False, usecols=text_columns, dtype=str, na_filter=False)
    for column, name in zip(text_columns, text.columns, strict=True):
        table[column] = text[name]
    table.columns = pd.Index(header)  # pandas renames the second of two equal names
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet file, with the named levels of its index as columns."""
    table = pd.read_parquet(path)
    levels = [name for name in table.index.names if name is not None and name not in table.columns]
    return (table.reset_index(levels) if levels else table).reset_index(drop=True)


def check_suffix(argument: str, path: Path) -> None:
    """Raise StatsError unless a path ends with .csv or .parquet."""
    if path.suffix not in SUFFIXES:
        raise StatsError(f"{argument}: {path} ends with {path.suffix!r}; expected .csv or .parquet")


def check_output(path: Path) -> None:
    """Raise StatsError if `write_table` can't write to a path."""
    check_suffix("out", path)
    if why := find_write_obstacle(path):
        raise StatsError(f"out: {why}")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV or Parquet, by the suffix of its path."""
    check_output(path)
    with replace_file(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)


def find_problems(
    table: pd.DataFrame,
    distances: Sequence[str],
    changes: Sequence[str],
    by: Sequence[str],
    similarities: Sequence[str] = (),
) -> list[str]:
    """List what may make the correlations of a table misleading, one line per problem.

    Parameters
    ----------
    table, distances, changes, by, similarities
        As for :func:`compute_correlations`.

    Returns
    -------
    list of str
        Groups with fewer cells than others; duplicate rows; names that differ within a group, which
        may then be several groups; missing and infinite values; distances that look like
        similarities; and columns that run against each other.
    """
    # Columns with duplicate names are not among the arguments, and lists can't be compared.
    unique = table.columns[~table.columns.duplicated(keep=False)]
    compared = [name for name in unique if is_comparable(table[name])]
    groups = table.groupby(list(by), sort=True, observed=True, dropna=False)
    size, problems = groups.size(), []
    if (size < size.max()).any():
        n_small = int((size < size.max()).sum())
        problems.append(
            f"{n_small} of {len(size)} groups have fewer than {size.max()} cells, "
            f"the smallest {size.min()}"
        )
    if "cell" not in table.columns and (count := int(table.duplicated(compared).sum())):
        problems.append(f"rows that equal an earlier row in every column: {count}")
    used = {*by, *distances, *changes, "cell"}
    for name in (name for name in compared if name not in used):
        if pd.api.types.is_numeric_dtype(table[name]):
            continue
        mixed = int((groups[name].nunique(dropna=False) > 1).sum())
        if mixed:
            problems.append(
                f"column {name!r} differs within {mixed} of {len(size)} groups; "
                "if it distinguishes groups, add it to by"
            )
    for name in (*distances, *changes):
        values = to_numbers(table, [name])
        if missing := int(np.isnan(values).sum()):
            problems.append(f"column {name!r} has no value in {missing} of {len(table)} rows")
        if infinite := int(np.isinf(values).sum()):
            problems.append(
                f"column {name!r} is infinite in {infinite} of {len(table)} rows, "
                "which are ranked beyond all others"
            )
    for name in distances:
        values = pd.Series(to_numbers(table, [name])[:, 0]).dropna()
        if name not in similarities and values.between(0, 1).all() and values.median() > 0.5:
            problems.append(
                f"column {name!r} is between 0 and 1, mostly above 1/2; "
                "if it is a similarity, add it to similarities"
            )
    return [
        *problems,
        *_find_opposed(table, distances, by, similarities),
        *_find_opposed(table, changes, by, ()),
    ]


def _find_opposed(
    table: pd.DataFrame, names: Sequence[str], by: Sequence[str], similarities: Sequence[str]
) -> list[str]:
    """List the columns that mostly fall within a group while the other columns rise."""
    rho = compute_correlations(table, names, names, by)
    medians = rho.groupby(["distance", "change"])["spearman"].median().unstack().fillna(0)
    medians = medians.loc[list(names), list(names)].to_numpy()
    sign = np.array([-1.0 if name in similarities else 1.0 for name in names])
    medians = medians * sign[:, None] * sign
    # The split into two sides with the best agreement within each side.
    side = np.linalg.eigh(medians)[1][:, -1] > 0
    if side.sum() > len(names) / 2:
        side = ~side
    lowest = medians[side][:, ~side].min(initial=0)
    if lowest > -_OPPOSED:
        return []
    minority, majority = (
        [name for name, member in zip(names, members, strict=True) if member]
        for members in (side, ~side)
    )
    return [
        f"{', '.join(minority)} against {', '.join(majority)}: opposite orders within groups "
        f"(median correlation down to {lowest:.2f}); are some similarities, or is a sign wrong?"
    ]
