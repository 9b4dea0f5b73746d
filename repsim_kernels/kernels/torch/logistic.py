"""Many small L2-penalised logistic regressions at once, most of them with one exact Hessian.

With n = 500 stimuli and d = 100 neurons a Hessian costs 10 million operations and a gradient 0.2
million. So each factored Hessian is the preconditioner of up to eight conjugate gradient steps. A
descent from zero starts with up to eight steps that use only the diagonal of the Hessian; they lead
near enough to the optimum that the first exact Hessian is usually the last. On a CPU each thread
works on problems that fit its cache, and the results do not depend on the number of threads.

Descents start in float32. Each is judged at its end by how far rounding may have moved its optimum.
If that is more than 3e-5 of the largest coefficient, or if the descent failed, it resumes in
float64 from the original activations, relative to each neuron's median. One outlier of 10⁷ moves a
neuron's mean by much more than its ordinary activations differ, but not its median.

Source: Nocedal & Wright 2006, section 5.2, nonlinear conjugate gradients with factor (5.46).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch._logistic_loss import Objective

_STEPS = 8  # with one Hessian; 6 and 10 are about as fast, summed over nine kinds of activations
_GAIN = 0.02  # the exact Hessian follows when a step with the diagonal gains less of the objective
_HALVINGS = 40
_FLOAT32_TOL = 1e-5  # smallest tolerance for which float32 is trusted
NOISE = 3e-5  # how far rounding may move a converged fit, relative to the largest coefficient
_FLOAT32_STEPS = 4 * _STEPS  # after these float32 steps, float64 takes over noisy problems
_SATURATED = 700.0  # margin beyond which a residual is 0 or 1 in float64
# A factor is stale if some neuron's curvature was this many times larger when it was made. For
# ordinary activations the ratio is at most 6.
_STALE = 16.0
# Bytes of activations processed together: by each CPU thread within its cache, and on a GPU.
_CPU_BATCH, _GPU_BATCH = 2**22 * 3 // 2, 2**30

_Solver = Callable[[Tensor], Tensor]  # multiplies gradients by the inverse of Hessians


@dataclass(frozen=True)
class _Frame:
    """The float64 origin subtracted from each neuron, and the scale each problem is divided by."""

    origin: Tensor  # (B, d)
    scale: Tensor  # (B,)


class Fits(NamedTuple):
    """The results of a batch of fits, in terms of the original activations."""

    coef: Tensor  # (B, d) float64
    intercept: Tensor  # (B,) float64
    n_iter: Tensor  # (B,) int64
    converged: Tensor  # (B,) bool
    errors: Tensor  # (B,) int64, wrong hard predictions

    def select(self, at: Tensor) -> Fits:
        """Return the fits at the indices ``at``."""
        return Fits(*(a[at] for a in self))

    def replace_at(self, at: Tensor, fits: Fits) -> Fits:
        """Return a copy in which ``fits`` replace those at the indices ``at``."""
        return Fits(*(a.index_copy(0, at, b) for a, b in zip(self, fits, strict=True)))


def logistic_fits(
    x: Tensor,
    *,
    targets: np.ndarray,
    columns: Tensor,
    C: float,
    tol: float,
    max_iter: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Fit targets (t, n) on columns (b, d) of x (n, p); coef is (b, t, d), the others (b, t)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = extract_neuron_rows(x, columns)
    rows, y = rows.to(dtype), torch.from_numpy(targets).to(x.device)
    (b, d), (t, n) = columns.shape, y.shape
    out = {
        "coef": rows.new_empty(b, t, d),
        "intercept": rows.new_empty(b, t),
        "n_iter": torch.empty(b, t, dtype=torch.int64, device=x.device),
        "converged": torch.empty(b, t, dtype=torch.bool, device=x.device),
        "errors": torch.empty(b, t, dtype=torch.int64, device=x.device),
    }

    slices = list(iter_slices(b, (d + 1) * n * dtype.itemsize, x.device))
    padded = torch.nn.functional.pad(columns, (0, 1))  # leaves a row for the intercept

    def fit_slices(batches: Iterable[slice]) -> None:
        # Reused for all batches, since allocating the buffer costs as much as filling it.
        buffer = rows.new_empty(slices[0].stop, d + 1, n)
        for batch in batches:
            gathered = buffer[: batch.stop - batch.start]
            torch.index_select(rows, 0, padded[batch].flatten(), out=gathered.view(-1, n))
            frame = _standardise_inplace(gathered[:, :-1])
            gathered[:, -1] = 1
            for j in range(t):
                initial = start and (start[0][batch, j].double(), start[1][batch, j].double())
                fits = _fit(gathered, y[j], frame, C, initial, tol, max_iter)
                # A fit that converged in float32 does not meet a tolerance below float32's.
                unfinished = ~fits.converged | (dtype == torch.float32 and tol < _FLOAT32_TOL)
                at = (unfinished & (fits.n_iter < max_iter)).nonzero()[:, 0]
                if len(at):
                    doubles = rows[columns[batch][at]].double()
                    resumed = refit(doubles, y[j], C, fits.select(at), tol, max_iter)
                    fits = fits.replace_at(at, resumed)
                for name, values in out.items():
                    values[batch, j] = getattr(fits, name).to(values.dtype)

    _run_threads(fit_slices, slices, x.device)
    return out


def extract_neuron_rows(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return contiguous rows (u, n) of neurons of x (n, p), and ``columns`` as indices of rows.

    A view of x if its memory is neuron-major; otherwise a copy of only the columns in use.
    """
    if x.mT.is_contiguous():
        return x.mT, columns
    used, numbers = columns.unique(return_inverse=True)
    return x.index_select(1, used).mT.contiguous(), numbers


def iter_slices(b: int, size: int, device: torch.device) -> Iterator[slice]:
    """Split b problems of ``size`` bytes each into slices that suit the device."""
    count = max(1, (_CPU_BATCH if device.type == "cpu" else _GPU_BATCH) // size)
    return (slice(i, min(i + count, b)) for i in range(0, b, count))


def _run_threads(
    work: Callable[[Iterable[slice]], None], items: list[slice], device: torch.device
) -> None:
    """Call work on the items; on a CPU, threads share them, since LAPACK uses only one."""
    threads = min(torch.get_num_threads(), len(items))
    if device.type != "cpu" or threads == 1:
        work(items)
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [iter(items)] * threads))  # each takes the next when it is free
    finally:
        torch.set_num_threads(before)


def _standardise_inplace(x: Tensor, origin: Tensor | None = None) -> _Frame:
    """Centre each neuron of x (B, d, n) and scale each problem's largest magnitude to 1/2 … 1.

    The intercept absorbs the shift and the penalty the scale, so neither moves the optimum. The
    default origin is the mean, clamped to the neuron's range so that a constant neuron becomes
    exactly zero.
    """
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)  # aminmax is five times slower
    if origin is None:
        origin = x.mean(2, keepdim=True).clamp(low, high)
    reach = torch.maximum(high.double() - origin, origin - low.double()).amax((1, 2))
    scale = torch.exp2(torch.frexp(reach).exponent.double())
    x.sub_(origin).mul_((1 / scale).to(x.dtype)[:, None, None])
    return _Frame(origin[:, :, 0].double(), scale)


def _log_odds(y: Tensor) -> Tensor:
    share = y.double().mean()
    return torch.log(share / (1 - share))


def _fit(
    x: Tensor,
    y: Tensor,
    frame: _Frame,
    C: float,
    start: tuple[Tensor, Tensor] | None,
    tol: float,
    max_iter: int,
) -> Fits:
    """Fit one target y (n,) on standardised x (B, d + 1, n), whose last row is 1."""
    max_steps = torch.full(x.shape[:1], max_iter, device=x.device)
    descent = _Descent(x.float(), y, frame, C, start, max(tol, _FLOAT32_TOL), max_steps)
    if x.dtype == torch.float32:
        return descent.run()
    return _resume(x, y, frame, C, descent.run(), tol, max_iter)


def refit(x: Tensor, y: Tensor, C: float, fits: Fits, tol: float, max_iter: int) -> Fits:
    """Resume fits of one target y (n,) in float64; n_iter counts all steps.

    x: the original activations (b, d, n) float64.
    """
    # The median lies among the ordinary activations, however far away an outlier is.
    median = x.sort(2).values[:, :, x.shape[2] // 2, None]
    x = torch.nn.functional.pad(x, (0, 0, 0, 1), value=1.0)
    frame = _standardise_inplace(x[:, :-1], median)
    return _resume(x, y, frame, C, fits, tol, max_iter, damp=True)


def _resume(
    x: Tensor,
    y: Tensor,
    frame: _Frame,
    C: float,
    fits: Fits,
    tol: float,
    max_iter: int,
    damp: bool = False,
) -> Fits:
    start, max_steps = (fits.coef.double(), fits.intercept.double()), max_iter - fits.n_iter
    resumed = _Descent(x, y, frame, C, start, tol, max_steps, damp).run()
    return resumed._replace(n_iter=fits.n_iter + resumed.n_iter)


class _Descent:
    """Minimise the objectives of problems x (B, d + 1, n) for one target y (n,).

    ``start`` are float64 coefficients (B, d) and intercepts (B,) for the original activations.
    ``damp`` enlarges the diagonal of a Hessian that has no Cholesky factor.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        frame: _Frame,
        C: float,
        start: tuple[Tensor, Tensor] | None,
        tol: float,
        max_steps: Tensor,  # (B,)
        damp: bool = False,
    ) -> None:
        self.y, self.frame, self.tol, self.max_steps, self.damp = y, frame, tol, max_steps, damp
        b, d, _ = x.shape
        scale = frame.scale[:, None]
        penalty = scale.new_zeros(b, d, dtype=x.dtype)
        penalty[:, :-1] = 1 / (C * scale) / scale
        self.objective = objective = Objective(x, 1 - 2 * y.to(x.dtype), penalty)
        self.v = torch.zeros_like(penalty)
        self.v[:, -1] = _log_odds(y)
        self.m = self.v[:, -1:] * objective.flip
        self.cold = start is None
        if start is not None:
            intercept = start[1] + (start[0] * frame.origin).sum(1)
            v = torch.cat([start[0] * scale, intercept[:, None]], 1).to(x.dtype)
            m = objective.margins(v)
            # From a start worse than the default, all weights may vanish and no Newton step exist.
            better = (objective.value(m, v) <= objective.value(self.m, self.v))[:, None]
            self.v, self.m = v.where(better, self.v), m.where(better, self.m)
        self.steps = torch.zeros_like(max_steps)
        self.converged, self.failed, self.noisy = torch.zeros(
            3, b, dtype=torch.bool, device=x.device
        )
        # The diagonal of the last Hessian, and its smallest pivot relative to the diagonal, or 0 if
        # that is only rounding.
        self.curvature = torch.zeros_like(self.v)
        self.min_pivot = torch.zeros_like(self.v[:, 0])

    def run(self) -> Fits:
        """Descend until every problem ends."""
        at, objective = torch.arange(len(self.v), device=self.v.device), self.objective
        if self.cold:
            self._descend(at, objective, warm_up=True)
        while len(at):
            self._descend(at, objective)
            late = (self.steps[at] >= _FLOAT32_STEPS) & (self.v.dtype == torch.float32)
            if bool((self.converged[at] | late).any()):
                self._judge(at, objective)
            active = ~self.converged[at] & (self.steps[at] < self.max_steps[at]) & ~self.failed[at]
            active &= ~(late & self.noisy[at])
            if not bool(active.all()):
                at = at[active]
                objective = self.objective.select(at)
        v = self.v.double()
        coef = v[:, :-1] / self.frame.scale[:, None]
        intercept = v[:, -1] - (coef * self.frame.origin).sum(1)
        wrong = ((self.objective.flip * self.m > 0) != self.y).sum(1)
        return Fits(coef, intercept, self.steps, self.converged & ~self.noisy, wrong)

    def _judge(self, at: Tensor, objective: Objective) -> None:
        """Mark noisy problems ``at``, and revoke convergence that a stale factor caused.

        Noisy: rounding may have moved the optimum too far. To first order the optimum moves by H⁻¹
        times the rounding of the gradient, a sum of rᵢxᵢ, and by H⁻¹XW times the rounding of the
        margins. `min_pivot` estimates the smallest eigenvalue of H scaled to a unit diagonal. Both
        roundings are relative to the centred activations, so they include the rounding of x.

        Stale: a neuron has lost most of its curvature since the Hessian was factored, as happens
        when an outlier crosses to its side of the boundary. The factor then makes steps too short.
        """
        residual = torch.sigmoid(self.m[at])
        # r² bounds the gradient and r (1 - r) the Hessian; their maximum needs only one pass.
        weight = torch.maximum(residual.square(), residual * (1 - residual)).sqrt_()
        pull = torch.cat([weighted.norm(dim=2) for _, weighted in objective.iter_weighted(weight)])
        curvature, min_pivot, w = self.curvature[at, :-1], self.min_pivot[at], self.v[at, :-1]
        size = curvature.sqrt()
        shift = (pull / size).amax(1) / min_pivot + (w * size).norm(dim=1) / min_pivot.sqrt()
        shift *= torch.finfo(w.dtype).eps / size.amin(1)
        self.noisy[at] = ~(shift <= max(self.tol, NOISE) * w.abs().amax(1))
        current = pull.square() + objective.penalty[:, :-1]
        self.converged[at] &= (curvature <= _STALE * current).all(1)

    def _descend(self, at: Tensor, objective: Objective, warm_up: bool = False) -> None:
        """Take up to `_STEPS` steps of problems ``at`` with one Hessian, or only its diagonal."""
        v, tol = self.v[at], self.tol
        m = objective.margins(v)  # anew, since the steps' rounding adds up
        if warm_up:
            diagonal = objective.flat_diagonal(m)
            solve: _Solver = diagonal.reciprocal().mul
        else:
            solve = self._factor(at, objective, m)
        p = torch.sigmoid(m)
        value, gradient = objective.value(m, v), objective.gradient(p, v)
        step = -solve(gradient)
        steps, max_steps = self.steps[at], self.max_steps[at]
        # A step is NaN if the Hessian has no factor, or if the penalty overflows float32.
        finite = step.isfinite().all(1)
        if not warm_up:
            self.failed[at] |= ~finite
        active = finite & ~self.failed[at] & (steps < max_steps)
        converged = torch.zeros_like(active)
        slack = 4 * torch.finfo(v.dtype).eps
        for k in range(_STEPS):
            step = step.where(active[:, None], 0)
            slope = (gradient * step).sum(1)
            change = objective.margins(step)
            t = objective.search(m, p, change, step, slope).where(slope < 0, 0)
            for _ in range(_HALVINGS):
                v2 = torch.addcmul(v, t[:, None], step)
                m2 = torch.addcmul(m, t[:, None], change)
                value2 = objective.value(m2, v2)
                decreases = value2 <= torch.addcmul(value * (1 + slack), t, slope, value=1e-4)
                if bool(decreases.all()):
                    break
                t = torch.where(decreases, t, t / 2)
            steps = steps + active
            if warm_up:
                active = active & (value2 < (1 - _GAIN) * value)
            else:
                longest = t.clamp(min=1)[:, None]  # a shortened step counts in full
                # The first step is a Newton step, which squares the distance to the optimum.
                step_tol = tol if k else max(tol, 1e-2 * tol**0.5)
                converged |= active & _is_small(longest * step, longest * change, v2, m2, step_tol)
                active = active & ~converged
            v, m, value = v2, m2, value2
            active = active & (steps < max_steps)
            if k + 1 == _STEPS or not bool(active.any()):
                break
            p = torch.sigmoid(m)
            new_gradient = objective.gradient(p, v)
            bend, newton = new_gradient - gradient, solve(new_gradient)
            keep = (newton * bend).sum(1) / (step * bend).sum(1)  # 0 / 0 if no step was taken
            step = torch.addcmul(-newton, keep.nan_to_num(0, 0, 0).clamp(min=0)[:, None], step)
            gradient = new_gradient
        self.v[at], self.m[at], self.steps[at], self.converged[at] = v, m, steps, converged

    def _factor(self, at: Tensor, objective: Objective, m: Tensor) -> _Solver:
        """Return the solver for the Hessians, and mark problems whose Hessian has no factor."""
        h = objective.hessian(m)
        d, diagonal = h.shape[1], h.diagonal(dim1=1, dim2=2)
        rounding = 4 * d * torch.finfo(h.dtype).eps
        factor, info = torch.linalg.cholesky_ex(h, upper=True)
        pivot = (factor.diagonal(dim1=1, dim2=2).square() / diagonal).amin(1)
        self.min_pivot[at] = pivot.where((info == 0) & (pivot > rounding), 0)
        if self.damp and bool(info.any()):
            # Steps become too short, so `min_pivot` stays 0, but they lead to a better Hessian.
            diagonal *= 1 + rounding * (info > 0).to(h.dtype)[:, None]
            factor, info = torch.linalg.cholesky_ex(h, upper=True)
        self.curvature[at], self.failed[at] = diagonal, info > 0

        def solve(gradient: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(factor.mT, gradient[:, :, None], upper=False)
            return torch.linalg.solve_triangular(factor, half, upper=True)[:, :, 0]

        return solve


def _is_small(step: Tensor, change: Tensor, v: Tensor, m: Tensor, tol: float) -> Tensor:
    """Return whether steps to v and m, the last of which changed by ``change``, are below tol."""
    size = v.abs()
    size[:, :-1] = size[:, :-1].amax(1, keepdim=True)
    size[:, -1].clamp_(min=1)
    small = (step.abs() <= tol * size).all(1)
    if bool(small.any()):
        # The residual of an outlier is an exponential of its margin: a step that is small in every
        # coefficient may still multiply it.
        margin = m.abs()
        stable = change.abs() <= 10 * tol * margin.clamp(min=1)
        small &= (stable | (margin > _SATURATED)).all(1)
    return small
