"""What a program that fits a regression by Newton's method does to its neurons and its Hessian."""

import triton
import triton.language as tl


@triton.jit
def moments(x_ptrs, rows, n, width, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which neurons vary, their means, and the largest distance from one, kept normal."""
    low = tl.full((D,), float("inf"), dtype=tl.float32)
    high = tl.full((D,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((D,), dtype=tl.float64)
    for first in range(0, n, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        mask = rows[:, None] & (j < width)[None, :]
        x = tl.load(x_ptrs[:, None] + j[None, :], mask=mask, other=0).to(tl.float32)
        inside = mask & (j < n)[None, :]
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")), 1))
        total += tl.sum(x.to(tl.float64), 1)  # 0 behind the last stimulus
    varies = low < high
    mean = tl.where(varies, total / n, 0)
    reach = tl.maximum(high.to(tl.float64) - mean, mean - low.to(tl.float64))
    reach = tl.max(tl.where(varies, reach, 0), 0)
    return varies, mean, tl.minimum(tl.maximum(reach, 2.0**-126), 2.0**126).to(tl.float32)


@triton.jit
def products(
    x_ptr,
    columns_ptr,
    u_ptr,
    mean_ptr,
    scale,
    d,
    width,
    stride_p,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The neurons times u: (N,)."""
    k = tl.arange(0, N)
    z = tl.zeros((N,), dtype=tl.float32)
    for first in tl.range(0, d, ROWS, num_stages=STAGES):
        i = first + tl.arange(0, ROWS)
        u = tl.load(u_ptr + i, mask=i < d, other=0)
        mean = tl.load(mean_ptr + i, mask=i < d, other=float("inf"))
        column = tl.load(columns_ptr + i, mask=i < d, other=0)
        x = centred(x_ptr + column * stride_p, mean, scale, k, width)  # (ROWS, N)
        z += tl.sum(x * u[:, None], 0)
    return z


@triton.jit
def centred(x_ptrs, mean, scale, j, width):
    """Stimuli j of neurons, to a magnitude of 1; 0 behind the last, and without a variance."""
    inside = (mean < float("inf"))[:, None] & (j < width)[None, :]
    x = tl.load(x_ptrs[:, None] + j[None, :], mask=inside, other=0).to(tl.float32)
    return tl.where(inside, x * scale - mean[:, None], 0)


@triton.jit
def tf32(x):
    """The nearest numbers of TF32, 10 bits behind the first."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def solve(a, diagonal, b, penalty, MOST: tl.constexpr):
    """(A + penalty) x = b to a hundredth of b: conjugate gradients, preconditioned by the diagonal.

    A thousandth saves one Newton step at most, and takes a third to a half more steps here.
    """
    x = tl.zeros_like(b)
    p = b / diagonal
    rho = tl.sum(b * p, 0)
    enough = 1e-4 * rho
    step = 0
    while (step < MOST) & (rho > enough):
        q = tl.sum(a * p[None, :], 1) + penalty * p
        alpha = rho / tl.sum(p * q, 0)
        x += alpha * p
        b -= alpha * q
        before = rho
        rho = tl.sum(b * b / diagonal, 0)
        p = b / diagonal + rho / before * p
        step += 1
    return x
