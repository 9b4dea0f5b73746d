"""The pages that say how fast and how right the package is: made of committed results."""

from __future__ import annotations

import re

import pytest

from bench import page
from bench._machine import RESULTS, load, save


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.parent.name)
def test_a_page_is_what_its_results_say(path):
    """After `make bench` or another run: `python -m bench page`."""
    assert path.read_text(encoding="utf-8") == page.pages()[path]


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.parent.name)
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


def test_another_result_makes_another_page(tmp_path):
    """The numbers of the tables are those of the records."""
    (source,) = RESULTS.glob("bench-*.json")
    record = load(source)
    text = "<!-- operations: made by `python -m bench page` -->\n<!-- end -->"
    for row in record["benchmarks"]:
        row["median_s"] = 1.0
    save(tmp_path / source.name, record)
    got = page.filled(text, tmp_path)
    rows = [line for line in got.splitlines() if "| repsim_kernels |" in line]
    assert len(rows) == sum(row["name"] == "repsim_kernels" for row in record["benchmarks"])
    assert all("| repsim_kernels | 1 s |" in row for row in rows)
    assert page.filled(got, tmp_path) == got


def test_parts_that_cannot_be_made_are_said(tmp_path):
    with pytest.raises(RuntimeError, match="part nonsense: unknown; expected one of peers"):
        page.filled("<!-- nonsense: made by -->", tmp_path)
    with pytest.raises(RuntimeError, match=r"no bench-\*\.json in it"):
        page.filled("<!-- speed: made by `python -m bench page` -->\n<!-- end -->", tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(RuntimeError, match="part runs: 0 times with an end"):
        page.filled("<!-- runs: made by `python -m bench page` -->\n", tmp_path / "x")
