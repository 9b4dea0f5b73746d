"""The study in the GPU report: all stages are timed, and the extrapolation follows its rules."""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from bench.gpu_report import run, study
from bench.gpu_report.study import RULES, extrapolate

STAGES = ("cells", "metrics", "suffix", "paper", "ridge")
TOGETHER = ("prefix", "cells", "metrics", "suffix", "paper")


def rehearse(seconds=600):
    sent = []
    study.time_networks(
        lambda networks: sent.append(json.dumps(networks)), "cpu", True, time.time() + seconds
    )
    (network,) = json.loads(sent[-1])
    return network


def extrapolate_stage(network, stage):
    """Extrapolate a stage to all layers and classes with NumPy."""
    key = "tail_flops" if stage == "suffix" else "neurons"
    known = sorted((layer[key], layer["stages"][stage]["seconds"]) for layer in network["sample"])
    sizes, seconds = np.array(known).T
    layers = np.array([layer[key] for layer in network["layers"]], dtype=float)
    each = np.interp(layers, sizes, seconds) * np.maximum(1, layers / sizes[-1])
    if stage == "paper":
        each *= np.array([layer["draws"] for layer in network["layers"]]) / network["draws"]
    return network["targets"] * each.sum()


@pytest.fixture(autouse=True, scope="module")
def restore_settings():
    """Restore the process settings that timing the study changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def network():
    return rehearse()


def test_every_stage_is_timed(network):
    assert network["failed"] == []
    assert len(network["layers"]) == 7
    assert (network["targets"], network["cells"], network["stimuli"]) == (4, 16, 32)
    assert (network["images"], network["draws"]) == (32, 8)
    assert network["prefix"]["seconds"] > 0
    assert [layer["layer"] for layer in network["sample"]] == ["features.11", "classifier.5"]
    for layer in network["sample"]:
        assert {key: layer[key] for key in layer if key != "stages"} in network["layers"]
        assert set(layer["stages"]) == set(STAGES)
        for stage in layer["stages"].values():
            assert stage["seconds"] > 0
            assert stage["first_seconds"] > 0


def test_the_extrapolation_follows_its_rules(network):
    result = extrapolate(network)
    prefix = network["prefix"]["seconds"] * network["passes"]
    want = {"prefix": prefix} | {stage: extrapolate_stage(network, stage) for stage in STAGES}
    assert result["extrapolated"] == pytest.approx(want)
    assert result["seconds"] == pytest.approx(sum(want[stage] for stage in TOGETHER))


def make_network():
    """Return a record in which three of four layers were timed."""

    def layer(name, neurons, flops, draws):
        return {"layer": name, "neurons": neurons, "tail_flops": flops, "draws": draws}

    layers = [layer("a", 900, 50, 9), layer("b", 100, 40, 2), layer("c", 300, 10, 3)]
    layers.append(layer("d", 500, 20, 5))
    times = {"a": 9.0, "b": 2.0, "c": 4.0}
    sample = [
        one | {"stages": {stage: {"seconds": times[one["layer"]]} for stage in STAGES}}
        for one in layers
        if one["layer"] in times
    ]
    return {
        "layers": layers,
        "sample": sample,
        "prefix": {"seconds": 6.0},
        "draws": 2,
        "passes": 2,
        "targets": 5,
    }


def test_layers_between_the_sampled_ones():
    """Layer d has 500 neurons, a third of the way from c (4 s) to a (9 s)."""
    seconds = extrapolate(make_network())["extrapolated"]
    assert seconds["prefix"] == 6.0 * 2
    d = 4 + 5 / 3
    assert seconds["cells"] == pytest.approx(5 * (9 + 2 + 4 + d))
    # By FLOPs it is a third of the way from c (4 s) to b (2 s).
    assert seconds["suffix"] == pytest.approx(5 * (9 + 2 + 4 + (4 - 2 / 3)))
    assert seconds["paper"] == pytest.approx(5 / 2 * (9 * 9 + 2 * 2 + 4 * 3 + d * 5))


def test_layers_outside_the_sampled_range():
    """Proportional above the largest, constant below the smallest."""
    network = make_network()
    network["sample"] = [layer for layer in network["sample"] if layer["layer"] == "c"]
    result = extrapolate(network)
    assert result["extrapolated"]["cells"] == pytest.approx(5 * (4 * 3 + 4 + 4 + 4 * 5 / 3))
    assert result["extrapolated"]["cells"] == pytest.approx(extrapolate_stage(network, "cells"))
    assert result["seconds"] == pytest.approx(
        sum(result["extrapolated"][stage] for stage in TOGETHER)
    )


def test_there_is_no_total_if_a_stage_was_not_timed():
    network = make_network()
    for layer in network["sample"]:
        del layer["stages"]["suffix"]
    result = extrapolate(network)
    assert result["extrapolated"]["suffix"] is None
    assert result["extrapolated"]["cells"] > 0
    assert "seconds" not in result
    assert extrapolate({"name": "not started"})["extrapolated"]["prefix"] is None


def test_the_first_call_counts_if_it_is_the_only_one():
    network = make_network()
    stages = [stage for layer in network["sample"] for stage in layer["stages"].values()]
    for stage in (network["prefix"], *stages):
        stage["first_seconds"] = stage.pop("seconds")
    assert extrapolate(network) == extrapolate(make_network())


def test_a_failed_stage_is_recorded_and_the_other_layers_continue(monkeypatch):
    calls = []
    probe = rk.probe_paper

    def fails_once(*arguments, **options):
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("a broken kernel")
        return probe(*arguments, **options)

    monkeypatch.setattr(rk, "probe_paper", fails_once)
    network = rehearse()
    assert network["failed"] == ["features.11, paper: RuntimeError: a broken kernel"]
    broken, complete = (layer["stages"] for layer in network["sample"])
    assert set(broken) == {"cells", "metrics", "ridge"}
    assert set(complete) == set(STAGES)
    assert set(complete["paper"]) == {"first_seconds", "seconds"}
    assert extrapolate(network)["seconds"] > 0  # from the complete layer
    assert rk.probe_paper is fails_once  # the clock's wrapper is removed


def test_a_study_that_cannot_be_imported_gives_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.gpu_report.study", None)
    monkeypatch.setattr(run, "measure_peers", lambda *_: {"rows": []})
    report = run.measure_gpu(tmp_path / "report.json", "cpu", True, lambda quick: [])
    assert "bench.gpu_report.study" in report["study"]["why"]
    assert "study FAILED" in report["verdict"]


def test_a_late_study_starts_no_stage():
    assert rehearse(seconds=0)["failed"] == ["TimeoutError: no time remained"]


def dies(send, device, quick, end):
    """Die after one network was timed."""
    send([make_network(), {"name": "b", "failed": []}])
    os._exit(7)


def test_measurements_before_a_crash_are_extrapolated(monkeypatch):
    monkeypatch.setattr(study, "time_networks", dies)
    saved = []
    result = study.measure_study({}, lambda: saved.append(0), "cpu", True, time.time() + 600)
    assert result["why"] == "its process ended with exit code 7"
    assert result["networks"][0]["seconds"] > 0
    assert "seconds" not in result["networks"][1]
    assert "seconds" not in result
    assert result["rules"] == RULES
    assert saved
