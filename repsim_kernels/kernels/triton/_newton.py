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

    A thousandth saves one Newton step at most, and takes a third to a half more steps here. Also
    returns bᵀx, and the longest step, whose inverse is the least pivot of A + penalty that the
    directions searched have, as a share of the diagonal.
    """
    x = tl.zeros_like(b)
    p = b / diagonal
    rho = tl.sum(b * p, 0)
    enough = 1e-4 * rho
    gain = tl.full((), 0.0, dtype=tl.float32)
    longest = tl.full((), 1.0, dtype=tl.float32)
    step = 0
    while (step < MOST) & (rho > enough):
        q = tl.sum(a * p[None, :], 1) + penalty * p
        alpha = rho / tl.sum(p * q, 0)
        longest = tl.maximum(longest, tl.abs(alpha))
        gain += alpha * rho  # pᵀb is rho, since each p is orthogonal to what came before
        x += alpha * p
        b -= alpha * q
        before = rho
        rho = tl.sum(b * b / diagonal, 0)
        p = b / diagonal + rho / before * p
        step += 1
    return x, gain, longest


@triton.jit
def noise(raw, diagonal, u, longest):
    """How far the rounding of float32 may move the optimum; an estimate, as in the torch kernel.

    raw, diagonal: of the Hessian before and after the intercept is eliminated, the latter infinite
    where a neuron has no variance. longest: as `solve` returns it.
    """
    # A residual's square is at most its weight where the margin is right, and not far above it
    # where it is wrong.
    pull = 2 * tl.max(tl.sqrt(raw / diagonal), 0) * longest
    pull += tl.sqrt(tl.sum(u * u * raw, 0) * longest)
    return 1.2e-7 * pull / tl.sqrt(tl.min(diagonal, 0))
