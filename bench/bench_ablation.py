"""Every ablation of one representation: ours against a loop over ablated copies.

Run all, in one process, with ``make bench``; the tables' ratios within a group are the result.
Answers are compared before anything is timed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cka import cka_from_features

import repsim_kernels as rk

PAPER = ("cka", "procrustes", "pwcca", "cca", "cca_squared")


def activations(n: int, p: int) -> torch.Tensor:
    """Rectified activations of n stimuli with 10 directions in common, (n, p) float32."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((n, 10)) @ rng.standard_normal((10, p))
    x = np.maximum(shared / 3 + rng.standard_normal((n, p)), 0)
    return torch.from_numpy(x.astype(np.float32))


def cells(p: int, n_cells: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.arange(p) % n_cells)


def peer_loop(x: torch.Tensor, labels: torch.Tensor, some: list[int]) -> torch.Tensor:
    """What users of pytorch-cka write: a copy and two Grams for each ablation."""
    return torch.stack([1 - cka_from_features(x, x * (labels != c)).squeeze() for c in some])


@pytest.fixture(scope="module")
def first_layer():
    """AlexNet's first layer at 224 pixels, the 50 images of a class."""
    return activations(50, 193_600)


@pytest.mark.benchmark(group="debiased CKA of all cells, n = 50, p = 193,600")
@pytest.mark.parametrize("n_cells", [100, 1000])
def test_debiased_cka(benchmark, first_layer, n_cells):
    x, labels = first_layer, cells(first_layer.shape[1], n_cells)

    def run():
        return rk.ablation_distances(x, labels, metrics=["cka_debiased"])["cka_debiased"]

    some = [0, n_cells // 2]
    peer = peer_loop(x.double(), torch.from_numpy(labels), some)
    torch.testing.assert_close(run()[some], peer, rtol=1e-6, atol=1e-12)
    benchmark(run)


@pytest.mark.benchmark(group="debiased CKA of all cells, n = 50, p = 193,600")
def test_debiased_cka_peer_loop(benchmark, first_layer):
    """pytorch-cka's cka_from_features over 100 ablated copies, float32 as its users do."""
    labels = torch.from_numpy(cells(first_layer.shape[1], 100))
    benchmark.pedantic(peer_loop, (first_layer, labels, list(range(100))), rounds=3)


@pytest.mark.benchmark(group="the paper's five metrics of 16 cells, n = 500, p = 100,352")
def test_paper_metrics(benchmark):
    """ResNet50's last stage at 224 pixels."""
    x = activations(500, 100_352)
    labels = cells(x.shape[1], 16)

    def run():
        return rk.ablation_distances(x, labels, metrics=PAPER)

    got = run()
    ablated = x * torch.from_numpy(labels != 3)
    want = {
        "cka": 1 - rk.cka(x, ablated),
        "procrustes": rk.procrustes_distance(x, ablated),
        "cca": 1 - rk.cca(x, ablated, ridge=0.1),
        "cca_squared": 1 - rk.cca(x, ablated, ridge=0.1, squared=True),
        "pwcca": 1 - rk.pwcca(x, ablated, ridge=0.1),
    }
    for name, value in want.items():
        torch.testing.assert_close(got[name][3], value, rtol=1e-6, atol=1e-12)
    benchmark.extra_info["operations"] = 2 * (1 + 16) * 500**2 * x.shape[1]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
