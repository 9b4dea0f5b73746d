"""The threshold of mean correlations, against shuffled tables and in simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from repsim_kernels.experiments.analysis import shuffles
from repsim_kernels.experiments.analysis.correlations import compute_correlations, summarise
from repsim_kernels.experiments.analysis.shuffles import find_threshold
from repsim_kernels.experiments.errors import StatsError

DISTANCES, CHANGES = ["near", "far"], ["lost", "held", "tied"]


def random_table(groups: int, common: float = 0.0, cells: int = 9, seed: int = 0) -> pd.DataFrame:
    """Make distances and unrelated changes; a share of their variance is common to all groups."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [["net"], range(groups), ["one", "two"], range(cells)],
        names=["model", "class", "layer", "cell"],
    )
    table = index.to_frame(index=False)
    for names in (DISTANCES, CHANGES):
        profile = np.tile(rng.standard_normal(cells), 2 * groups)
        for name in names:
            noise = rng.standard_normal(len(table))
            table[name] = math.sqrt(common) * profile + math.sqrt(1 - common) * noise
    table["tied"] = table["tied"].round()
    return table


def largest_mean(table: pd.DataFrame) -> float:
    means = summarise(compute_correlations(table, DISTANCES, CHANGES))
    return float(means["spearman"].abs().max())


@pytest.mark.parametrize("many", [8, 9])  # the tables have nine cells
@pytest.mark.parametrize("is_complete", [True, False])
def test_threshold_is_the_quantile_over_shuffled_tables(
    monkeypatch: pytest.MonkeyPatch, is_complete: bool, many: int
) -> None:
    monkeypatch.setattr(shuffles, "SHUFFLES", 30)
    monkeypatch.setattr(shuffles, "_MANY", many)
    table = random_table(4, common=0.3).sample(frac=1, random_state=1)
    table.loc[(table["class"] == 1) & (table["layer"] == "two"), "held"] = 0.25
    table.loc[(table["class"] == 2) & (table["cell"] == 3), "far"] = np.nan
    if not is_complete:
        table = table.sample(frac=0.8, random_state=2)
    rng = np.random.default_rng(0)
    largest = [largest_mean(table)]
    for order in rng.permuted(np.tile(np.arange(9), (30, 1)), axis=1):
        shuffled = table.copy()
        for _, group in table.groupby(["class", "layer"]):
            cells = group.sort_values("cell").index
            of_cell = group.set_index("cell")[CHANGES]
            sources = []
            for cell in of_cell.index.sort_values():
                source = order[cell]
                while source not in of_cell.index:
                    source = order[source]
                sources.append(source)
            shuffled.loc[cells, CHANGES] = of_cell.reindex(sources).to_numpy()
        largest.append(largest_mean(shuffled))
    # ⌈0.95 x 31⌉ = 30
    assert find_threshold(table, DISTANCES, CHANGES) == pytest.approx(sorted(largest)[29], abs=1e-9)


@pytest.mark.parametrize("common", [0.0, 0.8])
def test_few_unrelated_tables_have_a_correlation_above_the_threshold(common: float) -> None:
    tables = [random_table(5, common, seed=seed) for seed in range(100)]
    share = np.mean([largest_mean(t) > find_threshold(t, DISTANCES, CHANGES) for t in tables])
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)


def test_related_columns_are_beyond_the_threshold() -> None:
    table = random_table(5)
    table["lost"] += table["near"]
    threshold = find_threshold(table, DISTANCES, CHANGES)
    means = summarise(compute_correlations(table, DISTANCES, CHANGES))
    beyond = means[means["spearman"].abs() > threshold]
    assert beyond[["distance", "change"]].to_numpy().tolist() == [["near", "lost"]]


def test_nothing_is_beyond_the_threshold_of_too_few_cells() -> None:
    table = random_table(3, cells=3)
    table["lost"] = table["near"]  # 3 cells have 6 orders: a perfect one is not rare
    assert largest_mean(table) == pytest.approx(1)
    assert largest_mean(table) <= find_threshold(table, DISTANCES, CHANGES)


def test_tables_without_correlations_or_cells() -> None:
    table = random_table(2)
    assert math.isnan(find_threshold(table.assign(lost=1.0), ["near"], ["lost"]))
    with pytest.raises(StatsError, match="the table has no column 'cell'"):
        find_threshold(table.drop(columns="cell"), ["near"], ["lost"])
