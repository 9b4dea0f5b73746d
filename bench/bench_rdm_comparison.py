"""Comparison of many RDMs, as of the centres of a searchlight, with a few models.

The operations are those of the products with the models alone: for ranks and inversions there is no
fixed number. "kendall" and "whitened" get fewer RDMs, since their definitions take N² operations.
"""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from bench.common.inputs import count_bytes
from bench.conftest import Timer

N = 32 * 31 // 2  # pairs of 32 conditions
MODELS = 3
CASES = {
    "spearman": 5_000,
    "pearson": 5_000,
    "cosine": 5_000,
    "rho-a": 5_000,
    "kendall": 500,
    "whitened": 100,
}


@pytest.mark.parametrize(("method", "n_rdms"), CASES.items())
def test_compare_rdms(timed: Timer, method: str, n_rdms: int) -> None:
    def make(g: Generator) -> tuple[Tensor, Tensor]:
        rdms = torch.rand(n_rdms, N, generator=g, device=g.device)
        models = torch.randint(3, (MODELS, N), generator=g, device=g.device).float()
        return rdms, models

    timed(
        "compare_rdms",
        make,
        options={"method": method},
        label=method,
        shape={"a": n_rdms, "b": MODELS, "N": N},
        bytes=count_bytes(n_rdms + MODELS, N, torch.float32),
        operations=None if method == "kendall" else {"float64": 2 * n_rdms * MODELS * N},
    )
