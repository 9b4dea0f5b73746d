"""Rank correlations within groups, against SciPy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from repsim_kernels.experiments.analysis import correlations as stats
from repsim_kernels.experiments.analysis.correlations import (
    compute_correlations,
    summarise,
    tabulate_means,
)
from repsim_kernels.experiments.errors import StatsError


def random_table(groups: int, cells: int = 16, seed: int = 0) -> pd.DataFrame:
    """Make distances and changes with many ties, a constant group and a NaN."""
    rng = np.random.default_rng(seed)
    size = groups * cells
    group = np.repeat(np.arange(groups), cells)
    table = pd.DataFrame(
        {
            "model": np.where(group % 2, "a", "b"),
            "class": group // 2 % 5,
            "layer": group,
            "cell": np.tile(np.arange(cells), groups),
            "near": rng.integers(0, 4, size) / 7,
            "far": rng.standard_normal(size),
            "lost": rng.integers(0, 6, size) / 3,
            "held": rng.standard_normal(size) * 1e-9 + 1,
        }
    )
    table.loc[table["layer"] == 3, "lost"] = 0.1
    table.loc[(table["layer"] == 5) & (table["cell"] == 2), "far"] = np.nan
    return table


def test_correlations_equal_scipys_with_ties_constants_and_nan() -> None:
    table = random_table(40).sample(frac=1, random_state=1)
    result = compute_correlations(table, ["near", "far"], ["lost", "held"])
    assert list(result.columns) == [
        "model", "class", "layer", "distance", "change", "spearman", "kendall", "n",
    ]  # fmt: skip
    assert len(result) == 40 * 4
    assert (result["n"] == 16).all()
    for row in result.itertuples():
        group = table[table["layer"] == row.layer]
        a, b = group[row.distance], group[row.change]
        if a.isna().any() or a.nunique() == 1 or b.nunique() == 1:
            assert np.isnan([row.spearman, row.kendall]).all(), row
        else:
            assert row.spearman == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
            assert row.kendall == pytest.approx(scipy.stats.kendalltau(a, b)[0], abs=1e-12)
    nan = result["spearman"].isna()
    assert set(result[nan & (result["change"] == "lost")]["layer"]) == {3, 5}


def test_groups_of_any_size_equal_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(60, seed=1).sample(frac=0.6, random_state=2).drop(columns="model")
    whole = compute_correlations(table, ["far"], ["lost"], by=["layer"])
    assert whole["n"].nunique() > 5
    for row in whole.dropna().itertuples():
        group = table[table["layer"] == row.layer]
        assert row.n == len(group)
        a, b = group["far"], group["lost"]
        assert row.spearman == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
        assert row.kendall == pytest.approx(scipy.stats.kendalltau(a, b)[0], abs=1e-12)
    for name, value in (("_LARGE", 4), ("_SIGNS", 1000)):  # sorting, and blocks of a few groups
        monkeypatch.setattr(stats, name, value)
        again = compute_correlations(table, ["far"], ["lost"], by=["layer"])
        pd.testing.assert_frame_equal(whole, again, rtol=1e-12)


def test_similarities_are_negated() -> None:
    table = random_table(4)
    table["like"] = 1 - table["far"]
    both = compute_correlations(table, ["far", "like"], ["held"], similarities=["like"])
    for name in ("spearman", "kendall"):
        far, like = (both.loc[both["distance"] == d, name].to_numpy() for d in ("far", "like"))
        np.testing.assert_array_equal(far, like)
    with pytest.raises(StatsError, match="similarities: 'like' is not among distances"):
        compute_correlations(table, ["far"], ["held"], similarities=["like"])


def test_duplicate_cells_are_refused() -> None:
    table = pd.concat([random_table(4), random_table(4).iloc[[17]]])
    with pytest.raises(
        StatsError, match=r"1 duplicate row; the first is model a, class 0, layer 1, cell 1;"
    ):
        compute_correlations(table, ["far"], ["lost"])
    # Grouping without the model makes the cells of two models duplicates.
    with pytest.raises(StatsError, match="expected one row per cell of a group by class"):
        compute_correlations(random_table(4), ["far"], ["lost"], by=["class"])


def test_equal_orders_give_exactly_1_and_single_cells_nan() -> None:
    table = pd.DataFrame(
        {"g": [0, 0, 0, 0, 1], "d": [1e-9, 2e-9, 2e-9, 7.0, 1.0], "c": [3.0, 4.0, 4.0, 5.0, 1.0]}
    )
    result = compute_correlations(table, ["d"], ["c"], by=["g"])
    assert result["spearman"].tolist()[0] == 1.0
    assert np.isnan(result["spearman"][1])
    assert result["n"].tolist() == [4, 1]


def test_summary_excludes_and_counts_nan_groups() -> None:
    result = compute_correlations(random_table(40), ["near", "far"], ["lost"])
    table = summarise(result).set_index(["model", "distance", "change"])
    odd = result[(result["model"] == "a") & (result["distance"] == "far")]["spearman"]
    row = table.loc[("a", "far", "lost")]
    assert row["groups"] == 20
    assert row["nan_groups"] == 2
    assert row["spearman"] == pytest.approx(odd.dropna().mean())
    kendall = result[(result["model"] == "a") & (result["distance"] == "far")]["kendall"]
    assert row["kendall"] == pytest.approx(kendall.dropna().mean())
    assert table.loc[("b", "far", "lost"), "nan_groups"] == 0
    assert tabulate_means(result).loc[("a", "far"), "lost"] == row["spearman"]


@pytest.mark.parametrize(
    ("distances", "changes", "message"),
    [
        (["nearly"], ["lost"], "distances: the table has no column 'nearly'"),
        (["near"], [], "changes: empty; expected some of"),
        (["near"], ["word"], "column 'word' is .*; expected numbers"),
    ],
)
def test_missing_and_non_numeric_columns_are_refused(
    distances: list[str], changes: list[str], message: str
) -> None:
    table = random_table(4).assign(word="x")
    with pytest.raises(StatsError, match=message):
        compute_correlations(table, distances, changes)
