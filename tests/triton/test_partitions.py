"""Several partitions and memberships on the kernels' route, which measures partitions together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, assert_close

RNG = np.random.default_rng(0)
X = torch.from_numpy(np.maximum(RNG.standard_normal((12, 60)), 0).astype(np.float32))
PARTITIONS = RNG.integers(-1, 3, (3, 60))
PARTITIONS[1, :40] = 0  # a cell with more than half of the energy
PARTITIONS[2] = 0  # a cell of all neurons, and two empty ones
LABELS = np.arange(12) % 3


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("memory", [None, 1])
def test_distances_of_partitions(device, known, memory):
    x = X.to(device)
    grams = rk.cell_grams(x, PARTITIONS, backend="triton") if known else None
    options = {"grams": grams, "memory": memory, "info": True, "backend": "triton"}
    got, info = rk.ablation_distances(x, PARTITIONS, **options)
    want = rk.ablation_distances(X.double(), PARTITIONS)
    for name, values in want.items():
        assert got[name].shape == info[name].route.shape == (3, 3)
        assert_close(got[name], values, DISTANCE["float32"], nan=True)


def test_a_partition_does_not_depend_on_the_others(device):
    x = X.to(device)
    both, alone = (
        rk.ablation_distances(x, cells, metrics=["cka", "procrustes"], backend="triton")
        for cells in (PARTITIONS[:2], PARTITIONS[:1])
    )
    for name, values in alone.items():
        assert_close(both[name][:1], values, DISTANCE["float64"])


def test_partitions_of_few_varying_neurons_use_float64(device):
    x = X.clone()
    x[:, 9:] = 1
    cells = np.where(np.arange(60) < 9, PARTITIONS, -1)
    want = rk.ablation_distances(x.double(), cells, metrics=["cka", "procrustes"])
    for grams in (None, rk.cell_grams(x.to(device), cells, backend="triton")):
        got = rk.ablation_distances(
            x.to(device), cells, metrics=["cka", "procrustes"], grams=grams, backend="triton"
        )
        for name, values in want.items():
            assert_close(got[name], values, DISTANCE["float64"], nan=True)


def test_memberships(device):
    cells = RNG.random((4, 60)) < 0.2
    cells[2] = True
    got = rk.ablation_distances(X.to(device), cells, backend="triton")
    want = rk.ablation_distances(X.double(), cells)
    for name, values in want.items():
        assert_close(got[name], values, DISTANCE["float32"], nan=True)


@pytest.mark.parametrize("target", [None, 1, [2, 0, 1]])
@pytest.mark.parametrize("options", [{}, {"folds": 2}, {"folds": 2, "probe": "logistic"}])
def test_decodability_of_partitions(device, target, options):
    options = options | {"target": target, "score": "margin"}
    got = rk.ablation_decodability(X.to(device), PARTITIONS, LABELS, backend="triton", **options)
    want = rk.ablation_decodability(
        X.double().numpy(), PARTITIONS, LABELS, backend="reference", **options
    )
    for kind, values in want.items():
        assert got[kind].shape == values.shape
        np.testing.assert_allclose(
            got[kind].cpu().numpy(), values, rtol=1e-3, atol=1e-3, err_msg=kind
        )
