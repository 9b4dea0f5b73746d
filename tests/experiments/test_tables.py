"""Tables from other sources: reading, writing, warnings, and `repsim stats`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from _cli import invoke

from repsim_kernels.experiments.analysis.tables import find_problems, read_table, write_table
from repsim_kernels.experiments.errors import StatsError

BY = ["class", "layer"]


def correlated_table(seed: int = 0) -> pd.DataFrame:
    """Make a table of 6 classes, 3 layers and 16 tiles: a distance that correlates with a loss."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [list("abcdef"), ["one", "two", "three"], range(16)], names=["class", "layer", "tile"]
    )
    table = index.to_frame(index=False)
    table["dist"] = 0.6 * rng.random(len(table))
    table["lost"] = table["dist"] + 0.2 * rng.standard_normal(len(table))
    return table


def problems_text(table: pd.DataFrame, distances: list[str], **options: list[str]) -> str:
    return "\n".join(find_problems(table, distances, ["lost"], BY, **options))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_written_tables_are_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    write_table(correlated_table(), path)
    pd.testing.assert_frame_equal(read_table(path), correlated_table(), rtol=1e-15)
    renamed = read_table(path, cell=["tile"])
    assert renamed["cell"].tolist() == correlated_table()["tile"].tolist()
    assert "tile" not in renamed
    two = correlated_table().assign(row=lambda t: t["tile"] // 4, column=lambda t: t["tile"] % 4)
    write_table(two, path)
    assert read_table(path, cell=["row", "column"])["cell"].tolist() == two["tile"].tolist()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "a.parquet").write_text("no Parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(StatsError, match=rf"table: .*{name} can't be read"):
            read_table(tmp_path / name)
    with pytest.raises(StatsError, match=r"ends with '.txt'; expected .csv or .parquet"):
        read_table("a.txt")
    with pytest.raises(
        StatsError, match=r"^table: .*none\.csv does not exist; expected a CSV or Parquet file$"
    ):
        read_table(tmp_path / "none.csv")
    write_table(correlated_table(), tmp_path / "b.csv")
    with pytest.raises(StatsError, match="cell: the table has no column 'patch'"):
        read_table(tmp_path / "b.csv", cell=["patch"])


def test_complete_table_has_no_problems() -> None:
    assert problems_text(correlated_table(), ["dist"]) == ""


def test_missing_cells_and_values_are_counted() -> None:
    table = correlated_table().drop(index=[0, 1, 17])
    table.loc[40, "dist"] = np.nan
    result = problems_text(table, ["dist"])
    assert "2 of 18 groups have fewer than 16 cells, the smallest 14" in result
    assert f"column 'dist' has no value in 1 of {len(table)} rows" in result


def test_duplicate_rows_are_counted() -> None:
    table = correlated_table()
    text = problems_text(pd.concat([table, table[:2]]), ["dist"])
    assert "rows that equal an earlier row in every column: 2" in text


def test_columns_that_differ_within_groups_are_named() -> None:
    table = correlated_table()
    table["network"] = np.where(table["tile"] % 2, "vgg", "resnet")
    assert "column 'network' differs within 18 of 18 groups" in problems_text(table, ["dist"])
    table["network"] = table["class"] + table["layer"]
    assert problems_text(table, ["dist"]) == ""


def test_similarities_among_distances_are_noticed() -> None:
    table = correlated_table()
    rng = np.random.default_rng(1)
    for name in ("cka", "cca", "pwcca"):
        table[name] = table["dist"] / 2 + 0.02 * rng.random(len(table))
    names = ["dist", "cka", "cca", "pwcca"]
    assert problems_text(table, names) == ""
    table["cca"] = 1 - table["cca"]
    result = problems_text(table, names)
    assert "cca against dist, cka, pwcca: opposite orders within groups" in result
    assert "column 'cca' is between 0 and 1, mostly above 1/2" in result
    assert problems_text(table, names, similarities=["cca"]) == ""


def test_command_writes_the_correlations_of_a_table(tmp_path: Path) -> None:
    table = correlated_table()
    table["sim"] = 1 - table["dist"]
    write_table(table, tmp_path / "tiles.csv")
    out = tmp_path / "rho.csv"
    words = ["stats", str(tmp_path / "tiles.csv"), "--distances", "dist,sim", "--changes", "lost"]
    words += ["--by", "class,layer", "--cell", "tile", "--similarities", "sim", "--out", str(out)]
    code, output, err = invoke(*words)
    assert (code, err) == (0, "")
    result = read_table(out)
    assert list(result.columns) == [*BY, "distance", "change", "spearman", "kendall", "n"]
    assert len(result) == 36
    for row in result.itertuples():
        group = table[(table["class"] == row[1]) & (table["layer"] == row.layer)]
        expected = scipy.stats.spearmanr(group["dist"], group["lost"])[0]
        assert row.spearman == pytest.approx(expected, abs=1e-12)
    mean = result["spearman"].mean()
    of_classes = result[result["distance"] == "dist"].groupby("class")["spearman"].mean()
    low, high = scipy.stats.t.interval(0.95, 5, of_classes.mean(), scipy.stats.sem(of_classes))
    for line in (line for line in output.splitlines() if line.split()[:1] in (["dist"], ["sim"])):
        assert line.split()[1:5] == ["lost", f"{mean:.3f}", f"{low:.3f}", f"{high:.3f}"]
    assert "18 groups by class, layer" in output


def test_command_reports_errors_and_warnings_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tiles.csv"
    write_table(pd.concat([correlated_table(), correlated_table()[:1]]), path)
    base = ["stats", str(path), "--distances", "dist", "--changes", "lost"]
    code, _, err = invoke(*base, "--cell", "tile")
    assert (code, err.count("\n")) == (2, 1)
    assert "1 duplicate row; the first is class a, layer one, cell 0" in err
    code, _, err = invoke(*base)
    assert code == 0
    assert "warning: rows that equal an earlier row in every column: 1" in err
    code, _, err = invoke(*base, "--by", "colour")
    assert code == 2
    assert "by: the table has no column 'colour'" in err
