"""How far from 0 mean correlations get when cells are shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from repsim_kernels.experiments.analysis.correlations import (
    Floats,
    centred_ranks,
    check_columns,
    check_names,
    group_rows,
    to_numbers,
)
from repsim_kernels.experiments.columns import GROUP_KEYS

SHUFFLES = 999
PERCENT = 95
_MANY = 400  # cells above which each shuffle is applied to the ranks (measured)
_TIE = 1e-12  # correlations that differ by less are equal up to rounding


def find_threshold(table: pd.DataFrame, distances: Sequence[str], changes: Sequence[str]) -> float:
    """Find how far from 0 the largest of a table of mean correlations gets by shuffling cells.

    Parameters
    ----------
    table : DataFrame
        One row per cell, of one model, with a column ``cell``, that `compute_correlations` accepts.
    distances, changes : sequence of str
        Numeric columns.

    Returns
    -------
    float
        The 95 % quantile of M, the largest absolute value among the mean correlations of all
        distances with all changes: the ⌈0.95 (K + 1)⌉-th smallest of the observed M and those of
        K = 999 shuffles. If no distance is related to any change, and all groups have the same
        cells, the probability that a mean correlation is larger is at most 5 %. NaN if there is no
        correlation.

    Raises
    ------
    StatsError
        A column is missing or of the wrong kind, or there are no rows.

    Notes
    -----
    The null hypothesis is that all assignments of the changes to the cells are equally likely. A
    shuffle moves all changes of a cell to another cell, the same one in every class and layer. So
    it keeps the dependence between changes, between distances, and between groups, whose cells are
    alike: cell 0 is the least selective one everywhere. If all groups have similar distances, and
    similar but unrelated changes, their correlations agree by chance, and the mean is as variable
    as one of them. With shuffles drawn for each group, 66.2 % of the simulated tables in
    bench/COVERAGE.md, which have no relation, had a correlation above the threshold when a quarter
    of the variance was common to all groups, and 99.2 % when 81 % was; with shared shuffles, 5.6
    and 4.9 %. One threshold serves all correlations, and is conservative for those that vary less.

    With the same shuffle π in all groups, a mean correlation is Σᵢ m[i, π(i)]: m[i, j] is the mean
    over groups of the product of two standardised ranks, of the distance in cell i and of the
    change in cell j. Where a group lacks the cell that a shuffle leads to, the shuffle is followed
    on from there. Groups that lack different cells share less of it, and the threshold is then too
    low.

    The sign flips of `inference` ask whether a mean would have its sign with other classes, given
    the cells. Source: Westfall & Young, Resampling-Based Multiple Testing, Wiley, 1993.
    """
    check_columns(table, by=[*GROUP_KEYS, "cell"], distances=distances, changes=changes)
    check_names(table, by=GROUP_KEYS, cell=["cell"])
    table = table.sort_values("cell", kind="stable")
    code, labels = pd.factorize(table["cell"], sort=True)
    columns = [to_numbers(table, names) for names in (distances, changes)]
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(len(labels)), (SHUFFLES, 1)), axis=1)
    orders = np.vstack([np.arange(len(labels)), orders])  # the observed one first
    sums = np.zeros((len(orders), len(distances), len(changes)))
    counts = np.zeros(sums.shape[1:])
    for _, index in group_rows(table, GROUP_KEYS)[1]:
        x, y = (_standardise(centred_ranks(side[index])) for side in columns)
        counts += np.any(x != 0, axis=1).T.astype(float) @ np.any(y != 0, axis=1)
        cells = code[index]
        for present in np.unique(cells, axis=0):
            groups = (cells == present).all(1)
            sums += _sum_products(x[groups], y[groups], _restrict(orders, present))
    means = sums[:, counts > 0] / counts[counts > 0]
    if means.size == 0:
        return math.nan
    return float(take_quantile(np.abs(means).max(1)))


def take_quantile(largest: Floats) -> Floats:
    """Return the quantile (…) of the largest correlations of each shuffle, (…, 1 + shuffles)."""
    rank = -(-PERCENT * largest.shape[-1] // 100)
    return np.sort(largest, axis=-1)[..., rank - 1] + _TIE


def _standardise(ranks: Floats) -> Floats:
    """Scale centred ranks (g, n, columns) to unit length; 0 for constants and missing values."""
    norm = np.sqrt((ranks * ranks).sum(1, keepdims=True))
    return np.where(norm > 0, ranks, 0) / np.where(norm > 0, norm, 1)


def _restrict(orders: NDArray[np.int64], present: NDArray[np.int64]) -> NDArray[np.int64]:
    """Restrict permutations (k, cells) to some of the cells, as positions among these.

    From each cell follow the permutation until it reaches one that is present. Only the places of
    missing cells change, so that groups with different cells still share most of the shuffle.
    """
    targets = orders[:, present]
    rows = np.arange(len(orders))[:, None]
    while (is_missing := ~np.isin(targets, present)).any():
        targets = np.where(is_missing, orders[rows, targets], targets)
    return np.searchsorted(present, targets)


def _sum_products(x: Floats, y: Floats, orders: NDArray[np.int64]) -> Floats:
    """Sum x[g, i] y[g, π(i)] over groups and cells, for each order π: (orders, a, b)."""
    n, b = y.shape[1:]
    sums = np.empty((len(orders), x.shape[-1], b))
    if n > _MANY:  # a matrix (n, n) for each pair of columns would leave the cache
        sides = x.reshape(-1, x.shape[-1]).T
        for k, order in enumerate(orders):
            sums[k] = sides @ y[:, order].reshape(-1, b)
        return sums
    for column in range(x.shape[-1]):
        products = (x[:, :, column].T @ y.reshape(len(y), n * b)).reshape(n, n, b)
        sums[:, column] = products[np.arange(n), orders].sum(1)
    return sums
