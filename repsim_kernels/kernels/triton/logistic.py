"""Many small logistic regressions at once: one program runs each from its neurons to convergence.

A program performs the Newton steps of one regression. Each step computes the margins and the loss,
neuron by neuron over all stimuli; then the gradient and the Hessian, for all neurons over blocks of
stimuli; then conjugate gradients with the Hessian in registers. Margins and gradient determine the
result and are float32 products; the gradient is summed in float64, without which nearly collinear
neurons would not converge. The Hessian only steers: in float32 emulation TF32 needs as many steps
as float32.

Predicted for an H200 (not measured): a step of n = 500 stimuli and d = 100 neurons, padded to 512
and 128, needs at least, in thousand cycles of a multiprocessor (132 of them at 1.7 GHz),

    neurons, read twice from L2      400 KB at 24 B             16
    Hessian                          34 Mop at 2,048 (tf32x3)   16    (tf32: 8)
    centring, weighting, gradient    1.6 M operations at 128    13
    conjugate gradients              10 steps of 0.7             7

plus two passes of 10 per fit. If reading overlaps with all the rest, 8 steps take 308 thousand
cycles, or 1.4 µs per fit over all multiprocessors: 40 million fits take 55 s, of which conjugate
gradients take 10 s (tf32: 244 thousand cycles, 1.1 µs, 44 s). Without any overlap it is 436
thousand cycles and 78 s. A multiprocessor has registers for one program of 8 warps and none to
spare, so a step passes its results to the next through memory.

A fit that rounding may have moved too far does not count as converged; the estimate of that
movement takes the smallest curvature from the steps of conjugate gradients. The launcher hands such
fits to the torch kernel, which resumes them in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch.logistic import NOISE, Fits, iter_slices, refit
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._newton import (
    load_centred,
    multiply_neurons,
    neuron_moments,
    round_to_tf32,
    rounding_error,
    solve_cg,
)

# Triton 3.6 can't compile this kernel's products in the tensor memory of 10.x and 11.x GPUs.
_OLD_TRITON = _launch.parse_release(triton.__version__) < (3, 8)
_FITS = 2**14  # per launch: 109 MB of scratch for 500 stimuli, and the tail is 1 % of the time
_STEPS = 8  # from a cold start: 4 to 12 on four kinds of activations of magnitude 1


@dataclass(frozen=True)
class Launch:
    block_d: int  # neurons per tile: all of a regression
    block_n: int  # stimuli per step of the Hessian
    rows: int  # neurons per step of the margins, each with all stimuli
    num_warps: int
    num_stages: int


def choose(
    n: int, d: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]
) -> Launch:
    """Choose launch settings for regressions of n stimuli on d neurons."""
    block_d = max(16, triton.next_power_of_2(d))
    return Launch(
        block_d=block_d,
        block_n=16,
        # Up to 16 elements per thread, with all their loads in flight; 64 neurons spill. Without
        # tensor cores the Hessian's operands leave no registers for more than one neuron.
        rows=1 if precision == "ieee" else min(32, max(1, 4096 // triton.next_power_of_2(n))),
        # The Hessian takes 64 registers of each thread at 128 neurons, and at most 32 below.
        num_warps=8 if block_d == 128 else 4,
        # A second stage spills in all other cases.
        num_stages=2 if precision == "tf32" or (precision, capability[0]) == ("tf32x3", 9) else 1,
    )


def floor(n: int, d: int, fits: int, neurons: int, itemsize: int, precision: str) -> _launch.Floor:
    """Lower bound: read the neurons in use once, write the results once, and compute 8 Hessians.

    A cold start needs 8 steps, with n (d + 1) d operations for each Hessian; margins, gradients and
    conjugate gradients would add 8 %.
    """
    n_bytes = neurons * n * itemsize + fits * (8 * d + 4 * (d + 1) + 17)
    return _launch.Floor(n_bytes, fits * _STEPS * n * d * (d + 1), precision)


def unsupported(x: Tensor) -> str | None:
    """Return why the kernel can't take x, or None if it can."""
    reason = _launch.unsupported(x)
    if reason is None and _OLD_TRITON and _launch.capability(x.device)[0] in (10, 11):
        return f"on this GPU it needs Triton 3.8 or newer, not {triton.__version__}"
    return reason


@triton.jit
def _logistic_fits_kernel(
    x_ptr,
    columns_ptr,
    signs_ptr,
    coef_ptr,
    intercept_ptr,
    steps_ptr,
    converged_ptr,
    errors_ptr,
    scratch_ptr,
    n,
    d,
    t,
    width,
    stride_p,
    root,
    ratio,
    tol,
    limit,
    max_iter,
    D: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    fit = tl.program_id(0).to(tl.int64)
    # Both are multiples of 4; spelled out so that the compiler reads neurons in whole vectors.
    width = width // 4 * 4
    stride_p = stride_p // 4 * 4
    columns_ptr += fit // t * d
    signs_ptr += fit % t * n
    coef_ptr += fit * d
    # Threads exchange values through this scratch memory.
    u_ptr = scratch_ptr + fit * (5 * D + 2 * N + 4)
    du_ptr = u_ptr + D
    mean_ptr = du_ptr + D
    raw_ptr = mean_ptr + D  # the Hessian's diagonal, before and after eliminating the intercept
    diagonal_ptr = raw_ptr + D
    residual_ptr = diagonal_ptr + D
    weight_ptr = residual_ptr + N
    longest_ptr = weight_ptr + N  # longest step of conjugate gradients so far
    i = tl.arange(0, D)
    k = tl.arange(0, N)

    # Solve for u = w / scale on centred neurons of magnitude about 1.
    x_ptrs = x_ptr + tl.load(columns_ptr + i, mask=i < d, other=0) * stride_p  # (D,)
    varies, mean, deviation = neuron_moments(x_ptrs, i < d, n, width, D, BLOCK_N)
    power = (deviation.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.minimum(1 / power, root)
    penalty = tl.maximum((scale / root) * (scale / root), 1e-30) * ratio
    mean = (mean * scale).to(tl.float32)
    # An infinite mean marks a constant neuron, which drops out.
    tl.store(mean_ptr + i, tl.where(varies, mean, float("inf")))
    u = tl.load(coef_ptr + i, mask=varies, other=0) / scale
    c = (tl.load(intercept_ptr + fit) + tl.sum(mean.to(tl.float64) * u, 0)).to(tl.float32)

    # The start counts as a step from w = 0 and the log-odds, so it is halved while it is worse.
    share = tl.sum((tl.load(signs_ptr + k, mask=k < n, other=0) > 0).to(tl.float32), 0) / n
    min_loss = -n * (share * tl.log(share) + (1 - share) * tl.log(1 - share))
    tl.store(u_ptr + i, u)
    tl.store(du_ptr + i, u)
    dc = c - tl.log(share / (1 - share))
    tl.store(longest_ptr, 1.0)
    steps = 0
    halvings = 30  # remaining halvings of a step: 0 ends the fit, -1 marks convergence
    while (halvings > 0) & (steps < max_iter):
        tl.debug_barrier()
        z = multiply_neurons(
            x_ptr, columns_ptr, u_ptr, mean_ptr, scale, d, width, stride_p, ROWS, N, STAGES
        )
        sign = tl.load(signs_ptr + k, mask=k < n, other=0).to(tl.float32)
        margin = sign * (z + c)
        e = tl.exp(-tl.abs(margin))
        # log(1 + e), by its series if 1 + e would lose e's digits.
        series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4))))
        losses = tl.maximum(-margin, 0) + tl.where(e < 1 / 64, series, tl.log(1 + e))
        u = tl.load(u_ptr + i)
        loss = tl.sum(tl.where(k < n, losses, 0), 0) + penalty / 2 * tl.sum(u * u, 0)
        if loss <= min_loss * (1 + 1e-5):  # rounding of large margins can add that much
            min_loss = loss
            steps += 1
            residual = -sign * tl.where(margin > 0, e, 1) / (1 + e)  # 0 past the last stimulus
            weight = tl.where(k < n, e / ((1 + e) * (1 + e)), 0)
            tl.store(residual_ptr + k, residual)
            tl.store(weight_ptr + k, weight)
            tl.debug_barrier()
            slope = tl.sum(residual.to(tl.float64), 0).to(tl.float32)
            total = tl.maximum(tl.sum(weight, 0), 1e-30)
            gradient = tl.zeros((D,), dtype=tl.float64)
            cross = tl.zeros((D,), dtype=tl.float32)
            diagonal = tl.zeros((D,), dtype=tl.float32)
            hessian = tl.zeros((D, D), dtype=tl.float32)
            marked = tl.load(mean_ptr + i)
            x_ptrs = x_ptr + tl.load(columns_ptr + i, mask=i < d, other=0) * stride_p  # (D,)
            for first in range(0, n, BLOCK_N):
                j = first + tl.arange(0, BLOCK_N)
                x = load_centred(x_ptrs, marked, scale, j, width)  # (D, BLOCK_N)
                q = tl.load(residual_ptr + j).to(tl.float64)
                w = tl.load(weight_ptr + j)
                gradient += tl.sum(x.to(tl.float64) * q[None, :], 1)
                cross += tl.sum(x * w[None, :], 1)
                # The same factor on both sides keeps the product semidefinite despite rounding.
                y = x * tl.sqrt(w)[None, :]
                diagonal += tl.sum(y * y, 1)
                if PRECISION == "tf32x3":
                    # big bigᵀ + small bigᵀ + big smallᵀ: half of it, whose transpose is the rest.
                    big = round_to_tf32(y)
                    hessian = tl.dot(big / 2, tl.trans(big), hessian, input_precision="tf32")
                    hessian = tl.dot(y - big, tl.trans(big), hessian, input_precision="tf32")
                else:
                    hessian = tl.dot(y, tl.trans(y), hessian, input_precision=PRECISION)
            if PRECISION == "tf32x3":
                hessian += tl.trans(hessian)
            # Eliminate the intercept; its step follows from the others.
            u = tl.load(u_ptr + i)
            b = cross * (slope / total) - (gradient + penalty * u).to(tl.float32)
            hessian -= cross[:, None] * (cross / total)[None, :]
            tl.store(raw_ptr + i, diagonal)
            diagonal = tl.maximum(diagonal - cross / total * cross, 0) + penalty
            tl.store(diagonal_ptr + i, diagonal)
            du, gain, longest = solve_cg(hessian, diagonal, b, penalty, D)
            longest = tl.maximum(tl.load(longest_ptr), longest)
            dc = -(slope + tl.sum(cross * du, 0)) / total
            u = tl.load(u_ptr + i) + du
            c += dc
            small = tl.max(tl.abs(du), 0) <= tol * tl.max(tl.abs(u), 0)
            small = small & (tl.abs(dc) <= tol * tl.maximum(tl.abs(c), 1))
            # From the second step on, a gain below rounding error means that only noise remains.
            gains = (gain > 1e-14 * min_loss) | (steps == 1)
            halvings = tl.where(small, -1, tl.where(gains, 30, 0))
            tl.debug_barrier()
            tl.store(longest_ptr, longest)
        else:
            halvings -= 1
            du = tl.load(du_ptr + i) / 2
            dc *= 0.5
            u = tl.load(u_ptr + i) - du
            c -= dc
        tl.debug_barrier()
        tl.store(u_ptr + i, u)
        tl.store(du_ptr + i, du)

    tl.debug_barrier()
    z = multiply_neurons(
        x_ptr, columns_ptr, u_ptr, mean_ptr, scale, d, width, stride_p, ROWS, N, STAGES
    )
    sign = tl.load(signs_ptr + k, mask=k < n, other=0)
    wrong = (z + c > 0) != (sign > 0)
    tl.store(errors_ptr + fit, tl.sum(((k < n) & wrong).to(tl.int32), 0))
    u = tl.load(u_ptr + i)
    mean = tl.load(mean_ptr + i)
    varies = mean < float("inf")
    mean = tl.where(varies, mean, 0)
    tl.store(intercept_ptr + fit, (c - tl.sum(mean.to(tl.float64) * u, 0)).to(tl.float32))
    tl.store(coef_ptr + i, u * scale, mask=i < d)
    tl.store(steps_ptr + fit, steps)
    # Loaded here because registers can't hold these values through the loop.
    diagonal = tl.where(varies, tl.load(diagonal_ptr + i), float("inf"))
    error = rounding_error(tl.load(raw_ptr + i), diagonal, u, tl.load(longest_ptr))
    sound = (error <= limit * tl.max(tl.abs(u), 0)) & (scale >= 1e-15 * root)
    tl.store(converged_ptr + fit, (halvings < 0) & sound)


def logistic_fits(
    x: Tensor,
    *,
    targets: np.ndarray,
    columns: np.ndarray,
    C: float,
    tol: float,
    max_iter: int,
    start: tuple[Tensor, Tensor] | None = None,
    precision: str = "tf32x3",
    launch: Launch | None = None,
) -> dict[str, Tensor]:
    """Fit targets (t, n) on columns (b, d) of x (n, p): coef (b, t, d), all other results (b, t).

    Fits that have not converged in the kernel resume in float64, in the torch kernel.
    """
    rows, numbers = _neuron_major(x, torch.as_tensor(columns, device=x.device))
    fits = _launch_fits(rows, numbers, len(x), targets, C, tol, max_iter, start, precision, launch)
    unfinished = ~fits["converged"] & (fits["n_iter"] < max_iter)
    d, n = numbers.shape[1], len(x)
    for j in unfinished.any(0).nonzero()[:, 0].tolist():
        y = torch.as_tensor(targets[j], device=x.device)
        indices = unfinished[:, j].nonzero()[:, 0]
        for batch in iter_slices(len(indices), 8 * d * n, x.device):
            at = indices[batch]
            start_fits = Fits(**{name: value[at, j] for name, value in fits.items()})
            neurons = rows[numbers[at], :n].double()
            refits = refit(neurons, y, C, start_fits, tol, max_iter)
            for name, value in fits.items():
                value[at, j] = getattr(refits, name).to(value.dtype)
    return fits


def _launch_fits(
    rows: Tensor,
    numbers: Tensor,
    n: int,
    targets: np.ndarray,
    C: float,
    tol: float,
    max_iter: int,
    start: tuple[Tensor, Tensor] | None,
    precision: str,
    launch: Launch | None,
) -> dict[str, Tensor]:
    """Run the kernel on neurons ``numbers`` (b, d) of the neuron-major rows (u, at least n)."""
    device = rows.device
    signs = torch.as_tensor(targets, device=device).to(torch.int8) * 2 - 1
    (b, d), t = numbers.shape, len(signs)
    launch = launch or choose(n, d, rows.dtype, precision, _launch.capability(device))
    if start is None:
        share = (signs > 0).double().mean(1)
        coef = torch.zeros(b, t, d, device=device)
        intercept = torch.log(share / (1 - share)).float().expand(b, t).contiguous()
    else:
        coef, intercept = (s.to(device, torch.float32, copy=True).contiguous() for s in start)
    steps = torch.empty(b, t, dtype=torch.int64, device=device)
    converged = torch.empty(b, t, dtype=torch.bool, device=device)
    errors = torch.empty_like(steps)
    width = max(launch.block_n, triton.next_power_of_2(n))
    count = max(1, _FITS // t)
    scratch = torch.empty(min(b, count) * t, 5 * launch.block_d + 2 * width + 4, device=device)
    # About √C, which bounds the scale: a larger scale would make the penalty exceed 1.
    root = 2.0 ** min(max(math.frexp(C)[1] // 2, -60), 60)
    for first in range(0, b, count):
        batch = slice(first, min(first + count, b))
        tensors = (
            numbers[batch],
            signs,
            *(a[batch] for a in (coef, intercept, steps, converged, errors)),
        )
        _launch.launch(
            _logistic_fits_kernel,
            (len(numbers[batch]) * t,),
            *(rows, *tensors, scratch),
            *(n, d, t, rows.shape[1], rows.stride(0)),
            *(root, root * root / C, tol, max(tol, NOISE), max_iter),
            D=launch.block_d,
            N=width,
            ROWS=launch.rows,
            BLOCK_N=launch.block_n,
            PRECISION=precision,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    names = ("coef", "intercept", "n_iter", "converged", "errors")
    return dict(zip(names, (coef, intercept, steps, converged, errors), strict=True))


def _neuron_major(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return neuron-major rows, padded to multiples of 4 stimuli, and the row of each column.

    If x (n, p) already has that layout the rows are a view of it; otherwise they are a copy of the
    columns in use.
    """
    n = len(x)
    if x.stride(0) == 1 and n % 4 == 0 and x.stride(1) % 4 == 0:
        return x.mT, columns.contiguous()
    used, numbers = torch.unique(columns, return_inverse=True)
    rows = x.new_zeros(len(used), -(-n // 4) * 4)
    rows[:, :n] = x.index_select(1, used).mT
    return rows, numbers


def _make_case(
    n: int, d: int, p: int, dtype: torch.dtype, precision: str, fits: int = 1000
) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        x = torch.empty(p, n, dtype=dtype, device=device).mT
        columns = np.arange(fits * d).reshape(fits, d) % p
        targets = np.arange(n)[None] % 10 == 0
        rows, numbers = _neuron_major(x, torch.from_numpy(columns).to(device))
        _launch_fits(rows, numbers, n, targets, 1.0, 1e-5, 100, None, precision, None)

    return _launch.CompileCase(
        f"{fits:,} fits, n = {n}, d = {d}, p = {p:,}, {str(dtype)[6:]}, {precision}, by neurons",
        call,
        floor(n, d, fits, min(p, fits * d), dtype.itemsize, precision),
        products=precision != "ieee",
        archs=(80, 90) if _OLD_TRITON else (80, 90, 100),
    )


AOT_CASES: tuple[_launch.CompileCase, ...] = (
    _make_case(500, 100, 100_352, torch.float32, "tf32x3"),
    _make_case(500, 100, 100_352, torch.float32, "tf32"),
    _make_case(500, 100, 100_352, torch.float32, "ieee"),
    _make_case(500, 100, 100_352, torch.bfloat16, "tf32x3"),
    _make_case(50, 100, 193_600, torch.float32, "tf32x3"),
    _make_case(550, 128, 100_352, torch.float32, "tf32x3"),
)
