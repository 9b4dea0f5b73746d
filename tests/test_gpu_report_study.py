"""The sheet's study: every stage is timed, and its extrapolation is what its rules say."""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from bench.common.machine import load, save
from bench.gpu_report import study
from bench.gpu_report.extrapolate import RULES, extrapolate

STAGES = ("cells", "gram", "spectral", "pwcca", "metrics", "suffix", "paper", "ridge")
TOGETHER = ("prefix", "cells", "metrics", "suffix", "paper")


def rehearsed(out):
    save(out, {"study": {}})
    study.work(out, "cpu", True, time.time() + 600)
    (network,) = load(out)["study"]["networks"]
    return network


def by_hand(network, stage):
    """All layers and classes from the sampled ones, with NumPy's interpolation."""
    key = "tail_flops" if stage == "suffix" else "neurons"
    known = sorted(
        (layer[key], layer["stages"][stage]["seconds"] / layer["stages"][stage].get("draws", 1))
        for layer in network["sample"]
    )
    at, seconds = np.array(known).T
    layers = np.array([layer[key] for layer in network["layers"]], dtype=float)
    each = np.interp(layers, at, seconds) * np.maximum(1, layers / at[-1])
    if stage == "paper":
        each *= [layer["draws"] for layer in network["layers"]]
    return network["targets"] * each.sum()


@pytest.fixture(autouse=True, scope="module")
def settings():
    """What a process of the study's own sets for itself."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return rehearsed(tmp_path_factory.mktemp("study") / "report.json")


def test_every_stage_is_timed(network):
    assert network["failed"] == []
    assert len(network["layers"]) == 7
    assert (network["targets"], network["cells"], network["stimuli"]) == (4, 16, 32)
    assert network["prefix"]["images"] == 32
    assert network["prefix"]["seconds"] > 0
    (layer,) = network["sample"]
    assert {key: layer[key] for key in layer if key != "stages"} in network["layers"]
    assert set(layer["stages"]) == set(STAGES)
    for found in layer["stages"].values():
        assert found["seconds"] > 0
        assert found["first_seconds"] > 0
    assert layer["stages"]["paper"]["draws"] == 8


def test_the_extrapolation_is_what_its_rules_say(network):
    found = extrapolate(network)
    prefix = network["prefix"]["seconds"] * network["images"] / 32 * network["passes"]
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
    for one in sample:
        one["stages"]["paper"]["draws"] = 2
    return {
        "layers": layers,
        "sample": sample,
        "prefix": {"seconds": 6.0, "images": 10},
        "images": 50,
        "passes": 2,
        "targets": 5,
    }


def test_layers_between_those_of_the_sample():
    """By hand: d, of 500 neurons, is a third of the way from c's 4 s to a's 9 s."""
    found = extrapolate(made_up())["extrapolated"]
    assert found["prefix"] == 6.0 * 5 * 2
    d = 4 + 5 / 3
    assert found["gram"] == pytest.approx(5 * (9 + 2 + 4 + d))
    # By FLOPs it is a third of the way from c's 4 s to b's 2 s.
    assert found["suffix"] == pytest.approx(5 * (9 + 2 + 4 + (4 - 2 / 3)))
    assert found["paper"] == pytest.approx(5 / 2 * (9 * 9 + 2 * 2 + 4 * 3 + d * 5))


def test_layers_beyond_those_of_the_sample():
    """Above the largest in proportion, and under the smallest as for it."""
    whole = made_up()
    whole["sample"] = [one for one in whole["sample"] if one["layer"] == "c"]
    found = extrapolate(whole)
    assert found["extrapolated"]["gram"] == pytest.approx(5 * (4 * 3 + 4 + 4 + 4 * 5 / 3))
    assert found["extrapolated"]["gram"] == pytest.approx(by_hand(whole, "gram"))
    assert found["seconds"] == pytest.approx(
        sum(found["extrapolated"][stage] for stage in TOGETHER)
    )


def test_what_was_not_timed_has_no_sum():
    whole = made_up()
    for one in whole["sample"]:
        one["stages"]["suffix"] = {"why": "no time was left"}
    found = extrapolate(whole)
    assert found["extrapolated"]["suffix"] is None
    assert found["extrapolated"]["gram"] > 0
    assert "seconds" not in found
    assert extrapolate({"name": "not begun"})["extrapolated"]["prefix"] is None


def test_a_stage_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a broken kernel")

    monkeypatch.setattr(rk, "centered_gram", fails)
    found = rehearsed(tmp_path / "report.json")
    stages = found["sample"][0]["stages"]
    assert stages["gram"] == {"why": "RuntimeError: a broken kernel"}
    assert "gram failed before" in stages["spectral"]["why"]
    assert all(
        stages[stage]["seconds"] > 0 for stage in STAGES if stage not in ("gram", "spectral")
    )
    assert [why.partition(":")[0] for why in found["failed"]] == [
        "features.11, gram",
        "features.11, spectral",
    ]
    assert extrapolate(found)["seconds"] > 0  # they are parts of another stage


def test_a_study_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.gpu_report.subjects", None)
    out = tmp_path / "report.json"
    save(out, {"study": {}})
    study.work(out, "cpu", True, time.time() + 600)
    assert "bench.gpu_report.subjects" in load(out)["study"]["why"]


def test_a_study_that_is_late_begins_no_stage(tmp_path):
    out = tmp_path / "report.json"
    save(out, {"study": {}})
    study.work(out, "cpu", True, time.time())
    (network,) = load(out)["study"]["networks"]
    assert network["failed"] == ["TimeoutError: no time was left"]


def dies(out, device, quick, end):
    """One network was timed before the process was lost."""
    record = load(out)
    record["study"] = {"preset": "hayne2024", "networks": [made_up(), {"name": "b", "failed": []}]}
    save(out, record)
    os._exit(7)


def test_what_was_timed_before_a_crash_is_extrapolated(tmp_path, monkeypatch):
    out = tmp_path / "report.json"
    save(out, {})
    monkeypatch.setattr(study, "work", dies)
    study.supervised(out, "cpu", True, time.time() + 600)
    found = json.loads(out.read_text())["study"]
    assert found["why"] == "its process ended with exit code 7"
    assert found["networks"][0]["seconds"] > 0
    assert "seconds" not in found["networks"][1]
    assert "seconds" not in found
    assert found["rules"] == RULES
