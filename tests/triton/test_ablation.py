"""Distances and decodability of ablations with Triton kernels reading the activations."""

from __future__ import annotations

import numpy as np
import torch
from _draw import labels, representations
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, assert_close, assert_rank_fidelity

inputs = representations(
    st.integers(5, 14), st.integers(20, 60), ("gaussian", "relu", "large mean"), ("float32",)
)


def list_kernels(launches):
    return [launch["kernel"] for launch in launches]


@settings(max_examples=8)
@given(st.data())
def test_distances(device, data):
    x = data.draw(inputs)
    cells, _ = data.draw(labels(x.p, 4))
    cells[:2] = -1  # no cell holds all neurons
    got = rk.ablation_distances(x.torch().to(device), cells, backend="triton")
    want = rk.ablation_distances(x.values(), cells, backend="torch")
    for name, values in want.items():
        assert_close(got[name], values, DISTANCE["float32"])
        assert_rank_fidelity(got[name], values, DISTANCE["float32"])
    empty = [c for c in range(cells.max() + 1) if not (cells == c).any()]
    assert (got["cka"][empty] == 0).all()


def test_a_cell_that_hides_the_rest_is_compared_in_float64(device):
    """Float32 Grams of the whole have no digits of neurons with 1e-8 of the variance."""
    x = np.random.default_rng(0).standard_normal((12, 50)).astype(np.float32)
    x[:, :2] *= 1e4
    cells = np.where(np.arange(50) < 2, 0, -1)
    metrics = ["procrustes", "cca", "cca_squared", "svcca"]
    got = rk.ablation_distances(
        torch.from_numpy(x).to(device), cells, metrics=metrics, backend="triton"
    )
    want = rk.ablation_distances(x, cells, metrics=metrics, backend="reference")
    for name, values in want.items():
        np.testing.assert_allclose(got[name].cpu(), values, rtol=1e-12, atol=1e-12)


def test_started_kernels(device, launches):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(device).mT
    make = ["_reach_kernel", "_plan_kernel", "_write_kernel"]
    multiply = ["_gram_kernel", "_sum_kernel"]
    rk.ablation_distances(x, np.arange(40) % 3, metrics=["cka"], backend="triton")
    assert list_kernels(launches) == [*make, *multiply, "_cosine_distance_kernel"]
    launches.clear()
    rk.ablation_distances(x, np.arange(40) % 3, metrics=["pwcca"], backend="triton")
    weigh = ["_directions_kernel", "_one_plane_weights_kernel"]
    assert list_kernels(launches) == [*make, *multiply, *weigh]


def test_kernels_are_the_default_only_on_a_gpu(device, launches):
    x = torch.randn(6, 30, generator=torch.Generator().manual_seed(2)).to(device)
    rk.cell_grams(x, np.arange(30) % 2)
    rk.selectivity_grid(x, [0, 0, 0, 1, 1, 1], 1)
    assert bool(launches) == (device.type == "cuda")
    before = len(launches)
    rk.cell_grams(x.double(), np.arange(30) % 2)
    assert len(launches) == before


def test_fewer_neurons_than_stimuli_use_float64(device, launches):
    """Their Gram is singular, and float32 would lose its rank."""
    x = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    cells = np.arange(9) % 3
    got = rk.ablation_distances(x.to(device), cells, metrics=["procrustes"], backend="triton")
    assert launches == []
    want = rk.ablation_distances(x.double(), cells, metrics=["procrustes"])
    assert_close(got["procrustes"], want["procrustes"], DISTANCE["float64"])
    dead = torch.cat([x, torch.ones(20, 30)], 1).to(device)
    cells = np.append(cells, [0] * 30)
    got = rk.ablation_distances(dead, cells, metrics=["procrustes"], backend="triton")
    assert_close(got["procrustes"], want["procrustes"], DISTANCE["float64"])


@settings(max_examples=6)
@given(st.data())
def test_decodability(device, data):
    x = data.draw(inputs)
    cells, _ = data.draw(labels(x.p, 4))
    y = np.arange(x.n) % 2
    got = rk.ablation_decodability(x.torch().to(device), cells, y, backend="triton")
    want = rk.ablation_decodability(x.values(), cells, y, backend="torch")
    for name in ("refit", "frozen"):
        # A held-out prediction within rounding of the boundary may fall on either side.
        assert (np.abs(np.asarray(got[name].cpu()) - want[name]) <= 1 / x.n + 1e-12).all()
    assert got["intact"] == want["intact"]


@settings(max_examples=4)
@given(st.data())
def test_margins_with_folds_and_targets(device, data):
    """Outputs have no ties, so rounding in the kernels' Grams changes them only slightly."""
    x = data.draw(inputs)
    cells, _ = data.draw(labels(x.p, 4))
    options = {"target": [0, 1], "folds": 2, "score": ["margin", "r2"], "ridge": 0.5}
    y = np.arange(x.n) % 2
    got = rk.ablation_decodability(x.torch().to(device), cells, y, backend="triton", **options)
    want = rk.ablation_decodability(x.values(), cells, y, backend="reference", **options)
    for score in options["score"]:
        for name, value in want[score].items():
            near = got[score][name].cpu().numpy()
            np.testing.assert_allclose(near, value, rtol=1e-3, atol=1e-3, err_msg=name)
