"""`python -m bench compare` on constructed records with known ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.compare import BadRecord, compare_records, extract_times

ENVIRONMENT = {
    "device": "a processor, 2 cores",
    "torch": "2.14.1",
    "threads": 2,
    "date": "1",
    "commit": "a",
}


def make_bench(name: str, median: float, iqr: float, rounds: int = 9) -> dict[str, Any]:
    spread = {"min_s": median - iqr, "max_s": median + 3 * iqr, "iqr_s": iqr, "rounds": rounds}
    return {"group": "cka, n=50", "name": name, "median_s": median, **spread, "extra_info": {}}


def make_report(ms: float, kernel: dict[str, Any] | None) -> dict[str, Any]:
    call = {"ms": ms, "min_ms": 0.9 * ms, "max_ms": 2 * ms, "iqr_ms": 0.2 * ms, "repeats": 20}
    named = {"name": "cell_grams", "shape": "n=50", "dtype": "float32", "precision": "tf32"}
    return named | {"call": call} | ({"kernel": kernel} if kernel else {})


def make_peer(package: str, seconds: list[float], **other: Any) -> dict[str, Any]:
    sizes = {"job": "ablations", "n": 500, "p": 64, "layers": None, "cells": 100, "calls": 10}
    kind = {"dtype": "float32", "metric": "cka", "status": "ok", "of": 100, "memory_bytes": 1}
    return sizes | kind | {"package": package, "seconds": seconds} | other


def save(path: Path, record: dict[str, Any], **environment: Any) -> Path:
    path.write_text(json.dumps({"environment": ENVIRONMENT | environment} | record))
    return path


def split_lines(page: str, what: str) -> list[list[str]]:
    """Return the words after a name, for each line of the table that starts with it."""
    return [line.removeprefix(what).split() for line in page.splitlines() if line.startswith(what)]


def test_benchmarks(tmp_path: Path) -> None:
    a = [make_bench("same", 1, 0.2), make_bench("slow", 1, 0.2), make_bench("gone", 1, 0)]
    b = [make_bench("same", 1.1, 0.2), make_bench("slow", 2, 0.2), make_bench("new", 1, 0)]
    page = compare_records(
        save(tmp_path / "a.json", {"benchmarks": a}, date="1"),
        save(tmp_path / "b.json", {"benchmarks": b}, date="2", commit="b"),
    )
    # (1.9 to 2.1) / (0.9 to 1.1), and (1.0 to 1.2) / (0.9 to 1.1).
    assert split_lines(page, "cka, n=50: slow") == [
        ["1", "s", "2", "s", "2.00", "1.73", "to", "2.33", "slower"]
    ]
    assert split_lines(page, "cka, n=50: same") == [
        ["1", "s", "1.1", "s", "1.10", "0.91", "to", "1.33"]
    ]
    assert page.index("cka, n=50: slow") < page.index("cka, n=50: same")
    assert "WARNING" not in page
    assert page.endswith(
        f"timed only in {tmp_path}/a.json:\n  cka, n=50: gone\n\n"
        f"timed only in {tmp_path}/b.json:\n  cka, n=50: new"
    )


def test_the_largest_change_comes_first(tmp_path: Path) -> None:
    a = [make_bench("doubled", 1, 0), make_bench("tenth", 1, 0), make_bench("same", 1, 0)]
    b = [make_bench("doubled", 2, 0), make_bench("tenth", 0.1, 0), make_bench("same", 1, 0)]
    page = compare_records(
        save(tmp_path / "a.json", {"benchmarks": a}),
        save(tmp_path / "b.json", {"benchmarks": b}),
    )
    names = [line.split()[2] for line in page.splitlines() if line.startswith("cka")]
    assert names == ["tenth", "doubled", "same"]
    assert split_lines(page, "cka, n=50: tenth") == [
        ["1", "s", "100", "ms", "0.10", "0.10", "to", "0.10", "faster"]
    ]


def test_with_few_rounds_the_ends_are_the_extremes() -> None:
    record = {"benchmarks": [make_bench("few", 1, 0.25, rounds=3), make_bench("many", 1, 0.25)]}
    frame = extract_times("benchmarks", record)
    assert frame.loc["cka, n=50: few"].tolist() == [1, 0.75, 1.75]
    assert frame.loc["cka, n=50: many"].tolist() == [1, 0.875, 1.125]
    rounds = {"few": [3, 1, 2], "many": [1, 2, 3, 4, 5]}
    frame = extract_times(
        "peers", {"rows": [make_peer(k, v, calls=100) for k, v in rounds.items()]}
    )
    assert frame.to_numpy().tolist() == [[2, 1, 3], [3, 2, 4]]


def test_a_single_round_is_never_marked(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", {"rows": [make_peer("ours", [1.0])]})
    b = save(tmp_path / "b.json", {"rows": [make_peer("ours", [9.0, 9.0])]})
    what = "ablations n=500 p=64 cells=100 float32 ours cka"
    assert split_lines(compare_records(a, b), what) == [["10", "s", "90", "s", "9.00"]]


def test_gpu_reports(tmp_path: Path) -> None:
    """A call has a spread; the profiler's sum for a kernel has none."""
    a = save(tmp_path / "a.json", {"rows": [make_report(1, {"ms": 0.5, "how": "profiler"})]})
    b = save(tmp_path / "b.json", {"rows": [make_report(3, {"ms": 0.25, "how": "profiler"})]})
    page = compare_records(a, b)
    what = "cell_grams n=50 float32 tf32, "
    assert split_lines(page, what + "call") == [
        ["1", "ms", "3", "ms", "3.00", "2.45", "to", "3.67", "slower"]
    ]
    assert split_lines(page, what + "kernel") == [["500", "µs", "250", "µs", "0.50"]]


def test_gpu_reports_with_rows_that_were_not_measured(tmp_path: Path) -> None:
    waiting = make_report(1, None)
    del waiting["call"]
    a = save(tmp_path / "a.json", {"rows": [waiting]})
    b = save(tmp_path / "b.json", {"rows": [make_report(1, {"how": "events; no profiler"})]})
    assert compare_records(a, b) == f"\ntimed only in {b}:\n  cell_grams n=50 float32 tf32, call"


def test_peers(tmp_path: Path) -> None:
    """Times are scaled up from samples to the whole job; a failed row has none."""
    failed = make_peer("other", [], status="out of memory")
    first = [
        make_peer("ours", [1.0, 1.2, 1.1]),
        make_peer("loop", [1.0, 1.0, 1.0]),
        make_peer("other", [1.0]),
    ]
    second = [
        make_peer("ours", [2.0, 2.4, 2.2], calls=20),
        make_peer("loop", [3.0, 4.0, 5.0]),
        failed,
    ]
    a = save(tmp_path / "a.json", {"rows": first})
    b = save(tmp_path / "b.json", {"rows": second})
    page = compare_records(a, b)
    what = "ablations n=500 p=64 cells=100 float32 "
    assert split_lines(page, what + "loop cka") == [
        ["10", "s", "40", "s", "4.00", "3.00", "to", "5.00", "slower"]
    ]
    assert split_lines(page, what + "ours cka") == [
        ["11", "s", "11", "s", "1.00", "0.83", "to", "1.20"]
    ]
    assert page.endswith(f"timed only in {a}:\n  {what}other cka")


def test_differing_conditions_are_warned_about_first(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", {"benchmarks": [make_bench("x", 1, 0)]}, triton="3.6")
    b = save(
        tmp_path / "b.json",
        {"benchmarks": [make_bench("x", 1, 0)]},
        device="a GPU",
        torch="2.15",
    )
    assert compare_records(a, b).splitlines()[:5] == [
        "WARNING: not measured under the same conditions (A | B):",
        "  device: a processor, 2 cores | a GPU",
        "  torch: 2.14.1 | 2.15",
        "  triton: 3.6 | None",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file or directory"),
        ("{", "not JSON"),
        ("[]", "unknown kind of record"),
        ('{"environment": {}, "rows": []}', "unknown kind of record"),
        ('{"environment": {}, "rows": [{"package": 1, "seconds": [1]}]}', "peers; expected bench"),
        ('{"environment": {}, "benchmarks": [{}]}', "KeyError"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | None, why: str) -> None:
    good = save(tmp_path / "good.json", {"benchmarks": [make_bench("x", 1, 0)]})
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    done = CliRunner().invoke(app, ["compare", str(good), str(bad)])
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(bad) in line
    assert why in line
    assert "expected" in line


def test_duplicate_entries_are_refused(tmp_path: Path) -> None:
    twice = save(tmp_path / "a.json", {"benchmarks": [make_bench("x", 1, 0)] * 2})
    with pytest.raises(BadRecord, match="duplicate entry: cka, n=50: x"):
        compare_records(twice, twice)


def test_the_command(tmp_path: Path) -> None:
    """A slower entry is reported, but is not a failure."""
    a = save(tmp_path / "a.json", {"benchmarks": [make_bench("x", 1, 0.1)]})
    b = save(tmp_path / "b.json", {"benchmarks": [make_bench("x", 9, 0.1)]})
    done = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert done.exit_code == 0
    assert "9.00" in done.stdout
    assert "slower" in done.stdout
