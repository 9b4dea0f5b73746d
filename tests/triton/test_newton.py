"""Device functions of the logistic kernel."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from repsim_kernels.kernels.triton._newton import round_to_tf32


@triton.jit
def _tf32_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, round_to_tf32(tl.load(x_ptr + i)))


def test_round_to_tf32(device):
    rng = np.random.default_rng(15)
    x = (rng.normal(size=256) * 10.0 ** rng.integers(-30, 30, 256)).astype(np.float32)
    x[:4] = 0, -1, 1 + 2**-11 + 2**-23, 1 + 2**-11 - 2**-23
    y = torch.empty(256, device=device)
    _tf32_kernel[(1,)](torch.from_numpy(x).to(device), y, N=256)
    fraction, exponent = np.frexp(x.astype(np.float64))
    expected = np.ldexp(np.round(fraction * 2**11), exponent - 11)
    np.testing.assert_array_equal(y.cpu().numpy(), expected)
