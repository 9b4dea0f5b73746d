"""Sums of square roots of matrices that are nearly diagonal, by products instead of eigenvalues.

For H = diag(v)² - F, tr H^½ = Σv - tr D, where D is the minimal solution of the Riccati equation
diag(v) D + D diag(v) = F + D². With D = diag(d) + O and M = diag(v) - D = diag(μ) - O, one step is

    g = diag(F + O²),  μ = √(v² - g),  d = g / (v + μ),  O ← offdiagonal(F + O²) / (μᵢ + μⱼ)

a product and a division by element. The steps run in float32 where its products are faster, until
the error is below `_CLOSE`; then one float64 product gives the residual R = F + D² - vD - Dv, and

    tr D ← tr D + tr(M⁻¹ R) / 2

is Newton's step for the trace: what is left is of the order of the error squared, so that float32
steps end in float64 digits; about tr(diag(μ)⁻¹ X²) / 2, with X = Rᵢⱼ / (μᵢ + μⱼ). Where that is too
much, or the steps crawl since H is nearly singular, the answer is NaN.
Source: METRICS, "One original, many ablations"; the split and the last step are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Relative error of the trace that Newton's step takes to below 1e-9 of a distance; float32 has it.
_CLOSE = 3e-8
# The most that may be left after it, of the trace.
_TRUSTED = 1e-12
# The least μ / v that must be left of a direction: √(v² - g) errs by eps (v / μ)².
_CLEAR = 0.15
_STEPS = 32

Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def advance(
    o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, or several, k of them, for o (B, m, m); both o and spare are overwritten.

    F is given as f (B, m, m) without its diagonal, and that (B, m), in float64 like v (m,).
    Returns the next o, the other buffer, and d (k, B, m) after each step.
    """
    p = torch.baddbmm(f, o, o, out=spare)
    squares = p.diagonal(dim1=1, dim2=2)
    g = diagonal + squares
    mu = (v * v - g).sqrt_()
    narrow = mu.to(p.dtype)
    p.div_(narrow[:, :, None] + narrow[:, None, :])
    squares.zero_()
    return p, o, g.div_(mu.add_(v))[None]


def solve_deficit(v: Tensor, f: Tensor, advance: Advance = advance) -> tuple[Tensor, Tensor]:
    """tr D (B,) for f (B, m, m) and v (m,) > 0, float64, and how many steps it took.

    NaN where the steps would be too many, or their end is not to be trusted.
    """
    scale = v.amax()
    v, f = v / scale, f / scale**2
    o, steps, arrived = _iterate(v, f, advance)
    out = torch.full_like(f[:, 0, 0], torch.nan)
    if bool(arrived.any()):
        out[arrived] = _newton(v, f[arrived], o[arrived]) * scale
    return out, steps


def _iterate(v: Tensor, f: Tensor, advance: Advance) -> tuple[Tensor, Tensor, Tensor]:
    """O of each f, the steps it took, and whether it arrived in as many as there may be."""
    diagonal = f.diagonal(dim1=1, dim2=2).clone()
    f = f.to(torch.float32 if f.device.type == "cpu" else torch.float64, copy=True)
    f.diagonal(dim1=1, dim2=2).zero_()
    found = torch.zeros_like(f)
    steps = torch.zeros(len(f), dtype=torch.int64, device=f.device)
    arrived = torch.zeros(len(f), dtype=torch.bool, device=f.device)
    at, live = torch.arange(len(f), device=f.device), ~arrived
    o, spare = torch.zeros_like(f), torch.empty_like(f)
    history = torch.empty(0, len(f), dtype=v.dtype, device=f.device)
    count = 0
    while count < _STEPS:
        o, spare, d = advance(o, f, diagonal, v, spare)
        history = torch.cat([history, d.sum(-1)])
        count += len(d)
        close, crawls = _judge(history, _size(v, d[-1]), _STEPS - count)
        leave = live & (close | crawls)
        if not bool(leave.any()):
            continue
        found[at[leave]], steps[at[leave]] = o[leave], count
        arrived[at[leave]] = close[leave]
        live &= ~leave
        left = int(live.sum())
        if not left:
            break
        if 2 * left <= len(live):
            at, o, f, spare, diagonal = at[live], o[live], f[live], spare[live], diagonal[live]
            history, live = history[:, live], live[live]
    return found, steps, arrived


def _judge(history: Tensor, size: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """From the traces (k, B) so far: which are close to their limit, and which never will be.

    Changes shrink by a ratio a step, of which the last two are known.
    """
    crawls = history[-1].isnan()
    change = history.diff(dim=0).abs()
    if not len(change):
        return torch.zeros_like(crawls), crawls
    tolerance = _CLOSE * size
    close = change[-1] <= tolerance
    if len(change) > 2:
        ratios = change[-2:] / change[-3:-1]
        slow, fast = ratios.amax(0), ratios.amin(0)
        close |= (slow < 1) & (change[-1] * slow <= tolerance * (1 - slow))
        crawls |= change[-1] * fast**left > tolerance
    return close, crawls


def _size(v: Tensor, d: Tensor) -> Tensor:
    """What errors of tr D are measured by: the smaller of D and what it leaves."""
    return torch.minimum(d.abs().sum(-1), (v - d).sum(-1))


def _newton(v: Tensor, f: Tensor, o: Tensor) -> Tensor:
    """tr D from a D = diag(d) + o that is nearly right; NaN where it isn't."""
    narrow = o.dtype  # the correction is small: float32's digits of it are enough
    o = o.to(torch.float64)
    p = torch.baddbmm(f, o, o)
    g = p.diagonal(dim1=1, dim2=2)
    mu = (v * v - g).sqrt()
    d = g / (v + mu)
    sums = mu[:, :, None] + mu[:, None, :]
    residual = p.sub_(o * sums)
    residual.diagonal(dim1=1, dim2=2).zero_()
    left = sums.reciprocal_().mul_(residual).square_().sum(-1).div_(2 * mu).sum(-1)
    # M⁻¹ by a Cholesky factorisation of M with a diagonal of ones.
    root = mu.rsqrt()
    scaled = root[:, :, None] * root[:, None, :]
    m = o.mul_(scaled).neg_().to(narrow)
    m.diagonal(dim1=1, dim2=2).fill_(1)
    factor, failed = torch.linalg.cholesky_ex(m)
    correction = (residual.mul_(scaled) * torch.cholesky_inverse(factor)).sum((-2, -1)) / 2
    clear = (mu / v).amin(-1) > _CLEAR
    trusted = (failed == 0) & clear & (left <= _TRUSTED * _size(v, d))
    return torch.where(trusted, d.sum(-1) + correction, torch.nan)
