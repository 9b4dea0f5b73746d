"""The comparison with other packages: agreement, failures and tables."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import repsim_kernels as rk
from bench.__main__ import app
from bench.common import machine
from bench.peers import jobs, run, tables, worker
from bench.peers.jobs import Workload
from bench.peers.packages import PACKAGES, Package

WORKLOADS = [
    Workload("pair", 30, 12, ("cka", "cka_debiased", "procrustes", "rsa", "cca")),
    Workload("pair", 30, 70, ("cka", "cka_debiased", "procrustes", "rsa")),
    Workload("pairs", 30, 20, layers=4),
    Workload("ablations", 20, 100, cells=6),
]

OPTIONS = {
    "cka_debiased": {"debiased": True},
    "rsa": {"distance": "sqeuclidean", "compare": "pearson"},
}


@pytest.fixture
def inputs(tmp_path, request):
    workload = request.param
    return workload, jobs.write_inputs(workload, tmp_path)


def load_inputs(paths):
    return [np.load(path) for path in paths]


@pytest.mark.parametrize("inputs", WORKLOADS[:2], indirect=True, ids=str)
def test_expected_values_match_the_reference(inputs):
    workload, paths = inputs
    x, y = load_inputs(paths)
    for metric in workload.metrics:
        function = rk.cka if metric == "cka_debiased" else getattr(rk, metric)
        want = function(x, y, **OPTIONS.get(metric, {}), backend="reference")
        expected = jobs.compute_expected(workload, [x, y], metric, [0])
        assert expected == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("inputs", WORKLOADS, indirect=True, ids=str)
def test_every_package_agrees_or_its_difference_is_explained(inputs):
    """Runs each package through the worker in this process; ours must agree to more digits."""
    workload, paths = inputs
    checked = jobs.sample_comparisons(workload, min(workload.n_comparisons, 4))
    for package in PACKAGES:
        if not run._takes_part(package, workload) or package.kind == "cupy":
            continue
        answer = worker.Worker(package, "cpu").start(workload, paths)
        want = jobs.compute_expected(workload, load_inputs(paths), package.metric, checked)
        facts = run._compute_errors(workload, package, answer, want, checked)
        status = facts.get("status", "ok")
        assert status == ("differs" if package.differs else "ok"), (package.key, facts)
        if package.name == tables.OURS:
            from_float32 = package.metric in jobs.CKA and workload.job != "ablations"
            assert facts["error"] < (1e-7 if from_float32 else 1e-12)


def test_each_metric_lists_this_package_first_and_a_peer():
    metrics = dict.fromkeys(package.metric for package in PACKAGES)
    for metric in metrics:
        names = [package.name for package in PACKAGES if package.metric == metric]
        assert names[0] == tables.OURS
        assert len(set(names)) == len(names) > 1
    assert {package.name for package in PACKAGES} >= {
        *("pytorch-cka", "ckatorch", "torch-cka", "rsatoolbox", "repsim", "shesha-geometry"),
        *("scikit-learn", "plain torch", "plain CuPy"),
    }


def test_a_sample_is_spread_over_all_comparisons():
    workload = Workload("ablations", 20, 100, cells=100)
    assert jobs.sample_comparisons(workload, 2) == [0, 50]
    assert jobs.sample_comparisons(workload, 100) == list(range(100))
    assert np.bincount(workload.labels()).tolist() == [1] * 100
    pairs = Workload("pairs", 9, 9, layers=5)
    assert pairs.n_comparisons == len(jobs.list_pairs(pairs))


def cka(x, y):
    return PACKAGES[0].pair(x, y)


def dies(x, y):
    os._exit(7) if len(x) > 9 else None  # not in the warm-up, which has 9 stimuli


def hangs(x, y):
    time.sleep(600 if len(x) > 9 else 0)


def greedy(x, y):
    return float(np.ones((len(x), 10**8, 8)).sum()) if len(x) > 9 else 0.0


def wrong(x, y):
    return 0.9 * cka(x, y)


def nan(x, y):
    return torch.nan


FAKES = {
    f.__name__: Package(f.__name__, "", "torch", "cka", True, "", f)
    for f in (cka, dies, hangs, greedy, wrong, nan)
}


@pytest.mark.slow
def test_a_failure_is_recorded_and_affects_only_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PACKAGES", tuple(FAKES.values()))
    monkeypatch.setattr(jobs, "list_workloads", lambda quick: [Workload("pair", 30, 12, ("cka",))])
    monkeypatch.setattr(run, "_LIMITS", {True: (20.0, 0.1)})
    monkeypatch.setattr(run, "serve", serve_fakes)
    out = tmp_path / "peers.json"
    record = run.compare_packages(out, quick=True)
    rows = {row["package"]: row for row in record["rows"]}
    assert record["finished"]
    assert rows["cka"]["status"] == "ok"
    assert rows["cka"]["error"] < 1e-12
    assert len(rows["cka"]["seconds"]) >= 2
    assert rows["dies"]["why"] == "its process ended with exit code 7"
    assert rows["hangs"]["why"] == "took over 20 s"
    assert "allocate" in rows["greedy"]["why"]
    assert {rows[name]["status"] for name in ("dies", "hangs", "greedy")} == {"failed"}
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["error"] == pytest.approx(0.1)
    assert rows["nan"]["status"] == "wrong"
    assert rows["nan"]["error"] == "nan"
    text = tables.tabulate_failures(record)
    for name in ("dies", "hangs", "greedy", "wrong", "nan"):
        assert f"| {name} | cka |" in text


def serve_fakes(key, device, connection):
    """Run a worker process that looks its package up among the fakes."""
    worker.PACKAGES = tuple(FAKES.values())
    worker.serve(key, device, connection)


@pytest.mark.slow
def test_every_package_runs_every_job_at_small_sizes():
    done = CliRunner().invoke(app, ["peers", "--quick"])
    assert done.exit_code == 0, done.output  # 1 if a row is wrong or failed


def test_a_terminated_comparison_removes_its_shared_memory():
    command = [sys.executable, "-m", "bench", "peers", "--quick", "--job", "pairs"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def folders():
        return list(run.SHARED.glob(f"repsim-{process.pid}-*"))

    try:
        for _ in range(600):
            if folders() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert folders()
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert not folders()


class FailingProcess:
    """A process whose package fails at the whole job; ``pair`` is its function for a pair."""

    def __init__(self, pair):
        self.package = dataclasses.replace(FAKES["cka"], pair=pair, all_pairs=wrong)

    def ask(self, limit, name, workload, paths, by_loop=False):
        if not by_loop:
            raise run.PackageError("took over 20 s")
        return {"values": [1.0]}


def test_a_package_that_fails_at_the_job_is_measured_with_a_loop():
    workload = WORKLOADS[2]
    answer = run._ask_first(FailingProcess(cka), workload, [], 20)
    assert answer["values"] == [1.0]
    assert answer["how"]["why"] == "a loop: its function for the whole job took over 20 s"
    with pytest.raises(run.PackageError, match="took over 20 s"):
        run._ask_first(FailingProcess(None), workload, [], 20)


def test_the_first_answers_of_a_loop_are_checked():
    for cells in (2, 3, 5, 6, 97, 1000):
        workload = Workload("ablations", 20, 2000, cells=cells)
        checked = jobs.sample_comparisons(workload, min(cells, 4))
        assert set(jobs.sample_comparisons(workload, 2)) <= set(checked)


def test_an_explained_difference_is_not_wrong():
    workload = Workload("pair", 30, 12, ("cka",))
    answer = {"values": np.array([0.9])}
    package = dataclasses.replace(FAKES["wrong"], differs="a reason")
    facts = run._compute_errors(workload, package, answer, np.array([1.0]), [0])
    assert facts == {"error": pytest.approx(0.1), "status": "differs", "why": "a reason"}


def make_row(package, seconds, calls=100, cells=100, **changes):
    facts = {"job": "ablations", "n": 50, "p": 1000, "layers": 1, "cells": cells, "of": cells}
    facts |= {"package": package, "metric": "cka_debiased", "status": "ok", "centres": True}
    facts |= {"device": "cpu", "commit": "a" * 40, "date": "2026-11-27T01:11:08+0000"}
    facts |= {"seconds": seconds, "calls": calls, "memory_bytes": 2e6, "error": 1e-7}
    return facts | {"distance_error": 1e-3} | changes


def test_tables_show_ratios_of_medians_and_mark_samples():
    rows = [
        make_row(tables.OURS, [0.01, 0.02, 0.05]),
        make_row("slow", [0.3, 0.5, 0.4], calls=10),  # a tenth of the comparisons: 4 s for all
        make_row("lost", [], calls=2, status="failed", why="no memory"),
        make_row("late", [1.0], status="failed", why="took over 30 s"),
        make_row_without_times("elsewhere", status="not run", why="needs a CUDA device"),
    ]
    text = tables.tabulate_ablations({"rows": rows}, "cka_debiased")
    lines = text.splitlines()
    assert lines[0].startswith("|  | C = 100 |")
    assert "| 20 ms |" in lines[2]
    assert "| 4 s * (200 x) | 2 MB | 1e-03 |" in lines[3]
    assert "| failed |" in lines[4]
    assert "| late | > 30 s |" in lines[5]  # although its first round finished
    assert lines[6] == "| elsewhere | not run |  |  |"


def make_row_without_times(package, **changes):
    return {
        key: value
        for key, value in make_row(package, [], **changes).items()
        if key not in ("seconds", "calls", "memory_bytes", "error", "distance_error")
    }


def test_the_table_of_all_rows():
    rows = [
        make_row(tables.OURS, [0.01, 0.02]),
        make_row("once", [0.5], calls=10, status="wrong", why="off by 1e-07"),
        make_row("a loop", [1, 2], why="a loop: its function for the whole job took over 30 s"),
        make_row_without_times("elsewhere", status="not run", why="needs a CUDA device"),
        make_row("pairs", [0.1, 0.3], 3, job="pairs", layers=3, of=3),
    ]
    lines = tables.tabulate_all_rows({"rows": rows}).splitlines()[2:]
    assert lines[0].endswith("| 15 ms | 10 ms to 20 ms |  | 2 MB | 1e-03 |")
    assert lines[1].endswith("| 5 s * | once | 10 of 100 | 2 MB | 1e-03, wrong |")
    assert lines[3].endswith("| 2 MB | 1e-07 |")
    assert len(lines) == 4  # without the package that was not run
    failures = tables.tabulate_failures({"rows": rows}).splitlines()[2:]
    assert [line.split(" | ")[2] for line in failures] == [
        "wrong: off by 1e-07",
        "a loop: its function for the whole job took over 30 s",
        "not run: needs a CUDA device",
    ]


def test_the_table_of_pairs_shows_methods_and_marks_cpu_packages():
    """CPU packages are marked only if other packages ran on a GPU."""
    facts = {"job": "pairs", "layers": 3, "of": 3, "calls": 3}
    rows = [
        make_row(tables.OURS, [0.1], **facts, device="cuda"),
        make_row("numpy's", [0.3], **facts),
        make_row("a loop", [0.2], **facts, device="cuda", why="a loop: its function failed"),
    ]
    record = {"rows": rows, "packages": {"a loop: cka_debiased": "float32"}}
    lines = tables.tabulate_pairs(record, "cka_debiased").splitlines()[2:]
    assert lines[0].startswith("| repsim_kernels | 100 ms |")
    assert lines[1].startswith("| numpy's (CPU) | 300 ms (3 x) |")
    assert lines[2].endswith("| float32; a loop: its function failed |")
    record["rows"] = [one | {"device": "cpu"} for one in rows]
    assert "(CPU)" not in tables.tabulate_pairs(record, "cka_debiased")


def test_one_pair_shows_the_fastest_and_the_fastest_that_centres():
    shape = {"job": "pair", "n": 50, "p": 64, "of": 1}
    rows = [
        make_row(tables.OURS, [0.003], 1, **shape),
        make_row("careful", [0.002], 1, **shape),
        make_row("quick", [0.001], 1, **shape | {"centres": False}),
        make_row("differs", [0.0001], 1, **shape | {"status": "differs", "why": "another"}),
        make_row("late", [0.0001], 1, **shape | {"status": "failed", "why": "took over 30 s"}),
    ]
    line = tables.tabulate_one_pair({"rows": rows}, "cka_debiased").splitlines()[2]
    assert line == "| 50 x 64 | 3 ms | careful, 2 ms | 0.67 | quick, 1 ms | 0.33 | 2 MB |"
    rows.append(make_row("wrong", [0.0015], 1, **shape, status="wrong", why="off by 1.4e-03"))
    line = tables.tabulate_one_pair({"rows": rows}, "cka_debiased").splitlines()[2]
    assert "| wrong, 1.5 ms (off by 1.4e-03) | 0.50 | quick, 1 ms | 0.33 |" in line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (123.4, "123 s"),
        (1.0, "1 s"),
        (0.0123, "12.3 ms"),
        (4.56e-5, "45.6 µs"),
        (2345, "2,340 s"),
        (12345, "12,300 s"),
    ],
)
def test_seconds(value, text):
    assert machine.format_seconds(value) == text


def test_the_figure_is_drawn(tmp_path):
    rows = [
        make_row(name, [t * c], c, c)
        for name, t in ((tables.OURS, 1e-4), ("b", 1e-2))
        for c in (16, 100)
    ]
    rows += [make_row(tables.OURS, [p * 1e-6], 1, job="pair", n=256, p=p, of=1) for p in (64, 4096)]
    out = tmp_path / "peers.png"
    tables.draw_figure({"rows": rows, "environment": {"device": "some CPU"}}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 10_000


def test_marks_are_hollow_for_estimates_and_crosses_for_failures():
    rows = [
        make_row(tables.OURS, [0.01], 16, 16),
        make_row(tables.OURS, [0.02]),
        make_row("sampled", [0.1], 16, 16),
        make_row("sampled", [0.1], 10),
        make_row("other", [0.2], 16, 16, status="differs", why="another"),
        make_row("other", [0.3], status="failed", why="took over 30 s"),
        make_row_without_times("elsewhere", status="not run", why="needs a CUDA device"),
    ]
    axes = Figure().subplots()
    tables._draw_curves(axes, {"rows": rows}, rows, lambda one: one["cells"])
    marks = {"o": [], "x": []}
    for line in axes.lines:
        if line.get_marker() in marks:
            (x,), (y,) = line.get_data()
            marks[line.get_marker()].append((x, y, line.get_markerfacecolor() == "white"))
    assert sorted(marks["o"]) == [
        (16, 0.01, False),
        (16, 0.1, False),
        (16, 0.2, True),
        (100, 0.02, False),
        (100, pytest.approx(1.0), True),
    ]
    ((x, y, _),) = marks["x"]
    assert x == 100
    assert 1.0 < y < axes.get_ylim()[1]
    assert {text.get_text() for text in axes.texts} == {tables.OURS, "sampled", "other"}
