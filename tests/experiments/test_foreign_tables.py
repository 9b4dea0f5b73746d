"""Tables written by other programs: names stay text, and errors are one line."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from _cli import invoke

from repsim_kernels.experiments.analysis.controls import compute_partial_correlations
from repsim_kernels.experiments.analysis.correlations import compute_correlations
from repsim_kernels.experiments.analysis.tables import find_problems, read_table
from repsim_kernels.experiments.errors import StatsError

KEYS = ["model", "class", "layer"]
# Names that pandas reads as missing values or numbers.
NAMES = ["NA", "null", "nan", "None", "", "01", "1", "1.0", "1.10", "1.1", "True", "1e3", " x"]


def random_table(models: list[str], cells: int = 8, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [models, list("xyz"), list("ab"), range(cells)], names=[*KEYS, "cell"]
    )
    table = index.to_frame(index=False)
    return table.assign(cka=rng.random(len(table)) / 2, top1=rng.random(len(table)))


def stats(path: Path, *options: str) -> tuple[int, str, list[str]]:
    words = ["stats", path, "--distances", "cka", "--changes", "top1", *options]
    code, out, err = invoke(*words)
    return code, out, err.splitlines()


def assert_equals_scipy(result: pd.DataFrame, table: pd.DataFrame) -> None:
    """Check that the correlations are those of exactly the groups of the table."""
    groups = {key: group for key, group in table.groupby(KEYS, dropna=False)}
    assert set(zip(*(result[key] for key in KEYS), strict=True)) == set(groups)
    assert len(result) == len(groups)
    for row in result.itertuples(index=False):
        group = groups[tuple(row)[:3]]
        expected = scipy.stats.spearmanr(group["cka"], group["top1"])[0]
        assert row.spearman == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert row.n == len(group)


@pytest.mark.parametrize(("start", "newline"), [("", "\n"), ("\ufeff", "\r\n")])
@pytest.mark.parametrize("key", ["model", "class", "layer", "cell"])
def test_names_in_csv_are_text(tmp_path: Path, key: str, start: str, newline: str) -> None:
    table = random_table(["net"], cells=len(NAMES)).sample(frac=1, random_state=3)
    if key == "cell":
        table["cell"] = [NAMES[i] for i in table["cell"]]
    else:
        table = pd.concat([table.assign(**{key: name}) for name in NAMES])
        table = table.drop_duplicates([*KEYS, "cell"])
    table["top1"] = table["top1"].where(table["top1"] < 0.9)
    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(start)
        writer = csv.writer(file, lineterminator=newline)
        writer.writerow(table.columns)
        missing = table.assign(top1=table["top1"].astype(object).where(table["top1"].notna(), "NA"))
        writer.writerows(missing.itertuples(index=False, name=None))
    code, out, err = stats(path, "--out", str(tmp_path / "rho.csv"))
    assert (code, [line for line in err if "no value in" not in line]) == (0, [])
    assert f"{len(table.groupby(KEYS))} groups by model, class, layer" in out
    result = read_table(path)
    for name in (*KEYS, "cell"):
        assert result[name].tolist() == table[name].astype(str).tolist()
    np.testing.assert_array_equal(result["top1"], table["top1"])
    table["cell"] = table["cell"].astype(str)
    assert_equals_scipy(compute_correlations(result, ["cka"], ["top1"]), table)
    assert_equals_scipy(read_table(tmp_path / "rho.csv"), table)


def test_columns_named_by_options_are_text(tmp_path: Path) -> None:
    table = random_table(["01", "1"]).rename(columns={"model": "net", "cell": "tile"})
    table["tile"] = [["NA", "null", "7", "07", "", "x", "y", "z"][i] for i in table["tile"]]
    table.to_csv(tmp_path / "t.csv", index=False)
    words = ("--by", "net,class,layer", "--cell", "tile")
    code, out, err = stats(tmp_path / "t.csv", *words)
    assert (code, err) == (0, [])
    assert "12 groups by net, class, layer" in out
    result = read_table(tmp_path / "t.csv", ["tile"], ["net", "class", "layer"])
    assert result["cell"].nunique() == 8
    assert result["net"].tolist() == table["net"].tolist()


@pytest.mark.parametrize("levels", [[*KEYS, "cell"], ["layer"], ["cell", "class"]])
@pytest.mark.parametrize("as_columns", [False, True])
def test_named_index_levels_become_columns(
    tmp_path: Path, levels: list[str], as_columns: bool
) -> None:
    table = random_table(["m", "n"])
    path = tmp_path / "t.parquet"
    if as_columns:  # as columns and as the index
        table.set_index(levels, drop=False).to_parquet(path)
    else:
        table.set_index(levels).to_parquet(path)
    assert_equals_scipy(compute_correlations(read_table(path), ["cka"], ["top1"]), table)
    code, out, err = stats(path)
    assert (code, err) == (0, [])
    assert "12 groups by model, class, layer" in out
    table.drop(columns="cell").set_index([*KEYS]).to_parquet(path)
    assert "12 groups by model, class, layer" in stats(path)[1]


def test_unnamed_index_is_ignored(tmp_path: Path) -> None:
    table = random_table(["m"])
    table.index = pd.Index([f"row {i}" for i in table.index])
    table.to_parquet(tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet").columns) == list(table.columns)


@pytest.mark.parametrize("dtype", ["boolean", "Int64", "Float64", "float64"])
def test_missing_values_of_every_dtype_are_missing(tmp_path: Path, dtype: str) -> None:
    table = random_table(["m", "n"])
    table["top1"] = (4 * table["top1"]).round()
    if dtype == "boolean":
        table["top1"] = table["top1"] > 2
    nullable = table.assign(top1=table["top1"].astype(dtype))
    nullable.loc[[2, 30], "top1"] = pd.NA if dtype != "float64" else np.nan
    expected = table.assign(top1=table["top1"].astype("float64"))
    expected.loc[[2, 30], "top1"] = np.nan
    nullable.to_parquet(tmp_path / "t.parquet")
    assert_equals_scipy(compute_correlations(nullable, ["cka"], ["top1"]), expected)
    assert_equals_scipy(
        compute_correlations(read_table(tmp_path / "t.parquet"), ["cka"], ["top1"]), expected
    )
    code, _, err = stats(tmp_path / "t.parquet")
    assert (code, err) == (0, ["warning: column 'top1' has no value in 2 of 96 rows"])
    sizes = np.arange(len(table))
    pd.testing.assert_frame_equal(
        compute_partial_correlations(nullable.assign(size=sizes), ["cka"], ["top1"], ["size"]),
        compute_partial_correlations(expected.assign(size=sizes), ["cka"], ["top1"], ["size"]),
    )


@pytest.mark.parametrize("cell", [True, False])
def test_lists_in_unused_columns_are_ignored(tmp_path: Path, cell: bool) -> None:
    table = random_table(["m", "n"])
    table = table if cell else table.drop(columns="cell")
    more = table.assign(units=[[i, 2] for i in range(len(table))], maps=[{"a": 1}] * len(table))
    more.to_parquet(tmp_path / "t.parquet")
    assert stats(tmp_path / "t.parquet") == (0, csv_stats(table, tmp_path), [])
    twice = pd.concat([more, more[:1]], ignore_index=True)
    result = find_problems(twice.drop(columns="cell", errors="ignore"), ["cka"], ["top1"], KEYS)
    assert "rows that equal an earlier row in every column: 1" in result


def csv_stats(table: pd.DataFrame, folder: Path) -> str:
    table.to_csv(folder / "plain.csv", index=False)
    return stats(folder / "plain.csv")[1]


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        ("cka", (), "table: column 'cka' is object, such as array([1, 2]) in row 1; expected "),
        ("layer", (), "by: column 'layer' holds lists or similar values; expected names"),
        ("cell", (), "cell: column 'cell' holds lists or similar values; expected names"),
        (
            "place",
            ("--cell", "place"),
            "cell: column 'place' holds lists or similar values; expected",
        ),
        (
            "place",
            ("--by", "place"),
            "by: column 'place' holds lists or similar values; expected names",
        ),
    ],
)
def test_lists_in_used_columns_are_refused(
    tmp_path: Path, column: str, options: tuple[str, ...], message: str
) -> None:
    table = random_table(["m"])
    table.assign(**{column: [[1, 2]] * len(table)}).to_parquet(tmp_path / "t.parquet")
    code, _, (line,) = stats(tmp_path / "t.parquet", *options)
    assert code == 2
    assert line.startswith(f"error: {message}")


def as_csv(**changes: Any) -> str:
    return random_table(["m"]).assign(**changes).to_csv(index=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            random_table(["m"]).to_csv(sep=";", decimal=",", index=False),
            "separated by semicolons; expec",
        ),
        (
            random_table(["m"]).to_csv(sep=";", index=False),
            "separated by semicolons; expected commas",
        ),
        (random_table(["m"]).to_csv(sep="\t", index=False), "separated by tabs; expected commas"),
        ("", "t.csv can't be read (No columns to parse from file)"),
        ("\n\n", "t.csv can't be read (No columns to parse from file)"),
        (random_table(["m"])[:0].to_csv(index=False), "table: no rows; expected one per cell"),
        ("a,b\n1,2\n", "by: empty; expected some of a, b"),
        (as_csv(top1="n/d"), "table: column 'top1' is str, such as 'n/d' in row 1; expected"),
        (as_csv(cka='"0,5"'), "table: column 'cka' is str, such as '\"0,5\"' in row 1; expe"),
        (as_csv(top1="1+2j"), "such as '1+2j' in row 1; expected numbers"),
        (
            random_table(["m"]).assign(top2=0).to_csv(index=False).replace("top2", "cka"),
            "2 columns 'cka'",
        ),
        (as_csv().replace(",top1\n", "\n"), "have more values than the first line has names"),
        ("cell,x\n1,2,3\n4,5,6\n", "have more values than the first line has names"),
        ("cell,x\n1,2,3\n2,5,6\n1,8,9\n", "have more values than the first line has names"),
        ("cell,x\n1,2,3\n4,5\n", "have more values than the first line has names"),
        (as_csv() + "m,x,a,99,1,2,3,4\n", "t.csv can't be read (Error tokenizing data."),
        (as_csv() + 'm,"x,a,99,1,2', "t.csv can't be read (Error tokenizing data."),
        (as_csv(top1="").replace("top1", "top\0"), "changes: the table has no column 'top1'"),
    ],
)
def test_unusable_csv_files_give_an_error_of_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    code, out, err = stats(path)
    assert (code, out, len(err)) == (2, "", 1), (out, err)
    assert err[0].startswith("error: ")
    assert message in err[0]


@pytest.mark.parametrize("bad", ["oops", "1_000", "0,5", "--"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_error_names_the_first_non_number_and_its_row(
    tmp_path: Path, bad: str, suffix: str
) -> None:
    table = random_table(["m"])
    table["top1"] = table["top1"].map(repr).astype(object)
    table.loc[3, "top1"] = None  # missing, not an error
    table.loc[5, "top1"] = "1e-3"
    table.loc[11, "top1"] = bad
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    code, _, err = stats(path)
    (line,) = (line for line in err if line.startswith("error: "))
    assert code == 2
    assert line.endswith(f"such as {bad!r} in row 12; expected numbers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--distances", "cka"), "distances: 'cka' is repeated; expected distinct names"),
        (("--changes", "energy,top1"), "changes: 'top1' is repeated; expected"),
        (("--by", "layer,layer"), "by: 'layer' is repeated; expected distinct names"),
        (("--cell", "cell,cell"), "cell: 'cell' is repeated; expected distinct names"),
        (("--by", "distance,layer"), "by: 'distance' is the name of a column of the result; exp"),
        (("--by", "layer,n"), "by: 'n' is the name of a column of the result; expected another"),
        (
            ("--cluster", "nope"),
            "cluster: 'nope' is not a group column; expected model or class or layer",
        ),
        (("--by", "class,layer", "--cluster", "model"), "cluster: 'model' is not a group column"),
    ],
)
def test_conflicting_options_are_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    random_table(["m"]).assign(distance=1, n=2).to_csv(tmp_path / "t.csv", index=False)
    code, out, (line,) = stats(tmp_path / "t.csv", *options)
    assert (code, out) == (2, "")
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("cluster", ["model", "class", "layer"])
def test_intervals_are_over_the_chosen_cluster(tmp_path: Path, cluster: str) -> None:
    random_table(["m", "n"]).to_csv(tmp_path / "t.csv", index=False)
    code, out, err = stats(tmp_path / "t.csv", "--cluster", cluster)
    assert (code, err) == (0, [])
    assert f"Intervals: jackknife-t over {cluster}." in out


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_missing_file_is_an_error_of_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"missing{suffix}"
    assert stats(path) == (
        2,
        "",
        [f"error: table: {path} does not exist; expected a CSV or Parquet file"],
    )


def test_blanks_around_column_names_are_ignored(tmp_path: Path) -> None:
    table = random_table(["01", "1"])
    header, rest = table.to_csv(index=False).split("\n", 1)
    (tmp_path / "t.csv").write_text(f"{header.replace(',', ' , ')} \n{rest}")
    assert stats(tmp_path / "t.csv") == (0, csv_stats(table, tmp_path), [])
    result = read_table(tmp_path / "t.csv")
    assert list(result.columns) == list(table.columns)
    assert result["model"].tolist() == table["model"].tolist()


@pytest.mark.parametrize("every", [1, 2, 5])
def test_trailing_commas_do_not_shift_columns(tmp_path: Path, every: int) -> None:
    table = random_table(["m"])
    header, *lines = table.to_csv(index=False).splitlines()
    rows = [line + "," * (i % every == 0) for i, line in enumerate(lines)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    assert stats(path) == (0, csv_stats(table, tmp_path), [])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_wrong_file_contents_give_an_error_of_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    for data in (gzip.compress(as_csv().encode()), "naïve,ü\n".encode("latin-1")):
        path.write_bytes(data)
        code, _, err = stats(path)
        assert (code, len(err)) == (2, 1), err
        assert f"t{suffix} can't be read (" in err[0]
    path.unlink()
    path.mkdir()
    code, _, err = stats(path)
    assert (code, len(err)) == (2, 1), err
    for name in ("t.csv.gz", "t"):
        code, _, err = stats(tmp_path / name)
        assert (code, len(err)) == (2, 1)
        assert "expected .csv or .parquet" in err[0]


def test_duplicate_column_names_matter_only_if_used(tmp_path: Path) -> None:
    table = random_table(["m", "n"])
    notes = table.assign(note="a", text="b")
    notes.to_csv(tmp_path / "t.csv", index=False, header=[*table.columns, "note", "note"])
    assert stats(tmp_path / "t.csv") == (0, csv_stats(table, tmp_path), [])
    two = pd.concat([table, table[["cka"]]], axis=1)
    with pytest.raises(StatsError, match=r"^distances: the table has 2 columns 'cka'; expected o"):
        compute_correlations(two, ["cka"], ["top1"])
    with pytest.raises(
        StatsError, match=r"^controls: the table has 2 columns 'cka'; expected one$"
    ):
        compute_partial_correlations(two, ["top1"], ["top1"], ["cka"])


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_values_rank_beyond_all_others(tmp_path: Path, sign: int) -> None:
    table = random_table(["m", "n"])
    table.loc[[1, 5, 40], "cka"] = sign * np.inf
    table.to_csv(tmp_path / "t.csv", index=False)
    result = compute_correlations(read_table(tmp_path / "t.csv"), ["cka"], ["top1"])
    assert_equals_scipy(result, table.replace(sign * np.inf, sign * 1e300))
    assert result["kendall"].notna().all()
    code, _, err = stats(tmp_path / "t.csv")
    assert code == 0
    text = "column 'cka' is infinite in 3 of 96 rows, which are ranked beyond all others"
    assert err == [f"warning: {text}"]


def test_complex_numbers_are_refused() -> None:
    table = random_table(["m"]).assign(cka=1j)
    with pytest.raises(StatsError, match=r"^table: column 'cka' is complex128; expected numbers$"):
        compute_correlations(table, ["cka"], ["top1"])
