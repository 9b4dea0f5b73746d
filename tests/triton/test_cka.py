"""CKA of ablations by one kernel, against PyTorch's operations and exact distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repsim_kernels.kernels.torch import cka
from repsim_kernels.kernels.triton import cka as kernels


@given(
    seed=st.integers(0, 2**32 - 1),
    cells=st.integers(1, 5),
    k=st.sampled_from([1, 3, 1000, 2048, 5000]),
    scale=st.sampled_from([1e-140, 1.0, 1e140]),
    size=st.sampled_from([1e-8, 1e-3, 0.5]),
)
def test_distances_are_those_of_pytorch(device, seed, cells, k, scale, size):
    rng = np.random.default_rng(seed)
    whole = torch.from_numpy(rng.standard_normal(k) * scale)
    noise = torch.from_numpy(rng.standard_normal((cells, k)))
    m = size * (0.5 * whole + scale * noise * torch.rand(cells, 1, dtype=torch.float64))
    m[0] *= rng.integers(2)  # perhaps nothing is removed
    padded = torch.full((cells, k + 3), torch.nan, dtype=torch.float64)
    padded[:, :k] = m
    rows = padded.to(device)[:, :k]
    got = kernels.cosine_distance(rows, whole.to(device), False, 0.0, 0.0).cpu()
    want = cka.cosine_distance(m, whole, False, 0.0, 0.0)
    if k == 1:  # a multiple of the whole: rounding of a distance of 0
        assert (got.nan_to_num() < 1e-20).all()
        return
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0, equal_nan=True)
    if m[0].abs().max() == 0:
        assert got[0] == 0


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1.0, 1e30, 1e140])
def test_norms_at_their_floor_give_nan(device, scale):
    whole = torch.tensor([3.0, 4.0], dtype=torch.float64, device=device) * scale
    m = 0.4 * whole[None]  # the remainder's norm is 3
    for floors, is_nan in (
        ((4.9 * scale, 0.0), False),
        ((5.1 * scale, 0.0), True),
        ((0.0, 2.9 * scale), False),
        ((0.0, 3.1 * scale), True),
    ):
        assert bool(kernels.cosine_distance(m, whole, False, *floors).isnan()) == is_nan
