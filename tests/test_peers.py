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

import repsim_kernels as rk
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
    checked = jobs.sample(case, min(case.of, 3))
    for package in PACKAGES:
        if not run._takes_part(package, case, "cpu"):
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
    f.__name__: Package(f.__name__, "cka", "", "torch", True, "", f)
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


def test_an_explained_difference_is_no_error():
    case, checked = Case("pair", 30, 12, ("cka",)), [0]
    answer = {"values": np.array([0.9])}
    package = dataclasses.replace(FAKES["wrong"], differs="it does otherwise")
    found = run._agreement(case, package, answer, np.array([1.0]), checked)
    assert found == {"error": pytest.approx(0.1), "status": "differs", "why": "it does otherwise"}


def row(package, seconds, calls=100, cells=100, **more):
    facts = {"job": "ablations", "n": 50, "p": 1000, "layers": 1, "cells": cells, "of": cells}
    facts |= {"package": package, "metric": "cka_debiased", "status": "ok", "centres": True}
    facts |= {"seconds": seconds, "calls": calls, "memory_bytes": 2e6, "error": 1e-7}
    return facts | {"distance_error": 1e-3} | more


def test_tables_give_ratios_of_medians_and_say_what_was_sampled():
    rows = [
        row(tables.OURS, [0.01, 0.02, 0.05]),
        row("slow", [0.3, 0.5, 0.4], calls=10),  # of a tenth of the comparisons: 4 s for all
        row("lost", [], calls=2, status="failed", why="no memory"),
    ]
    text = tables.ablations({"rows": rows}, "cka_debiased")
    lines = text.splitlines()
    assert lines[0].startswith("|  | C = 100 |")
    assert "| 20 ms |" in lines[2]
    assert "| 4 s * (200 x) | 2 MB | 1e-03 |" in lines[3]
    assert "| failed |" in lines[4]


def test_one_pair_names_the_fastest_and_the_fastest_that_centres():
    shape = {"job": "pair", "n": 50, "p": 64, "of": 1}
    rows = [
        row(tables.OURS, [0.003], 1, **shape),
        row("careful", [0.002], 1, **shape),
        row("quick", [0.001], 1, **shape | {"centres": False}),
        row("wrong", [0.0001], 1, **shape | {"status": "wrong", "why": ""}),
    ]
    line = tables.one_pair({"rows": rows}, "cka_debiased").splitlines()[2]
    assert line == "| 50 x 64 | 3 ms | careful, 2 ms | 1.50 | quick, 1 ms | 3.00 | 2 MB |"


@pytest.mark.parametrize(
    ("value", "text"),
    [(123.4, "123 s"), (1.0, "1 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (2345, "2,340 s")],
)
def test_seconds(value, text):
    assert tables.seconds(value) == text


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
