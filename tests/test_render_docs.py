"""The generated blocks of the documentation agree with the committed records."""

from __future__ import annotations

import re

import pytest

from bench import doc_blocks, render_docs
from bench.common import machine, records
from bench.common.machine import RESULTS, load, save


def name_page(path):
    return "-".join(path.parts[-2:])


@pytest.mark.parametrize("path", render_docs.PAGES, ids=name_page)
def test_pages_are_up_to_date(path):
    """If this fails, run `python -m bench render-docs`."""
    assert path.read_text(encoding="utf-8") == render_docs.render_pages()[path]


def test_every_block_is_on_a_page():
    texts = [path.read_text(encoding="utf-8") for path in render_docs.PAGES]
    names = re.findall(r"<!-- (\S+): made by", "\n".join(texts))
    assert sorted(names) == sorted(doc_blocks.BLOCKS)


def test_records_name_their_device_versions_and_commit():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        environment = load(path)["environment"]
        for key in ("device", "torch", "numpy", "python", "date", "commit"):
            assert environment[key], (path, key)


def render_block(name, folder):
    return render_docs.fill_blocks(
        f"<!-- {name}: made by `python -m bench render-docs` -->\n<!-- end -->", folder
    )


def copy_record(kind, folder, change):
    """Save the committed record of a kind in the folder, changed by a function."""
    (source,) = RESULTS.glob(f"{kind}-*.json")
    record = load(source)
    change(record)
    save(folder / source.name, record)


def test_tables_show_the_numbers_of_the_record(tmp_path):
    def set_medians(record):
        for row in record["benchmarks"]:
            row["median_s"] = 1.0

    copy_record("bench", tmp_path, set_medians)
    (path,) = tmp_path.iterdir()
    block = render_block("operations", tmp_path)
    rows = [line for line in block.splitlines() if "| repsim_kernels |" in line]
    benchmarks = load(path)["benchmarks"]
    assert len(rows) == sum(row["name"] == "repsim_kernels" for row in benchmarks)
    assert all("| repsim_kernels | 1 s |" in row for row in rows)
    assert render_docs.fill_blocks(block, tmp_path) == block


def test_baselines_use_medians(tmp_path):
    """The fastest rounds, and results derived from them, are ignored."""

    def set_medians(record):
        for row in record["benchmarks"]:
            row.update(median_s=1.0, min_s=0.1)
            if row["name"] == "suffix":
                row["median_s"] = 0.5

    copy_record("bench", tmp_path, set_medians)
    lines = render_block("baselines", tmp_path).splitlines()
    assert "| ResNet50, layer3.0 | 1 s | 1 s | 1.0 | 1.8 |" in lines  # 16 / (1 + 16 / 2)
    assert "| AlexNet, features.7, 6 of the cells dead | 1 s | 1 s | 1.0 |  |" in lines
    # One fit of 2,000 and one of scikit-learn's 200.
    assert "| the same, classes separated | 500 µs | 5 ms | 10.0 |" in lines
    (ridge,) = (line for line in lines if "leave-one-out" in line)
    assert "16 ablations, n = 500, all of p = 1,600, including the Grams | 1 s |" in ridge


def test_speed_compares_with_the_fastest_other_package(tmp_path):
    def set_seconds(record):
        ours, by_parts = doc_blocks.OURS, doc_blocks.BY_PARTS
        for row in record["rows"]:
            if row.get("seconds"):
                fast = {ours: 1.0, by_parts: 1.5, "torch-cka": 2.0, "scikit-learn": 0.25}
                row["seconds"] = [fast.get(row["package"], 9.0)] * 3
                row["calls"] = row["of"]

    copy_record("peers", tmp_path, set_seconds)
    with pytest.raises(RuntimeError, match="run `make bench` on the device of peers-"):
        render_block("speed", tmp_path)
    copy_record("bench", tmp_path, lambda record: None)
    lines = render_block("speed", tmp_path).splitlines()
    row = "100 ablations of one layer, n = 50, p = 193,600"
    assert f"| {row} | 1 s | torch-cka, 2 s | 2 x |" in lines
    # The table shows where another package is faster.
    assert "| one pair of layers, 256 x 64 | 1 s | scikit-learn, 250 ms | 0.25 x |" in lines
    assert any("which needs 1.5 s for the first row" in line for line in lines)
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 8


def test_the_accuracy_table_has_one_row_per_package(tmp_path):
    def set_errors(record):
        for point in record["points"]:
            if point["package"] == "rsatoolbox":
                point.update(status="ok", worst=0.25)

    copy_record("accuracy", tmp_path, set_errors)
    lines = render_block("accuracy", tmp_path).splitlines()
    (row,) = (line for line in lines if line.startswith("| rsatoolbox | biased |"))
    assert row.startswith("| rsatoolbox | biased | 2e-01 | 2e-01 |")
    (row,) = (line for line in lines if line.startswith("| torch-cka"))
    assert "| failed |" in row
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 8


ENVIRONMENT = {
    "device": "a GPU",
    "date": "2026-11-27T02:00:00+0000",
    "commit": "b" * 40,
    "torch": "2",
}


def make_run(commit, date):
    return {"commit": commit and commit * 40, "date": f"{date}T01:00:00+0000"}


@pytest.mark.parametrize(
    ("rows", "changed", "dates", "commits"),
    [
        ({}, False, "2026-11-27", "bbbbbbb"),
        ({}, None, "2026-11-27", "bbbbbbb"),
        ({"rows": [{"precision": "tf32"}]}, True, "2026-11-27", "bbbbbbb + changes"),
        (
            {
                "rows": [
                    make_run("a", "2026-11-25"),
                    make_run("b", "2026-11-27"),
                    make_run("a", "2026-11-26"),
                ]
            },
            True,
            "2026-11-25 to 2026-11-27",
            "bbbbbbb + changes, aaaaaaa",
        ),
        ({"rows": [make_run(None, "2026-11-26")]}, None, "2026-11-26", "unknown"),
    ],
)
def test_the_list_of_records_has_dates_and_commits(tmp_path, rows, changed, dates, commits):
    save(tmp_path / "peers-a-gpu.json", {"environment": ENVIRONMENT | {"changed": changed}, **rows})
    line = render_block("runs", tmp_path).splitlines()[-2]
    assert line == f"| [`peers`](results/peers-a-gpu.json) | a GPU | {dates} | {commits} |"


def test_a_gpu_record_names_its_host():
    assert records.describe_device({"environment": ENVIRONMENT | {"host": "a CPU"}}) == (
        "a GPU, host a CPU, torch 2, 2026-11-27"
    )
    assert records.describe_device({"environment": ENVIRONMENT}) == "a GPU, torch 2, 2026-11-27"


def test_uncommitted_changes_are_unknown_without_git(monkeypatch):
    assert "host" not in machine.describe_environment("cpu")
    for output, changed in ((None, None), ("", False), (" M README.md", True)):
        monkeypatch.setattr(machine, "_output", lambda *_, output=output: output)
        assert machine.describe_environment("cpu")["changed"] is changed


def test_every_committed_figure_is_redrawn(tmp_path):
    for path in RESULTS.glob("*.json"):
        save(tmp_path / path.name, load(path))
    written = render_docs.draw_figures(tmp_path)
    assert sorted(tmp_path.glob("*.png")) == sorted(written)
    committed = {path.name for path in RESULTS.glob("*.png")}
    assert {path.name for path in written} == committed - {"roofline-h200-predicted.png"}


def test_blocks_that_cannot_be_rendered_raise(tmp_path):
    with pytest.raises(RuntimeError, match="block nonsense: unknown; expected one of speed"):
        render_docs.fill_blocks("<!-- nonsense: made by -->", tmp_path)
    with pytest.raises(RuntimeError, match=r"no bench-\*\.json in it"):
        render_block("baselines", tmp_path)
    with pytest.raises(RuntimeError, match=r"no peers-\*\.json in it"):
        render_block("speed", tmp_path)
    with pytest.raises(RuntimeError, match="block runs: found 0 complete blocks; expected one"):
        render_docs.fill_blocks("<!-- runs: made by `python -m bench render-docs` -->\n", tmp_path)


def test_more_workers_are_modelled_from_the_units_of_two(tmp_path):
    def set_units(record):
        record["runs"][0].update(units=[7.0, 2.0], seconds=12.0)
        record["runs"][1].update(units=[3.0, 4.0, 5.0], seconds=10.0)

    copy_record("scaling", tmp_path, set_units)
    block = render_block("scaling", tmp_path)
    assert "demo's 3 units took 9 s in one process, 12 s with start-up and report" in block
    assert "the whole command took 10 s" in block
    assert "| seconds for the demo's units | 12 | 8 | 5 | 5 | 5 |" in block
    assert "| efficiency | 100% | 75% | 60% | 30% | 15% |" in block


def test_aims_show_the_slowest_pair(tmp_path):
    """Ours takes 2 ms, or 0.5 ms if small, and centring packages three times as long, save one."""

    def set_seconds(record):
        for row in record["rows"]:
            if row.get("seconds"):
                ours = 5e-4 if (row["n"], row["p"]) == (256, 64) else 2e-3
                factor = 1 if row["package"] == "repsim_kernels" else 3 if row["centres"] else 0.1
                if (row["n"], row["p"], row["package"]) == (1000, 4096, "plain torch"):
                    factor = 0.8
                row["seconds"] = [ours * factor * row["calls"] / row["of"]]

    copy_record("peers", tmp_path, set_seconds)
    copy_record("bench", tmp_path, lambda record: None)
    lines = render_block("aims", tmp_path).splitlines()
    assert sum("| at most 1 | 1.25 (1,000 x 4,096) |" in line for line in lines) == 1
    assert sum("| at most 2 | 0.33 (256 x 64) |" in line for line in lines) == 1
    assert sum("| at least 100 | 0.10 |" in line for line in lines) == 1
