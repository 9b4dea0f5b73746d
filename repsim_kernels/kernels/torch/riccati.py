"""Traces of square roots of nearly diagonal matrices, from products instead of eigenvalues.

For H = diag(v)² - F, tr H^½ = Σv - tr D, where D is the minimal solution of the Riccati equation
diag(v) D + D diag(v) = F + D². With D = diag(d) + O and M = diag(v) - D = diag(μ) - O, one step is

    g = diag(F + O²),  μ = √(v² - g),  d = g / (v + μ),  O ← offdiagonal(F + O²) / (μᵢ + μⱼ)

which is a product and an elementwise division. The steps run in float32 on a CPU, where its
products are faster, until the error is below `_CLOSE`. Then one float64 product gives the residual
R = F + D² - vD - Dv, and

    tr D ← tr D + tr(M⁻¹ R) / 2

is a Newton step for the trace. Its error is of the order of the previous error squared, so that
float32 steps end with float64 digits: it is about tr(diag(μ)⁻¹ X²) / 2 with X = Rᵢⱼ / (μᵢ + μⱼ). If
that is too large, or the steps stall because H is nearly singular, the result is NaN.
Source: docs/metrics.md, "One original, many ablations"; the splitting of D and the Newton step are
our additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import cholesky
from repsim_kernels.kernels.torch.panels import to_index

# Relative error of the trace at which the iteration stops. float32 reaches it, and the Newton step
# reduces it to below 1e-9 of a distance.
_CLOSE = 3e-8
# Largest relative error of the trace that is accepted after the Newton step.
MAX_ERROR = 1e-12
# Least μ / v that is accepted in any direction: the error of √(v² - g) is eps (v / μ)².
MIN_RATIO = 0.15
_MAX_STEPS = 32

Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Judge = Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


def advance(
    o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance o (B, m, m) by one step, or by k steps in other backends.

    F is passed as f (B, m, m) with a zero diagonal and its diagonal (B, m), which is float64, as is
    v (m,). Both o and spare are overwritten. Returns the next o, the other buffer, and d (k, B, m)
    after each step.
    """
    p = torch.baddbmm(f, o, o, out=spare)
    squares = p.diagonal(dim1=1, dim2=2)
    g = diagonal + squares
    mu = (v * v - g).sqrt_()
    mu_p = mu.to(p.dtype)
    p.div_(mu_p[:, :, None] + mu_p[:, None, :])
    squares.zero_()
    return p, o, g.div_(mu.add_(v))[None]


def solve_deficit(
    v: Tensor, f: Tensor, advance: Advance = advance, solvers: TraceSolvers | None = None
) -> tuple[Tensor, Tensor]:
    """Return tr D (B,) for f (B, m, m) and descending v (m,) > 0, float64, and steps (B,).

    NaN if it would need too many steps or its error is too large. The steps are on the CPU.
    """
    scale = v[0]
    deficit, steps = solve_unit_deficit(v / scale, f / scale.square(), advance, solvers)
    return deficit.mul_(scale), steps


def solve_unit_deficit(
    v: Tensor, f: Tensor, advance: Advance = advance, solvers: TraceSolvers | None = None
) -> tuple[Tensor, Tensor]:
    """Solve as `solve_deficit` does, for v with a largest value of 1; overwrites f."""
    judge, correct_trace = solvers or TRACE_SOLVERS
    diagonal = f.diagonal(dim1=1, dim2=2).clone()
    f.diagonal(dim1=1, dim2=2).zero_()
    o, steps, converged = _iterate(v, f, diagonal, advance, judge)
    rows = [i for i, ends in enumerate(converged) if ends]
    if len(rows) == len(f):
        return correct_trace(v, f, diagonal, o), torch.tensor(steps)
    out = torch.full_like(f[:, 0, 0], torch.nan)
    if rows:
        out[rows] = correct_trace(v, f[rows], diagonal[rows], o[rows])
    return out, torch.tensor(steps)


def _iterate(
    v: Tensor, f: Tensor, diagonal: Tensor, advance: Advance, judge: Judge
) -> tuple[Tensor, list[int], list[bool]]:
    """Return O for each F, its number of steps, and whether it converged.

    The arguments are those of `advance`.
    """
    if f.device.type == "cpu":
        f = f.to(torch.float32)
    result: Tensor | None = None
    steps, converged = [0] * len(f), [False] * len(f)
    # Problems that end stay in the batch, inactive, until half of it has ended.
    index, active = list(range(len(f))), [True] * len(f)
    o, spare = torch.zeros_like(f), torch.empty_like(f)
    history = torch.empty(0, len(f), dtype=v.dtype, device=f.device)
    count = 0
    while count < _MAX_STEPS:
        o, spare, d = advance(o, f, diagonal, v, spare)
        count += len(d)
        history, verdict = judge(history, v, d, _MAX_STEPS - count, _CLOSE)
        close, stalls = verdict.tolist()
        ends = [i for i, on in enumerate(active) if on and (close[i] or stalls[i])]
        if not ends:
            continue
        for i in ends:
            steps[index[i]], converged[index[i]] = count, bool(close[i])
            active[i] = False
        if result is None and not any(active):
            return o, steps, converged
        result = torch.zeros_like(f) if result is None else result
        result[to_index([index[i] for i in ends])] = o[to_index(ends)]
        left = [i for i, on in enumerate(active) if on]
        if not left:
            break
        if 2 * len(left) <= len(active):
            at = torch.tensor(left).to(f.device)
            o, f, spare, diagonal = (t.index_select(0, at) for t in (o, f, spare, diagonal))
            history = history.index_select(1, at)
            index, active = [index[i] for i in left], [True] * len(left)
    return o if result is None else result, steps, converged


def judge(
    history: Tensor, v: Tensor, d: Tensor, steps_left: int, close_to: float
) -> tuple[Tensor, Tensor]:
    """Judge from the traces so far which are close to their limit and which never will be.

    Takes the traces (k, B) before the last steps and d (j, B, m) after each of those. Returns all
    traces, and close and stalls as rows (2, B); close is a relative error below ``close_to``. The
    change shrinks by a ratio in each step; the last two ratios are known.
    """
    history = torch.cat([history, d.sum(-1)])
    stalls = history[-1].isnan()
    change = history.diff(dim=0).abs()
    if not len(change):
        return history, torch.stack([torch.zeros_like(stalls), stalls])
    tolerance = close_to * _error_scale(v, d[-1])
    close = change[-1] <= tolerance
    if len(change) > 2:
        ratios = change[-2:] / change[-3:-1]
        slow, fast = ratios.amax(0), ratios.amin(0)
        close |= (slow < 1) & (change[-1] * slow <= tolerance * (1 - slow))
        stalls |= change[-1] * fast**steps_left > tolerance
    return history, torch.stack([close, stalls])


def _error_scale(v: Tensor, d: Tensor) -> Tensor:
    """Return what errors of tr D are relative to: the smaller of tr D and tr H^½."""
    return torch.minimum(d.abs().sum(-1), (v - d).sum(-1))


def correct_trace(v: Tensor, f: Tensor, diagonal: Tensor, o: Tensor) -> Tensor:
    """Return tr D after a Newton step from D = diag(d) + o; NaN if its error is too large.

    F is passed as to `advance`, but in float64.
    """
    low = o.dtype  # the correction is small, so that float32 has enough digits for it
    o = o.to(torch.float64)
    p = torch.baddbmm(f, o, o)
    g = diagonal + p.diagonal(dim1=1, dim2=2)
    mu = (v * v - g).sqrt()
    d = g / (v + mu)
    sums = mu[:, :, None] + mu[:, None, :]
    residual = p.sub_(o * sums)
    residual.diagonal(dim1=1, dim2=2).zero_()
    error = sums.reciprocal_().mul_(residual).square_().sum(-1).div_(2 * mu).sum(-1)
    # M⁻¹ from a Cholesky factor of M scaled to a unit diagonal.
    root = mu.rsqrt()
    scaled = root[:, :, None] * root[:, None, :]
    m = o.mul_(scaled).neg_().to(low)
    m.diagonal(dim1=1, dim2=2).fill_(1)
    factor, failed = torch.linalg.cholesky_ex(m)
    correction = (residual.mul_(scaled) * cholesky.invert(factor)).sum((-2, -1)) / 2
    regular = (mu / v).amin(-1) > MIN_RATIO
    accurate = (failed == 0) & regular & (error <= MAX_ERROR * _error_scale(v, d))
    return torch.where(accurate, d.sum(-1) + correction, torch.nan)


class TraceSolvers(NamedTuple):
    """What follows the steps: whether to stop, and the last correction."""

    judge: Judge
    correct_trace: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


TRACE_SOLVERS = TraceSolvers(judge, correct_trace)
