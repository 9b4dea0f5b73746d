"""What follows the Riccati steps on a GPU: whether to stop, and the last correction of the trace.

The formulas are those of kernels/torch/riccati.py. PyTorch starts dozens of kernels for each, which
are expected to take longer to start than to run. Here one kernel judges the steps of a batch, and
two more, around a Cholesky factor and two triangular solves, correct its traces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch import cholesky
from repsim_kernels.kernels.torch import riccati as torch_riccati
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.riccati import STEPS, find_mu

_ROWS, _COLUMNS, _DIAGONAL = 16, 64, 256


@triton.jit(do_not_specialize=["batch", "steps_left"])
def _judge_kernel(d_ptr, v_ptr, verdict_ptr, batch, m, steps_left, close_to, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    step = batch * m  # from the diagonal of one step to that of the next
    t0 = tl.zeros((BLOCK,), dtype=tl.float64)
    t1, t2, t3 = t0, t0, t0
    size, left = t0, t0
    for start in range(0, m, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < m
        source = d_ptr + b * m + at
        last = tl.load(source + 3 * step, mask=inside, other=0)
        t0 += tl.load(source, mask=inside, other=0)
        t1 += tl.load(source + step, mask=inside, other=0)
        t2 += tl.load(source + 2 * step, mask=inside, other=0)
        t3 += last
        size += tl.abs(last)
        left += tl.load(v_ptr + at, mask=inside, other=0) - last
    trace = tl.sum(t3, 0)
    first = tl.abs(tl.sum(t1, 0) - tl.sum(t0, 0))
    second = tl.abs(tl.sum(t2, 0) - tl.sum(t1, 0))
    change = tl.abs(trace - tl.sum(t2, 0))
    tolerance = close_to * tl.minimum(tl.sum(size, 0), tl.sum(left, 0))
    early, late = second / first, change / second
    slow, fast = tl.where(early > late, early, late), tl.where(early < late, early, late)
    limit = change
    for _ in range(steps_left):
        limit *= fast
    is_close = (change <= tolerance) | ((slow < 1) & (change * slow <= tolerance * (1 - slow)))
    stalls = (trace != trace) | (limit > tolerance)
    tl.store(verdict_ptr + b, is_close.to(tl.int8))
    tl.store(verdict_ptr + batch + b, stalls.to(tl.int8))


def judge(
    history: Tensor, v: Tensor, d: Tensor, steps_left: int, close_to: float
) -> tuple[Tensor, Tensor]:
    """Judge the last STEPS steps as `kernels.torch.riccati.judge` does; it needs no more of them.

    Returns the history unchanged.
    """
    _, batch, m = d.shape
    verdict = torch.empty(2, batch, dtype=torch.int8, device=d.device)
    _launch.launch(
        _judge_kernel,
        (batch,),
        *(d, v, verdict, batch, m, steps_left, close_to),
        BLOCK=_DIAGONAL,
        num_warps=4,
    )
    return history, verdict


@triton.jit
def _residual_kernel(
    p_ptr,
    diagonal_ptr,
    v_ptr,
    o_ptr,
    r_ptr,
    error_ptr,
    m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    p_ptr += batch * m * m
    o_ptr += batch * m * m
    r_ptr += batch * m * m
    diagonal_ptr += batch * m
    mu = find_mu(p_ptr, diagonal_ptr, v_ptr, rows.to(tl.int64), m, m + 1)[0]  # (BLOCK_M,)
    error = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for start in range(0, m, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        other = find_mu(p_ptr, diagonal_ptr, v_ptr, columns.to(tl.int64), m, m + 1)[0]
        i, j = rows[:, None], columns[None, :]
        inside = (i < m) & (j < m)  # (BLOCK_M, BLOCK_N)
        place = i.to(tl.int64) * m + j
        o = tl.load(o_ptr + place, mask=inside, other=0)
        p = tl.load(p_ptr + place, mask=inside, other=0)
        sums = mu[:, None] + other[None, :]
        scale = 1 / tl.sqrt(mu[:, None] * other[None, :])
        residual = tl.where((i == j) | ~inside, 0, p - o * sums)
        x = residual / sums
        error += tl.sum(x * x, 1)
        tl.store(r_ptr + place, residual * scale, mask=inside)
        tl.store(o_ptr + place, tl.where(i == j, 1, -o * scale), mask=inside)
    error = tl.where(rows < m, error / (2 * mu), 0)
    tl.store(error_ptr + batch * tl.num_programs(1) + tile, tl.sum(error, 0))


@triton.jit
def _trace_kernel(
    p_ptr,
    diagonal_ptr,
    v_ptr,
    error_ptr,
    info_ptr,
    correction_ptr,
    out_ptr,
    m,
    tiles,
    min_ratio,
    max_error,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p_ptr += b * m * m
    diagonal_ptr += b * m
    trace = tl.zeros((BLOCK,), dtype=tl.float64)
    size, left, error = trace, trace, trace
    regular = tl.full((BLOCK,), 1, dtype=tl.int32)
    for start in range(0, m, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < m
        mu, g, v = find_mu(p_ptr, diagonal_ptr, v_ptr, at.to(tl.int64), m, m + 1)
        d = g / (v + mu)
        trace += d
        size += tl.abs(d)
        left += tl.where(inside, v - d, 0)
        regular = tl.where(mu > min_ratio * v, regular, 0)
        error += tl.load(error_ptr + b * tiles + at, mask=at < tiles, other=0)
    scale = tl.minimum(tl.sum(size, 0), tl.sum(left, 0))
    accurate = (tl.min(regular, 0) > 0) & (tl.sum(error, 0) <= max_error * scale)
    accurate = accurate & (tl.load(info_ptr + b) == 0)
    total = tl.sum(trace, 0) + tl.load(correction_ptr + b) / 2
    tl.store(out_ptr + b, tl.where(accurate, total, float("nan")))


def prepare(p: Tensor, diagonal: Tensor, v: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """Prepare a correction from p = F + O O: overwrite O by M, scaled to a unit diagonal.

    Returns the residual R (B, m, m), scaled as M is, and parts of the error (B, tiles). All are
    contiguous.
    """
    batch, m = diagonal.shape
    residual = torch.empty_like(p)
    error = p.new_empty(batch, triton.cdiv(m, _ROWS))
    _launch.launch(
        _residual_kernel,
        tuple(error.shape),
        *(p, diagonal, v, o, residual, error, m),
        BLOCK_M=_ROWS,
        BLOCK_N=_COLUMNS,
        num_warps=4,
    )
    return residual, error


def finish(
    p: Tensor, diagonal: Tensor, v: Tensor, error: Tensor, info: Tensor, correction: Tensor
) -> Tensor:
    """Return tr D (B,), given tr(M⁻¹ R) (B,) and the ``info`` of M's Cholesky factors."""
    out = torch.empty_like(correction)
    _launch.launch(
        _trace_kernel,
        (len(out),),
        *(p, diagonal, v, error, info, correction, out, p.shape[1], error.shape[1]),
        *(torch_riccati.MIN_RATIO, torch_riccati.MAX_ERROR),
        BLOCK=_DIAGONAL,
        num_warps=4,
    )
    return out


def correct_trace(v: Tensor, f: Tensor, diagonal: Tensor, o: Tensor) -> Tensor:
    """Compute `kernels.torch.riccati.correct_trace`; overwrites o."""
    o = o.to(torch.float64)
    p = torch.baddbmm(f, o, o)
    residual, error = prepare(p, diagonal, v, o)
    factor, info = torch.linalg.cholesky_ex(o)
    correction = cholesky.solve(factor, residual).diagonal(dim1=1, dim2=2).sum(-1)
    return finish(p, diagonal, v, error, info, correction)


TRACE_SOLVERS = torch_riccati.TraceSolvers(judge, correct_trace)
assert STEPS == 4, "the judge compares four steps"


def _make_case(batch: int, m: int) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        p, o = (torch.empty(batch, m, m, dtype=torch.float64, device=device) for _ in range(2))
        diagonal, v, out = p.new_empty(batch, m), p.new_empty(m), p.new_empty(batch)
        judge(p, v, p.new_empty(STEPS, batch, m), 8, 1e-8)
        _, error = prepare(p, diagonal, v, o)
        finish(p, diagonal, v, error, torch.empty(batch, dtype=torch.int32, device=device), out)

    elements = batch * m * m
    floor = _launch.Floor(32 * elements + 8 * (STEPS + 2) * batch * m, 8 * elements)
    return _launch.CompileCase(f"{batch} matrices of {m} x {m}, float64", call, floor)


AOT_CASES = (_make_case(16, 499), _make_case(100, 49))
