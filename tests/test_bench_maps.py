"""Maps of trained networks: estimates from batches, noise, and what the pages say of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import repsim_kernels as rk
from bench import maps
from bench.common.machine import RESULTS, load
from bench.common.tolerances import SAME, assert_close


def centre_gram(x):
    x = x - x.mean(0)
    return x @ x.T


@given(st.integers(1, 3), SEEDS)
def test_biased_estimates_average_hsic_over_batches(count, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 6 * count, 4)) + 2
    grams = [torch.from_numpy(a @ a.T)[None] for a in (x, y)]
    batches = torch.from_numpy(rng.permutation(len(x))).split(6)
    hsic = np.zeros(3)
    for i in batches:
        k, m = (centre_gram(a[i.numpy()]) for a in (x, y))
        hsic += (k * m).sum(), (k * k).sum(), (m * m).sum()
    want = hsic[0] / np.sqrt(hsic[1] * hsic[2])
    assert_close(maps.estimate_biased(grams, batches)[0, 0], want, SAME)


@pytest.mark.filterwarnings("ignore::repsim_kernels.DegenerateWarning")
def test_a_batch_of_all_stimuli_has_biased_cka():
    x, y = np.random.default_rng(0).standard_normal((2, 9, 20))
    grams = [torch.from_numpy(a @ a.T)[None] for a in (x, y)]
    got = maps.estimate_biased(grams, [torch.arange(9)])
    assert_close(got[0, 0], rk.cka(x, y, precision="float64"), SAME)


def test_biased_cka_of_noise_is_what_chance_predicts():
    row = maps._measure_noise(300, draws=5)
    n = maps._NOISE_N
    assert row["biased"] == pytest.approx(300 / (n + 300), abs=0.02)
    assert abs(row["debiased"]) < 0.03


def test_the_committed_map_is_that_of_the_networks():
    """A few layers of each, from the same images."""
    (path,) = RESULTS.glob("maps-*.json")
    record = load(path)
    networks = [maps.load(name) for name in record["networks"]]
    facts = record["maps"][0]
    rows, columns = facts["rows"][::20], facts["columns"][::20]
    loader = maps.load_demo().images.split(100)
    m = rk.compare(*networks, loader, layers=rows, layers_b=columns)
    want = np.array(facts["values"])[::20, ::20]
    np.testing.assert_allclose(m.values, want, rtol=0, atol=2e-5)  # written with 5 digits


def test_the_committed_errors_are_those_of_the_page():
    """Random batches have the smallest errors if debiased, and larger ones have smaller errors."""
    (path,) = RESULTS.glob("maps-*.json")
    record = load(path)
    errors = {
        name: [row["mean"] for row in record["batches"] if row["estimate"] == name]
        for name in maps._ESTIMATES
    }
    for name in ("debiased", "biased"):
        assert errors[name] == sorted(errors[name], reverse=True)
    for name in ("biased", "sorted"):
        assert all(a < b for a, b in zip(errors["debiased"], errors[name], strict=True))
    assert errors["pytorch-cka"] == pytest.approx(errors["debiased"], rel=1e-3)


@pytest.mark.parametrize("network", [0, 1])
def test_stages_are_labelled_at_their_first_layer(network):
    (path,) = RESULTS.glob("maps-*.json")
    m = load(path)["maps"][0]
    layers = m["rows"] if network == 0 else m["columns"]
    axis = Figure().add_subplot().xaxis
    maps._label_stages(axis, layers, network)
    ticks = [int(tick) for tick in axis.get_ticklocs()]
    labels = [label.get_text() for label in axis.get_ticklabels()]
    assert labels == maps._STAGES[network]
    for tick, stage in zip(ticks, labels, strict=True):
        assert layers[tick].startswith(f"{stage}.")
        assert not layers[tick - 1].startswith(f"{stage}.")
