"""The pages that say how fast and how right the package is: made of committed results."""

from __future__ import annotations

import re

import pytest

from bench import render_docs
from bench.common import machine
from bench.common.machine import RESULTS, load, save


@pytest.mark.parametrize("path", render_docs.PAGES, ids=lambda path: path.parent.name)
def test_a_page_is_what_its_results_say(path):
    """After `make bench` or another run: `python -m bench render-docs`."""
    assert path.read_text(encoding="utf-8") == render_docs.pages()[path]


@pytest.mark.parametrize("path", render_docs.PAGES, ids=lambda path: path.parent.name)
def test_what_a_page_shows_and_links_is_there(path):
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target


def test_results_name_their_device_versions_and_commit():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        found = load(path)["environment"]
        for key in ("device", "torch", "numpy", "python", "date", "commit"):
            assert found[key], (path, key)


def part(name, folder):
    return render_docs.filled(
        f"<!-- {name}: made by `python -m bench render-docs` -->\n<!-- end -->", folder
    )


def test_another_result_makes_another_page(tmp_path):
    """The numbers of the tables are those of the records."""
    (source,) = RESULTS.glob("bench-*.json")
    record = load(source)
    for row in record["benchmarks"]:
        row["median_s"] = 1.0
    save(tmp_path / source.name, record)
    got = part("operations", tmp_path)
    rows = [line for line in got.splitlines() if "| repsim_kernels |" in line]
    assert len(rows) == sum(row["name"] == "repsim_kernels" for row in record["benchmarks"])
    assert all("| repsim_kernels | 1 s |" in row for row in rows)
    assert render_docs.filled(got, tmp_path) == got


def test_speed_is_of_medians(tmp_path):
    """Neither of the fastest rounds nor of what was found by them."""
    (source,) = RESULTS.glob("bench-*.json")
    record = load(source)
    for row in record["benchmarks"]:
        row.update(median_s=1.0, min_s=0.1)
        if row["name"] == "suffix":
            row["median_s"] = 0.5
    save(tmp_path / source.name, record)
    lines = part("speed", tmp_path).splitlines()
    assert "| ResNet50, layer3.0 | 1 s | 1 s | 1.0 | 1.8 |" in lines  # 16 / (1 + 16 / 2)
    assert "| the same, 6 of the cells dead | 1 s | 1 s | 1.0 |  |" in lines
    assert "| the same, classes apart | 500 µs | 5 ms | 10.0 |" in lines  # of 2,000 and 200
    (ridge,) = (line for line in lines if "leave-one-out" in line)
    assert "16 ablations, n = 500, all of p = 1,600, its Grams included | 1 s |" in ridge


RUN = {"device": "a GPU", "date": "2026-11-27T02:00:00+0000", "commit": "b" * 40, "torch": "2"}


def run(commit, date):
    return {"commit": commit and commit * 40, "date": f"{date}T01:00:00+0000"}


@pytest.mark.parametrize(
    ("rows", "changed", "dates", "commits"),
    [
        ({}, False, "2026-11-27", "bbbbbbb"),
        ({}, None, "2026-11-27", "bbbbbbb"),
        ({"rows": [{"precision": "tf32"}]}, True, "2026-11-27", "bbbbbbb + changes"),
        (
            {"rows": [run("a", "2026-11-25"), run("b", "2026-11-27"), run("a", "2026-11-26")]},
            True,
            "2026-11-25 to 2026-11-27",
            "bbbbbbb + changes, aaaaaaa",
        ),
        ({"rows": [run(None, "2026-11-26")]}, None, "2026-11-26", "not known"),
    ],
)
def test_runs_say_what_was_measured_when(tmp_path, rows, changed, dates, commits):
    save(tmp_path / "peers-a-gpu.json", {"environment": RUN | {"changed": changed}, **rows})
    line = part("runs", tmp_path).splitlines()[-2]
    assert line == f"| [`peers`](results/peers-a-gpu.json) | a GPU | {dates} | {commits} |"


def test_a_record_of_a_gpu_names_its_host_too():
    assert render_docs._on({"environment": RUN | {"host": "a CPU"}}) == (
        "a GPU, host a CPU, torch 2, 2026-11-27"
    )
    assert render_docs._on({"environment": RUN}) == "a GPU, torch 2, 2026-11-27"


def test_an_environment_without_git_knows_no_changes(monkeypatch):
    found = machine.environment("cpu")
    assert "host" not in found
    for output, changed in ((None, None), ("", False), (" M README.md", True)):
        monkeypatch.setattr(machine, "_output", lambda *_, output=output: output)
        assert machine.environment("cpu")["changed"] is changed


def test_every_figure_of_the_results_is_drawn_anew(tmp_path):
    for path in RESULTS.glob("*.json"):
        save(tmp_path / path.name, load(path))
    written = render_docs.draw(tmp_path)
    assert sorted(tmp_path.glob("*.png")) == sorted(written)
    there = {path.name for path in RESULTS.glob("*.png")}
    assert {path.name for path in written} == there - {"roofline-h200-predicted.png"}


def test_parts_that_cannot_be_made_are_said(tmp_path):
    with pytest.raises(RuntimeError, match="part nonsense: unknown; expected one of peers"):
        render_docs.filled("<!-- nonsense: made by -->", tmp_path)
    with pytest.raises(RuntimeError, match=r"no bench-\*\.json in it"):
        part("speed", tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(RuntimeError, match="part runs: 0 times with an end"):
        render_docs.filled("<!-- runs: made by `python -m bench render-docs` -->\n", tmp_path / "x")


def test_more_workers_are_modelled_from_the_units_of_two(tmp_path):
    (source,) = RESULTS.glob("scaling-*.json")
    record = load(source)
    record["runs"][0].update(units=[7.0, 2.0], seconds=12.0)
    record["runs"][1].update(units=[3.0, 4.0, 5.0], seconds=10.0)
    save(tmp_path / source.name, record)
    got = part("scaling", tmp_path)
    assert "demo's 3 units took 9 s in one process, with start-up and report 12 s" in got
    assert "the whole command took 10 s" in got
    assert "| seconds for the demo's units | 12 | 8 | 5 | 5 | 5 |" in got
    assert "| efficiency | 100% | 75% | 60% | 30% | 15% |" in got
