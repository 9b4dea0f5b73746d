"""Linear predictivity for a pair of layers."""

from __future__ import annotations

import pytest
import torch

from bench.common.inputs import (
    check_distances,
    count_bytes,
    get_precision,
    make_pair,
    make_reference,
)
from bench.conftest import Timer

N, P = 500, 2_000  # the definition computes P x P weights per fold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_predictivity(timed: Timer, dtype: torch.dtype) -> None:
    timed(
        "linear_predictivity",
        make_pair(N, P, dtype),
        oracle=make_reference("linear_predictivity"),
        check=check_distances("linear_predictivity", dtype),
        shape={"n": N, "p": P},
        dtype=dtype,
        bytes=2 * count_bytes(N, P, dtype),
        operations={get_precision("linear_predictivity", dtype): 2 * N * (N + 1) * P},
    )
