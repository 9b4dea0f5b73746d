"""Distances between conditions, for activations and for patterns of voxels with noise."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.inputs import DTYPES, count_bytes, make_one
from bench.common.tolerances import SAME, assert_close
from bench.conftest import Timer

N, P = 200, 10_000
CONDITIONS, RUNS, VOXELS = 32, 8, 1_000
LABELS = np.tile(np.arange(CONDITIONS), RUNS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", ["euclidean", "correlation"])
def test_rdm(timed: Timer, distance: str, dtype: torch.dtype) -> None:
    timed(
        "rdm",
        make_one(N, P, dtype),
        options={"distance": distance},
        label=distance,
        shape={"n": N, "p": P},
        dtype=dtype,
        bytes=count_bytes(N, P, dtype) + 4 * N * (N - 1),
        operations={"float64": N * (N + 1) * P},
    )


def make_voxels(g: Generator, residuals: int) -> tuple[Tensor, Tensor]:
    """Draw the patterns of all conditions in all runs, and residuals with shared noise."""
    draw = partial(torch.randn, generator=g, device=g.device)
    mixing = draw(20, VOXELS)
    patterns = draw(CONDITIONS, VOXELS).repeat(RUNS, 1)
    rows = (len(LABELS), residuals)
    noise = [draw(m, 20) @ mixing / 4 + draw(m, VOXELS) for m in rows]
    return patterns + noise[0], noise[1]


def compute_crossnobis(x: Tensor, residuals: Tensor) -> np.ndarray:
    """Return crossnobis distances from the inverse of the covariance, by pairs of runs."""
    precision = LedoitWolf().fit(residuals.cpu().double().numpy()).precision_
    runs = x.cpu().double().numpy().reshape(RUNS, CONDITIONS, VOXELS)
    g = np.zeros((CONDITIONS, CONDITIONS))
    for f in range(RUNS):
        for other in range(RUNS):
            g += runs[f] @ precision @ runs[other].T if other != f else 0
    i, j = np.triu_indices(CONDITIONS, 1)
    return (g[i, i] + g[j, j] - 2 * g[i, j]) / (RUNS * (RUNS - 1) * VOXELS)


@pytest.mark.parametrize("residuals", [200, 2_000])
def test_crossnobis(timed: Timer, residuals: int) -> None:
    """With fewer residuals than voxels, and with more."""
    rows, m, p = len(LABELS), residuals, VOXELS
    if m < p:
        whitening = m * (m + 1) * p + m**3 / 3 + rows * m * (4 * p + 2 * m)
    else:
        whitening = p * (p + 1) * m + p**3 / 3 + rows * p**2
    timed(
        "rdm",
        partial(make_voxels, residuals=residuals),
        call=lambda x, r: rk.rdm(x, distance="crossnobis", labels=LABELS, noise=r),
        oracle=compute_crossnobis,
        check=partial(assert_close, tol=SAME),
        label=f"crossnobis, {residuals:,} residuals",
        shape={"n": rows, "p": p},
        bytes=count_bytes(rows + m, p, torch.float32),
        operations={"float64": round(whitening + rows * CONDITIONS * p)},
    )
