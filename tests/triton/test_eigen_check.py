"""The check of eigenvectors by one kernel, against that of PyTorch's operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.triton import eigen_check

FAULTS = ["none", "vector", "value", "order", "nan", "infinity", "scale", "identity", "status"]


def solve(rng, batch, n, device):
    a = rng.standard_normal((batch, n, n)) * 10.0 ** rng.integers(-100, 100, (batch, 1, 1))
    w, v = np.linalg.eigh(a + a.swapaxes(1, 2))
    return (torch.from_numpy(x).to(device) for x in (a + a.swapaxes(1, 2), w, v))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity times zero
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    n=st.sampled_from([1, 2, 16, 17, 65]),
    fault=st.sampled_from(FAULTS),
    transposed=st.booleans(),
)
def test_the_wrong_matrix_is_found(device, seed, batch, n, fault, transposed):
    rng = np.random.default_rng(seed)
    a, w, v = solve(rng, batch, n, device)
    b, i, j = int(rng.integers(batch)), int(rng.integers(n)), int(rng.integers(n))
    if fault == "vector":
        v[b, i, j] += 1e-8
    elif fault == "value":
        w[b, j] *= 1 + 1e-8
    elif fault == "order":
        w[b], v[b] = w[b].flip(0), v[b].flip(1)
    elif fault == "nan":
        v[b, i, j] = np.nan
    elif fault == "infinity":
        w[b, -1] = np.inf
    elif fault == "scale":
        v[b] *= 1 + 1e-8
    elif fault == "identity":
        v[b] = torch.eye(n, dtype=v.dtype)
    status = None
    if fault == "status":
        status = torch.zeros(batch, dtype=torch.int32, device=device)
        status[b] = -3
    result = {"values": w, "vectors": v.mT.contiguous().mT if transposed else v}
    wrong = eigen_check.find_wrong(a, result, status)
    assert wrong.tolist() == cusolver.find_wrong(a, result, status).tolist()
    # A matrix of one row is its own eigenvalue, in any order.
    if fault == "none" or (n == 1 and fault in ("order", "identity")):
        assert not wrong.any()
    elif fault not in ("value", "vector"):  # those may be too small to matter for one entry
        assert wrong.tolist() == [k == b for k in range(batch)]


@pytest.mark.parametrize("shape", [(1, 5, 5), (2, 3, 5, 5), (5, 5)])
def test_leading_dimensions_are_kept(device, shape):
    a = torch.eye(5, dtype=torch.float64, device=device).expand(shape)
    result = {"values": torch.ones(shape[:-1], dtype=a.dtype, device=device), "vectors": a}
    assert eigen_check.find_wrong(a, result).shape == shape[:-2]
    assert not eigen_check.find_wrong(a, result).any()
