"""Device functions of the logistic kernel: loading neurons, and solving a Newton step."""

import triton
import triton.language as tl


@triton.jit
def neuron_moments(x_ptrs, rows, n, width, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which neurons vary, their means, and the largest deviation from a mean.

    The deviation is clamped to float32's normal range.
    """
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
        total += tl.sum(x.to(tl.float64), 1)  # 0 past the last stimulus
    varies = low < high
    mean = tl.where(varies, total / n, 0)
    reach = tl.maximum(high.to(tl.float64) - mean, mean - low.to(tl.float64))
    reach = tl.max(tl.where(varies, reach, 0), 0)
    return varies, mean, tl.minimum(tl.maximum(reach, 2.0**-126), 2.0**126).to(tl.float32)


@triton.jit
def multiply_neurons(
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
    """Multiply the neurons by their coefficients u and sum over neurons: (N,)."""
    k = tl.arange(0, N)
    z = tl.zeros((N,), dtype=tl.float32)
    for first in tl.range(0, d, ROWS, num_stages=STAGES):
        i = first + tl.arange(0, ROWS)
        u = tl.load(u_ptr + i, mask=i < d, other=0)
        mean = tl.load(mean_ptr + i, mask=i < d, other=float("inf"))
        column = tl.load(columns_ptr + i, mask=i < d, other=0)
        x = load_centred(x_ptr + column * stride_p, mean, scale, k, width)  # (ROWS, N)
        z += tl.sum(x * u[:, None], 0)
    return z


@triton.jit
def load_centred(x_ptrs, mean, scale, j, width):
    """Load stimuli j of the neurons, centred and scaled; 0 past the end and for constant neurons.

    A constant neuron is marked by an infinite mean.
    """
    inside = (mean < float("inf"))[:, None] & (j < width)[None, :]
    x = tl.load(x_ptrs[:, None] + j[None, :], mask=inside, other=0).to(tl.float32)
    return tl.where(inside, x * scale - mean[:, None], 0)


@triton.jit
def round_to_tf32(x):
    """Round to the nearest TF32 number, which has 10 bits after the leading one."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def solve_cg(a, diagonal, b, penalty, MAX_STEPS: tl.constexpr):
    """Solve (A + penalty) x = b to 1 % of b by conjugate gradients, preconditioned by the diagonal.

    A tolerance of 0.1 % saves one Newton step at most and needs a third to a half more steps here.
    Also returns bᵀx and the longest step. The inverse of that step is the smallest pivot of
    A + penalty among the directions searched, relative to the diagonal.
    """
    x = tl.zeros_like(b)
    p = b / diagonal
    rho = tl.sum(b * p, 0)
    target = 1e-4 * rho
    gain = tl.full((), 0.0, dtype=tl.float32)
    longest = tl.full((), 1.0, dtype=tl.float32)
    step = 0
    while (step < MAX_STEPS) & (rho > target):
        q = tl.sum(a * p[None, :], 1) + penalty * p
        alpha = rho / tl.sum(p * q, 0)
        longest = tl.maximum(longest, tl.abs(alpha))
        gain += alpha * rho  # pᵀb is rho, because each p is orthogonal to the earlier ones
        x += alpha * p
        b -= alpha * q
        before = rho
        rho = tl.sum(b * b / diagonal, 0)
        p = b / diagonal + rho / before * p
        step += 1
    return x, gain, longest


@triton.jit
def rounding_error(raw, diagonal, u, longest):
    """Estimate how far float32 rounding may move the optimum, as the torch kernel does.

    raw and diagonal are the Hessian's diagonal before and after eliminating the intercept, the
    latter infinite for constant neurons. longest is the longest step that `solve_cg` returns.
    """
    # A squared residual is at most its weight if the margin has the right sign, and not far above
    # it otherwise.
    pull = 2 * tl.max(tl.sqrt(raw / diagonal), 0) * longest
    pull += tl.sqrt(tl.sum(u * u * raw, 0) * longest)
    return 1.2e-7 * pull / tl.sqrt(tl.min(diagonal, 0))
