"""The report's study: every stage is timed, and its extrapolation is what its rules say."""

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


def rehearsed(seconds=600):
    sent = []
    study.time_networks(
        lambda networks: sent.append(json.dumps(networks)), "cpu", True, time.time() + seconds
    )
    (network,) = json.loads(sent[-1])
    return network


def by_hand(network, stage):
    """All layers and classes from the sampled ones, with NumPy's interpolation."""
    key = "tail_flops" if stage == "suffix" else "neurons"
    known = sorted((layer[key], layer["stages"][stage]["seconds"]) for layer in network["sample"])
    at, seconds = np.array(known).T
    layers = np.array([layer[key] for layer in network["layers"]], dtype=float)
    each = np.interp(layers, at, seconds) * np.maximum(1, layers / at[-1])
    if stage == "paper":
        each *= np.array([layer["draws"] for layer in network["layers"]]) / network["draws"]
    return network["targets"] * each.sum()


@pytest.fixture(autouse=True, scope="module")
def settings():
    """What a process of the study's own sets for itself."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def network():
    return rehearsed()


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
        for found in layer["stages"].values():
            assert found["seconds"] > 0
            assert found["first_seconds"] > 0


def test_the_extrapolation_is_what_its_rules_say(network):
    found = extrapolate(network)
    prefix = network["prefix"]["seconds"] * network["passes"]
    want = {"prefix": prefix} | {stage: by_hand(network, stage) for stage in STAGES}
    assert found["extrapolated"] == pytest.approx(want)
    assert found["seconds"] == pytest.approx(sum(want[stage] for stage in TOGETHER))


def made_up():
    """Three of four layers were timed, one stage of them not everywhere."""

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


def test_layers_between_those_of_the_sample():
    """By hand: d, of 500 neurons, is a third of the way from c's 4 s to a's 9 s."""
    found = extrapolate(made_up())["extrapolated"]
    assert found["prefix"] == 6.0 * 2
    d = 4 + 5 / 3
    assert found["cells"] == pytest.approx(5 * (9 + 2 + 4 + d))
    # By FLOPs it is a third of the way from c's 4 s to b's 2 s.
    assert found["suffix"] == pytest.approx(5 * (9 + 2 + 4 + (4 - 2 / 3)))
    assert found["paper"] == pytest.approx(5 / 2 * (9 * 9 + 2 * 2 + 4 * 3 + d * 5))


def test_layers_beyond_those_of_the_sample():
    """Above the largest in proportion, and under the smallest as for it."""
    whole = made_up()
    whole["sample"] = [one for one in whole["sample"] if one["layer"] == "c"]
    found = extrapolate(whole)
    assert found["extrapolated"]["cells"] == pytest.approx(5 * (4 * 3 + 4 + 4 + 4 * 5 / 3))
    assert found["extrapolated"]["cells"] == pytest.approx(by_hand(whole, "cells"))
    assert found["seconds"] == pytest.approx(
        sum(found["extrapolated"][stage] for stage in TOGETHER)
    )


def test_what_was_not_timed_has_no_sum():
    whole = made_up()
    for one in whole["sample"]:
        del one["stages"]["suffix"]
    found = extrapolate(whole)
    assert found["extrapolated"]["suffix"] is None
    assert found["extrapolated"]["cells"] > 0
    assert "seconds" not in found
    assert extrapolate({"name": "not begun"})["extrapolated"]["prefix"] is None


def test_where_only_the_first_call_was_timed_it_counts():
    whole = made_up()
    for one in (whole, *whole["sample"]):
        for timed in (one["prefix"],) if one is whole else one["stages"].values():
            timed["first_seconds"] = timed.pop("seconds")
    assert extrapolate(whole) == extrapolate(made_up())


def test_a_stage_that_fails_is_recorded_and_the_other_layers_go_on(monkeypatch):
    calls = []
    probe = rk.probe_paper

    def fails_once(*arguments, **options):
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("a broken kernel")
        return probe(*arguments, **options)

    monkeypatch.setattr(rk, "probe_paper", fails_once)
    found = rehearsed()
    assert found["failed"] == ["features.11, paper: RuntimeError: a broken kernel"]
    broken, whole = (layer["stages"] for layer in found["sample"])
    assert set(broken) == {"cells", "metrics", "ridge"}
    assert set(whole) == set(STAGES)
    assert set(whole["paper"]) == {"first_seconds", "seconds"}
    assert extrapolate(found)["seconds"] > 0  # by the layer that is whole
    assert rk.probe_paper is fails_once  # and no clock's


def test_a_study_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.gpu_report.study", None)
    found = run.gpu_report(tmp_path / "report.json", "cpu", True, lambda quick: [])
    assert "bench.gpu_report.study" in found["study"]["why"]
    assert "study FAILED" in found["verdict"]


def test_a_study_that_is_late_begins_no_stage():
    assert rehearsed(seconds=0)["failed"] == ["TimeoutError: no time was left"]


def dies(send, device, quick, end):
    """One network was timed before the process was lost."""
    send([made_up(), {"name": "b", "failed": []}])
    os._exit(7)


def test_what_was_timed_before_a_crash_is_extrapolated(monkeypatch):
    monkeypatch.setattr(study, "time_networks", dies)
    kept = []
    found = study.measure_study({}, lambda: kept.append(0), "cpu", True, time.time() + 600)
    assert found["why"] == "its process ended with exit code 7"
    assert found["networks"][0]["seconds"] > 0
    assert "seconds" not in found["networks"][1]
    assert "seconds" not in found
    assert found["rules"] == RULES
    assert kept
