"""Canonical correlation of a pair of layers; no operations, since spectra have no such number."""

from __future__ import annotations

import pytest
import torch

import repsim_kernels as rk
from bench.common.inputs import as_distances, pair, reference, size

N, P = 500, 10_000
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def sizes(dtype: torch.dtype, passes: int) -> dict[str, object]:
    shape = {"n": N, "p": P}
    return {"shape": shape, "dtype": dtype, "bytes": passes * size(N, P, dtype)}


@by_dtype
@pytest.mark.parametrize("squared", [False, True], ids=["mean", "mean squared"])
def test_cca(timed, squared, dtype):
    timed(
        "cca",
        lambda x, y: rk.cca(x, y, ridge=0.1, squared=squared),
        pair(N, P, dtype),
        oracle=reference("cca", ridge=0.1, squared=squared),
        check=as_distances("cca", dtype),
        what=f"{'mean squared' if squared else 'mean'}, ridge 0.1",
        **sizes(dtype, 2),
    )


@by_dtype
def test_svcca(timed, dtype):
    timed(
        "svcca",
        rk.svcca,
        pair(N, P, dtype),
        oracle=reference("svcca"),
        check=as_distances("svcca", dtype),
        **sizes(dtype, 2),
    )


@by_dtype
def test_pwcca(timed, dtype):
    """The weights take a second pass over the first layer, in its own precision."""
    timed(
        "pwcca",
        lambda x, y: rk.pwcca(x, y, ridge=0.1),
        pair(N, P, dtype),
        oracle=reference("pwcca", ridge=0.1),
        check=as_distances("pwcca", dtype),
        what="ridge 0.1",
        **sizes(dtype, 3),
    )
