"""Other packages beside ours: who agrees, who fails, and what the tables say of it."""

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

import repsim_kernels as rk
from bench.common import machine
from bench.peers import jobs, run, tables, worker
from bench.peers.jobs import Case
from bench.peers.packages import PACKAGES, Package

CASES = [
    Case("pair", 30, 12, ("cka", "cka_debiased", "procrustes", "rsa", "cca")),
    Case("pair", 30, 70, ("cka", "cka_debiased", "procrustes", "rsa")),
    Case("pairs", 30, 20, layers=4),
    Case("ablations", 20, 100, cells=6),
]

OPTIONS = {
    "cka_debiased": {"debiased": True},
    "rsa": {"distance": "sqeuclidean", "compare": "pearson"},
}


@pytest.fixture
def inputs(tmp_path, request):
    case = request.param
    return case, jobs.write_inputs(case, tmp_path)


def representations(paths):
    return [np.load(path) for path in paths]


@pytest.mark.parametrize("inputs", CASES[:2], indirect=True, ids=str)
def test_what_must_come_out_is_the_references(inputs):
    case, paths = inputs
    x, y = representations(paths)
    for metric in case.metrics:
        function = rk.cka if metric == "cka_debiased" else getattr(rk, metric)
        want = function(x, y, **OPTIONS.get(metric, {}), backend="reference")
        assert jobs.wanted(case, [x, y], metric, [0]) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("inputs", CASES, indirect=True, ids=str)
def test_every_package_agrees_or_its_difference_is_explained(inputs):
    """Each through the worker, in this process; ours to more digits."""
    case, paths = inputs
    checked = jobs.sample(case, min(case.of, 4))
    for package in PACKAGES:
        if not run._takes_part(package, case) or package.kind == "cupy":
            continue
        answer = worker.Worker(package, "cpu").first(case, paths)
        want = jobs.wanted(case, representations(paths), package.metric, checked)
        found = run._agreement(case, package, answer, want, checked)
        status = found.get("status", "ok")
        assert status == ("differs" if package.differs else "ok"), (package.key, found)
        if package.name == tables.OURS:
            assert found["error"] < 1e-12


def test_each_metric_has_ours_first_and_a_peer():
    metrics = dict.fromkeys(package.metric for package in PACKAGES)
    for metric in metrics:
        names = [package.name for package in PACKAGES if package.metric == metric]
        assert names[0] == tables.OURS
        assert len(set(names)) == len(names) > 1
    named = {package.name for package in PACKAGES}
    assert named >= {
        *("pytorch-cka", "ckatorch", "torch-cka", "rsatoolbox", "repsim", "shesha-geometry"),
        *("scikit-learn", "plain torch", "plain CuPy"),
    }


def test_a_sample_is_spread_over_all_comparisons():
    case = Case("ablations", 20, 100, cells=100)
    assert jobs.sample(case, 2) == [0, 50]
    assert jobs.sample(case, 100) == list(range(100))
    assert Case("pairs", 9, 9, layers=5).of == len(jobs.pairs_of(Case("pairs", 9, 9, layers=5)))
    assert np.bincount(case.labels()).tolist() == [1] * 100


def cka(x, y):
    return PACKAGES[0].pair(x, y)


def dies(x, y):
    os._exit(7) if len(x) > 9 else None  # more than the first call's, which loads what is needed


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
def test_failures_are_said_and_cost_their_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PACKAGES", tuple(FAKES.values()))
    monkeypatch.setattr(jobs, "cases", lambda quick: [Case("pair", 30, 12, ("cka",))])
    monkeypatch.setattr(run, "_LIMITS", {True: (20.0, 0.1)})
    monkeypatch.setattr(run, "serve", serve_fakes)
    out = tmp_path / "peers.json"
    record = run.peers(out, quick=True)
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
    text = tables.failures(record)
    for name in ("dies", "hangs", "greedy", "wrong", "nan"):
        assert f"| {name} | cka |" in text


def serve_fakes(key, device, connection):
    """The worker's process, which looks its package up among these."""
    worker.PACKAGES = tuple(FAKES.values())
    worker.serve(key, device, connection)


def test_a_stopped_comparison_leaves_nothing_in_shared_memory():
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


class Answers:
    """A process whose package fails at the whole job, and maybe has a function for a pair."""

    def __init__(self, pair):
        self.package = dataclasses.replace(FAKES["cka"], pair=pair, all_pairs=wrong)

    def ask(self, limit, name, case, paths, by_loop=False):
        if not by_loop:
            raise run.Failed("took over 20 s")
        return {"values": [1.0]}


def test_who_fails_at_the_whole_job_gets_the_loop_that_users_write():
    case = CASES[2]
    answer = run._first(Answers(cka), case, [], 20)
    assert answer["values"] == [1.0]
    assert answer["how"]["why"] == "a loop: its function for the whole job took over 20 s"
    with pytest.raises(run.Failed, match="took over 20 s"):
        run._first(Answers(None), case, [], 20)


def test_the_first_answers_of_a_loop_are_among_those_that_are_checked():
    for cells in (2, 3, 5, 6, 97, 1000):
        case = Case("ablations", 20, 2000, cells=cells)
        assert set(jobs.sample(case, 2)) <= set(jobs.sample(case, min(cells, 4)))


def test_an_explained_difference_is_no_error():
    case, checked = Case("pair", 30, 12, ("cka",)), [0]
    answer = {"values": np.array([0.9])}
    package = dataclasses.replace(FAKES["wrong"], differs="it does otherwise")
    found = run._agreement(case, package, answer, np.array([1.0]), checked)
    assert found == {"error": pytest.approx(0.1), "status": "differs", "why": "it does otherwise"}


def row(package, seconds, calls=100, cells=100, **more):
    facts = {"job": "ablations", "n": 50, "p": 1000, "layers": 1, "cells": cells, "of": cells}
    facts |= {"package": package, "metric": "cka_debiased", "status": "ok", "centres": True}
    facts |= {"device": "cpu", "commit": "a" * 40, "date": "2026-11-27T01:11:08+0000"}
    facts |= {"seconds": seconds, "calls": calls, "memory_bytes": 2e6, "error": 1e-7}
    return facts | {"distance_error": 1e-3} | more


def test_tables_give_ratios_of_medians_and_say_what_was_sampled():
    rows = [
        row(tables.OURS, [0.01, 0.02, 0.05]),
        row("slow", [0.3, 0.5, 0.4], calls=10),  # of a tenth of the comparisons: 4 s for all
        row("lost", [], calls=2, status="failed", why="no memory"),
        row("late", [1.0], status="failed", why="took over 30 s"),
        without_times("elsewhere", status="not run", why="needs a CUDA device"),
    ]
    text = tables.ablations({"rows": rows}, "cka_debiased")
    lines = text.splitlines()
    assert lines[0].startswith("|  | C = 100 |")
    assert "| 20 ms |" in lines[2]
    assert "| 4 s * (200 x) | 2 MB | 1e-03 |" in lines[3]
    assert "| failed |" in lines[4]
    assert "| late | > 30 s |" in lines[5]  # also where its first round was in time
    assert lines[6] == "| elsewhere | not run |  |  |"


def without_times(package, **more):
    return {
        key: value
        for key, value in row(package, [], **more).items()
        if key not in ("seconds", "calls", "memory_bytes", "error", "distance_error")
    }


def test_every_row_has_the_error_of_its_job_and_its_rounds():
    rows = [
        row(tables.OURS, [0.01, 0.02]),
        row("once", [0.5], calls=10, status="wrong", why="off by 1e-07"),
        row("a loop", [1, 2], why="a loop: its function for the whole job took over 30 s"),
        without_times("elsewhere", status="not run", why="needs a CUDA device"),
        row("pairs", [0.1, 0.3], 3, job="pairs", layers=3, of=3),
    ]
    lines = tables.everything({"rows": rows}).splitlines()[2:]
    assert lines[0].endswith("| 15 ms | 10 ms to 20 ms |  | 2 MB | 1e-03 |")
    assert lines[1].endswith("| 5 s * | once | 10 of 100 | 2 MB | 1e-03, wrong |")
    assert lines[3].endswith("| elsewhere | not run |  |  |  |  |")
    assert lines[4].endswith("| 2 MB | 1e-07 |")
    failures = tables.failures({"rows": rows}).splitlines()[2:]
    assert [line.split(" | ")[2] for line in failures] == [
        "wrong: off by 1e-07",
        "a loop: its function for the whole job took over 30 s",
        "not run: needs a CUDA device",
    ]


def test_pairs_say_how_and_where():
    """On a GPU, who ran on the CPU; on a CPU nobody."""
    facts = {"job": "pairs", "layers": 3, "of": 3, "calls": 3}
    rows = [
        row(tables.OURS, [0.1], **facts, device="cuda"),
        row("numpy's", [0.3], **facts),
        row("a loop", [0.2], **facts, device="cuda", why="a loop: its function failed"),
    ]
    record = {"rows": rows, "packages": {"a loop: cka_debiased": "float32"}}
    lines = tables.pairs(record, "cka_debiased").splitlines()[2:]
    assert lines[0].startswith("| repsim_kernels | 100 ms |")
    assert lines[1].startswith("| numpy's (CPU) | 300 ms (3 x) |")
    assert lines[2].endswith("| float32; a loop: its function failed |")
    record["rows"] = [one | {"device": "cpu"} for one in rows]
    assert "(CPU)" not in tables.pairs(record, "cka_debiased")


def test_one_pair_names_the_fastest_and_the_fastest_that_centres():
    shape = {"job": "pair", "n": 50, "p": 64, "of": 1}
    rows = [
        row(tables.OURS, [0.003], 1, **shape),
        row("careful", [0.002], 1, **shape),
        row("quick", [0.001], 1, **shape | {"centres": False}),
        row("differs", [0.0001], 1, **shape | {"status": "differs", "why": "another"}),
        row("late", [0.0001], 1, **shape | {"status": "failed", "why": "took over 30 s"}),
    ]
    line = tables.one_pair({"rows": rows}, "cka_debiased").splitlines()[2]
    assert line == "| 50 x 64 | 3 ms | careful, 2 ms | 1.50 | quick, 1 ms | 3.00 | 2 MB |"
    rows.append(row("wrong", [0.0015], 1, **shape, status="wrong", why="off by 1.4e-03"))
    line = tables.one_pair({"rows": rows}, "cka_debiased").splitlines()[2]
    assert "| wrong, 1.5 ms (off by 1.4e-03) | 2.00 | quick, 1 ms | 3.00 |" in line


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
    assert machine.seconds(value) == text


def test_the_figure_is_drawn(tmp_path):
    rows = [
        row(name, [t * c], c, c)
        for name, t in ((tables.OURS, 1e-4), ("b", 1e-2))
        for c in (16, 100)
    ]
    rows += [row(tables.OURS, [p * 1e-6], 1, job="pair", n=256, p=p, of=1) for p in (64, 4096)]
    out = tmp_path / "peers.png"
    tables.figure({"rows": rows, "environment": {"device": "some CPU"}}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 10_000


def test_curves_are_hollow_where_estimated_or_not_right_and_crossed_where_failed():
    rows = [
        row(tables.OURS, [0.01], 16, 16),
        row(tables.OURS, [0.02]),
        row("sampled", [0.1], 16, 16),
        row("sampled", [0.1], 10),
        row("other", [0.2], 16, 16, status="differs", why="another"),
        row("other", [0.3], status="failed", why="took over 30 s"),
        without_times("elsewhere", status="not run", why="needs a CUDA device"),
    ]
    axes = Figure().subplots()
    tables._curves(axes, {"rows": rows}, rows, lambda one: one["cells"])
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
