from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from _toy import toy_study

from experiments.report import means, write_report
from experiments.run import run, run_folder
from experiments.stats import METRICS, PERFORMANCE, PROBES, StatsError, correlations, summary


def random_table(groups: int, cells: int = 16, seed: int = 0) -> pd.DataFrame:
    """Distances and changes with many ties, some constant groups and some NaN."""
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
    found = correlations(table, ["near", "far"], ["lost", "held"])
    assert list(found.columns) == [
        "model", "class", "layer", "distance", "change", "spearman", "n",
    ]  # fmt: skip
    assert len(found) == 40 * 4
    assert (found["n"] == 16).all()
    for row in found.itertuples():
        group = table[table["layer"] == row.layer]
        a, b = group[row.distance], group[row.change]
        if a.isna().any() or a.nunique() == 1 or b.nunique() == 1:
            assert np.isnan(row.spearman), row
        else:
            assert row.spearman == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
    nan = found["spearman"].isna()
    assert set(found[nan & (found["change"] == "lost")]["layer"]) == {3, 5}


def test_equal_orders_give_exactly_one_and_lone_cells_nan() -> None:
    table = pd.DataFrame(
        {"g": [0, 0, 0, 0, 1], "d": [1e-9, 2e-9, 2e-9, 7.0, 1.0], "c": [3.0, 4.0, 4.0, 5.0, 1.0]}
    )
    found = correlations(table, ["d"], ["c"], by=["g"])
    assert found["spearman"].tolist()[0] == 1.0
    assert np.isnan(found["spearman"][1])
    assert found["n"].tolist() == [4, 1]


def test_summary_leaves_nan_groups_out_and_counts_them() -> None:
    found = correlations(random_table(40), ["near", "far"], ["lost"])
    table = summary(found).set_index(["model", "distance", "change"])
    odd = found[(found["model"] == "a") & (found["distance"] == "far")]["spearman"]
    row = table.loc[("a", "far", "lost")]
    assert row["groups"] == 20
    assert row["nan_groups"] == 2
    assert row["spearman"] == pytest.approx(odd.dropna().mean())
    assert table.loc[("b", "far", "lost"), "nan_groups"] == 0
    assert means(found).loc[("a", "far"), "lost"] == row["spearman"]


def test_ten_thousand_groups_take_seconds() -> None:
    table = random_table(10_400)
    start = time.perf_counter()
    correlations(table, ["near", "far"], ["lost", "held"])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("distances", "changes", "message"),
    [
        (["nearly"], ["lost"], "distances: the table has no column 'nearly'"),
        (["near"], [], "changes: is empty"),
        (["near"], ["word"], "column 'word' is .*; expected numbers"),
    ],
)
def test_wrong_columns_are_named(distances: list[str], changes: list[str], message: str) -> None:
    table = random_table(4).assign(word="x")
    with pytest.raises(StatsError, match=message):
        correlations(table, distances, changes)


def test_the_report_is_self_contained_and_holds_the_table(tmp_path: Path) -> None:
    study = toy_study(name="toy <b>")
    store = run_folder([study], tmp_path, {"images": "some & others"})
    table = run([study], store)
    path = write_report(tmp_path, tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    addresses = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')> ]+)", html)
    assert {address for address in addresses if not address.startswith("#")} == set()
    assert "@import" not in html
    assert "toy <b>" not in html
    assert "some &amp; others" in html
    found = summary(correlations(table, METRICS, (*PERFORMANCE, *PROBES["ridge"])))
    for value in found["spearman"].dropna():
        assert f">{value:.2f}" in html
    assert html.count("<svg") == html.count('role="img" aria-label=') == 6
    assert "#010203" not in html
    assert "15 of 3 classes, 3 x 8 x 8" in html


def test_a_table_alone_makes_a_report(tmp_path: Path) -> None:
    table = toy_study(metrics=["procrustes"], grid=(2, 3)).run()
    html = write_report(table, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "made from a table alone" in html
    assert "Procrustes" in html
    assert "The grid of one layer" not in html  # six cells: 2 x 3 or 3 x 2?
