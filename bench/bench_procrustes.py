"""Orthogonal Procrustes of a pair of layers; no operations: a nuclear norm has no such number."""

from __future__ import annotations

import pytest
import torch

import repsim_kernels as rk
from bench.common.inputs import as_distances, pair, reference, size

N, P = 500, 10_000
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@by_dtype
def test_procrustes(timed, dtype):
    timed(
        "procrustes",
        rk.procrustes,
        pair(N, P, dtype),
        oracle=reference("procrustes"),
        check=as_distances("procrustes", dtype),
        shape={"n": N, "p": P},
        dtype=dtype,
        bytes=2 * size(N, P, dtype),
    )


@by_dtype
def test_procrustes_distance(timed, dtype):
    timed(
        "procrustes_distance",
        lambda x, y: rk.procrustes_distance(x, y, form="size-and-shape"),
        pair(N, P, dtype),
        oracle=reference("procrustes_distance", form="size-and-shape"),
        check=as_distances("procrustes_distance", dtype),
        what="size-and-shape",
        shape={"n": N, "p": P},
        dtype=dtype,
        bytes=2 * size(N, P, dtype),
    )
