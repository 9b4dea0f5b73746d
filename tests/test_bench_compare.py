"""The comparison of two networks by several methods: values, processes and tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import repsim_kernels as rk
from bench import bench_compare, doc_blocks
from bench.__main__ import app
from bench.bench_compare import METHODS, WORKLOADS, compare_networks, measure_process
from bench.common.machine import save
from bench.common.tolerances import SAME, assert_close

SIZES = bench_compare._SIZES[True]
# "wide" has one pair of layers and one method.
COMPARED = ["convolutions", "BERT"]


@pytest.fixture
def maps(request):
    if request.param == "BERT":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    workload = WORKLOADS[request.param]
    networks, loader = workload.build(SIZES[request.param])
    return {method: METHODS[method](workload, networks, loader) for method in workload.methods}


@pytest.mark.parametrize("maps", COMPARED, indirect=True)
def test_exact_methods_agree(maps):
    for method in {"exact", "extract"} & set(maps):
        np.testing.assert_allclose(maps[method], maps["hooks"], rtol=0, atol=1e-6)


def test_minibatches_agree_with_pytorch_cka():
    """In float64; in float32 the other loses digits, since it does not centre the features."""
    torch.manual_seed(0)
    workload = WORKLOADS["convolutions"]
    networks, loader = workload.build(SIZES["convolutions"])
    networks = [network.double() for network in networks]
    loader.dataset.tensors = (loader.dataset.tensors[0].double(),)
    ours, theirs, exact = (
        METHODS[method](workload, networks, loader)
        for method in ("minibatch", "pytorch-cka", "hooks")
    )
    assert ours.shape == (20, 53)
    np.testing.assert_allclose(theirs, ours.clip(0, 1), rtol=0, atol=1e-5)  # the other clips
    assert abs(ours - exact).max() > 0.1  # batches of 6 are few


def test_the_reference_is_debiased_cka():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 9, 5)) + 3
    h, k = (bench_compare._make_unbiased_gram(torch.from_numpy(a)) for a in (x, x + y))
    want = rk.cka(x, x + y, debiased=True, backend="reference")
    assert_close((h * k).sum() / (h.norm() * k.norm()), want, SAME)


def test_each_measurement_has_a_process(monkeypatch, capsys):
    """What this process has set is not seen there."""
    monkeypatch.setattr(bench_compare, "WORKLOADS", {"wide": WORKLOADS["wide"]})
    monkeypatch.setattr(bench_compare, "_THREADS", (1,))
    monkeypatch.setattr(bench_compare, "METHODS", {})
    (row,) = compare_networks(None, quick=True)["rows"]
    assert (row["workload"], row["method"], row["threads"]) == ("wide", "exact", 1)
    assert row["seconds"][0] > 0
    assert row["memory_bytes"][0] >= 0
    assert capsys.readouterr().out.startswith("wide | threads=1 | `compare` | ")


@pytest.mark.slow
def test_every_method_runs_on_every_workload_at_small_sizes(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # its threads share a core with other tests
    done = CliRunner().invoke(app, ["networks", "--quick"])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ")[:3] for line in done.stdout.splitlines()]
    assert rows == [
        [name, "threads=2", bench_compare._METHODS[method]]
        for name, workload in WORKLOADS.items()
        for method in workload.methods
    ]


def test_memory_is_counted_above_networks_and_stimuli(monkeypatch):
    """A method that holds 64 MB is charged for them, and the stimuli of 30 MB are not."""
    sizes = {"n": 100, "side": 160, "channels": 1, "batch": 10}
    used = {4: 1000, 100: 16_000_000}  # by the number of stimuli; the first is not measured

    def hold(_workload, _networks, loader):
        n = len(loader.dataset)
        return np.ones(used[n], np.float32)

    monkeypatch.setitem(METHODS, "exact", hold)
    threads = torch.get_num_threads()
    try:
        facts, values = measure_process("wide", "exact", sizes, 1)
    finally:
        torch.set_num_threads(threads)
    assert len(values) == used[100]
    assert 60e6 < facts["memory_bytes"] < 90e6


def make_record(seconds, memory):
    """Make a record of times and bytes by method; two threads need half the time."""
    rows = [
        {
            "workload": name,
            "method": method,
            "threads": threads,
            "seconds": [9.0, seconds[method] / threads, 0.1],
            "memory_bytes": [memory[method]] * 3,
            "error": 0.03,
        }
        for name, workload in WORKLOADS.items()
        for threads in (1, 2)
        for method in workload.methods
    ]
    environment = {"device": "a CPU", "torch": "2", "date": "2026-11-27", "commit": "abc"}
    sizes = bench_compare._SIZES[False]
    return {"environment": environment, "quick": False, "sizes": sizes, "rows": rows}


SECONDS = {"exact": 6.0, "minibatch": 3.0, "extract": 7.0, "pytorch-cka": 4.0, "hooks": 8.0}
MEMORY = dict.fromkeys(SECONDS, 2e8) | {"exact": 2.2e8, "hooks": 2.4e9}


def test_tables_show_medians():
    record = make_record(SECONDS, MEMORY)
    aims = bench_compare.tabulate_aims(record).splitlines()
    assert "| `compare`, 1 thread: memory / pytorch-cka's | at most 1.2 | 1.10 |" in aims
    assert "| `compare`, 2 threads: time / pytorch-cka's | at most 2.0 | 1.50 |" in aims
    minibatch = '`compare`, `estimator="minibatch"`, 1 thread: time / pytorch-cka\'s'
    assert f"| {minibatch} | at most 1.0 | 0.75 |" in aims
    assert "| n = 2,000, p = 200,000: memory | under 1 GB | 220 MB |" in aims
    table = bench_compare.tabulate(record)
    assert "**ResNet-18 x ResNet-50, 20 x 53 convolutions, 300 images of 64 x 64**" in table
    assert "| pytorch-cka, `compute_cka` | 4 s | 2 s | 200 MB | 200 MB | 3e-02 |" in table
    assert "| hooks that keep all features; float64 | 8 s | 4 s | 2.40 GB | 2.40 GB | " in table


def test_pages_show_no_small_sizes(tmp_path):
    record = make_record(SECONDS, MEMORY)
    assert doc_blocks.render_networks(tmp_path) == "Not measured yet."
    save(tmp_path / "networks-rehearsal.json", record | {"quick": True})
    assert doc_blocks.render_networks(tmp_path) == "Not measured yet."
    save(tmp_path / "networks-cpu.json", record)
    text = doc_blocks.render_networks(tmp_path)
    assert text.startswith("On a CPU, torch 2, 2026-11-27; medians.")
    assert text.endswith(bench_compare.tabulate(record))
