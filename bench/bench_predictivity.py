"""Linear predictivity of a pair of layers."""

from __future__ import annotations

import pytest
import torch

from bench.common.inputs import as_distances, pair, products, reference, size

N, P = 500, 2_000  # the definition makes P x P weights for each fold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_predictivity(timed, dtype):
    timed(
        "linear_predictivity",
        pair(N, P, dtype),
        oracle=reference("linear_predictivity"),
        check=as_distances("linear_predictivity", dtype),
        shape={"n": N, "p": P},
        dtype=dtype,
        bytes=2 * size(N, P, dtype),
        operations={products("linear_predictivity", dtype): 2 * N * (N + 1) * P},
    )
