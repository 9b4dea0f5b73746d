"""Many small L2-penalised logistic regressions at once, with one exact Hessian per ten gradients.

With n = 500 stimuli and d = 100 neurons a Hessian costs 10 million operations and a gradient 0.2
million. So each factored Hessian serves ten steps of limited-memory BFGS, which starts from it
instead of from a multiple of the identity. On a CPU each thread works on problems that fit its
cache, and the results do not depend on the number of threads.

Descents start in float32. Each is judged at its end by how far rounding may have moved its optimum.
If that is more than 3e-5 of the largest coefficient, or if the descent failed, it resumes in
float64 from the original activations, relative to each neuron's median. One outlier of 10⁷ moves a
neuron's mean by much more than its ordinary activations differ, but not its median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from repsim_kernels.kernels.torch._bfgs import STEPS, InverseHessian

_HALVINGS = 40
_FLOAT32_TOL = 1e-5  # smallest tolerance for which float32 is trusted
NOISE = 3e-5  # how far rounding may move a converged fit, relative to the largest coefficient
_FLOAT32_STEPS = 3 * STEPS  # after these float32 steps, float64 takes over noisy problems
_SATURATED = 700.0  # margin beyond which a residual is 0 or 1 in float64
# A factor is stale if some neuron's curvature was this many times larger when it was made. For
# ordinary activations the ratio is at most 6.
_STALE = 16.0
# Bytes of activations processed together: by each CPU thread within its cache, and on a GPU.
_CPU_BATCH, _GPU_BATCH = 2**22 * 3 // 2, 2**30


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

    def fit_slices(slices: list[slice]) -> None:
        # Reused for all slices, since allocating the buffers costs as much as filling them.
        buffers = rows.new_empty(2, slices[0].stop - slices[0].start, d, n)
        for batch in slices:
            gathered, spare = buffers[:, : batch.stop - batch.start]
            torch.index_select(rows, 0, columns[batch].flatten(), out=gathered.view(-1, n))
            frame = _standardise_inplace(gathered)
            for j in range(t):
                if start is None:
                    initial = torch.zeros_like(frame.origin), _log_odds(y[j]).expand_as(frame.scale)
                else:
                    initial = start[0][batch, j].double(), start[1][batch, j].double()
                fits = _fit(gathered, spare, y[j], frame, C, initial, tol, max_iter)
                # A fit that converged in float32 does not meet a tolerance below float32's.
                unfinished = ~fits.converged | (dtype == torch.float32 and tol < _FLOAT32_TOL)
                at = (unfinished & (fits.n_iter < max_iter)).nonzero()[:, 0]
                if len(at):
                    doubles = rows[columns[batch][at]].double()
                    resumed = refit(doubles, y[j], C, fits.select(at), tol, max_iter)
                    fits = fits.replace_at(at, resumed)
                for name, values in out.items():
                    values[batch, j] = getattr(fits, name).to(values.dtype)

    _run_threads(fit_slices, list(iter_slices(b, d * n * dtype.itemsize, x.device)), x.device)
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
    work: Callable[[list[slice]], None], items: list[slice], device: torch.device
) -> None:
    """Call work on the items; on a CPU, split them over threads, since LAPACK uses only one."""
    threads = min(torch.get_num_threads(), len(items))
    if device.type != "cpu" or threads == 1:
        work(items)
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, (items[i::threads] for i in range(threads))))
    finally:
        torch.set_num_threads(before)


def _standardise_inplace(x: Tensor, origin: Tensor | None = None) -> _Frame:
    """Centre each neuron of x (B, d, n) and scale each problem's largest magnitude to 1/2 … 1.

    The intercept absorbs the shift and the penalty the scale, so neither moves the optimum. The
    default origin is the mean, clamped to the neuron's range so that a constant neuron becomes
    exactly zero.
    """
    low, high = x.aminmax(dim=2, keepdim=True)
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
    spare: Tensor,
    y: Tensor,
    frame: _Frame,
    C: float,
    start: tuple[Tensor, Tensor],
    tol: float,
    max_iter: int,
) -> Fits:
    """Fit one target y (n,) on standardised x; ``spare`` is overwritten."""
    max_steps = torch.full(x.shape[:1], max_iter, device=x.device)
    descent = _Descent(x.float(), y, frame, C, start, max(tol, _FLOAT32_TOL), max_steps)
    if x.dtype == torch.float32:
        return descent.run(spare)
    fits = descent.run(torch.empty_like(descent.x))
    return _resume(x, y, frame, C, fits, tol, max_iter, spare)


def refit(x: Tensor, y: Tensor, C: float, fits: Fits, tol: float, max_iter: int) -> Fits:
    """Resume fits of one target y (n,) in float64; n_iter counts all steps.

    x: the original activations (b, d, n) float64, overwritten.
    """
    # The median lies among the ordinary activations, however far away an outlier is.
    frame = _standardise_inplace(x, x.sort(2).values[:, :, x.shape[2] // 2, None])
    return _resume(x, y, frame, C, fits, tol, max_iter, torch.empty_like(x), damp=True)


def _resume(
    x: Tensor,
    y: Tensor,
    frame: _Frame,
    C: float,
    fits: Fits,
    tol: float,
    max_iter: int,
    spare: Tensor,
    damp: bool = False,
) -> Fits:
    start, max_steps = (fits.coef.double(), fits.intercept.double()), max_iter - fits.n_iter
    resumed = _Descent(x, y, frame, C, start, tol, max_steps, damp).run(spare)
    return resumed._replace(n_iter=fits.n_iter + resumed.n_iter)


class _Descent:
    """Minimise Σᵢ log(1 + exp(-sᵢ zᵢ)) + λ/2 w·w, z = xᵀw + c, for problems x (B, d, n).

    ``start`` are float64 coefficients (B, d) and intercepts (B,) for the original activations.
    ``damp`` enlarges the diagonal of a Hessian that has no Cholesky factor.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        frame: _Frame,
        C: float,
        start: tuple[Tensor, Tensor],
        tol: float,
        max_steps: Tensor,  # (B,)
        damp: bool = False,
    ) -> None:
        self.x, self.frame, self.tol, self.max_steps, self.damp = x, frame, tol, max_steps, damp
        self.y, self.d = y, x.shape[1]
        self.flip = 1 - 2 * y.to(x.dtype)  # -s, with which neither loss nor residual cancels
        scale = frame.scale[:, None]
        self.penalty = (1 / (C * scale) / scale).to(x.dtype)
        intercept = start[1] + (start[0] * frame.origin).sum(1)
        v = torch.cat([start[0] * scale, intercept[:, None]], 1).to(x.dtype)
        z = _margins(x, v)
        # From a start worse than the default, all weights may vanish and no Newton step exist.
        default_v = torch.zeros_like(v)
        default_v[:, -1] = _log_odds(y)
        default_z = default_v[:, -1:].expand_as(z)
        default_value = self._value(default_z, default_v, self.penalty)
        better = (self._value(z, v, self.penalty) <= default_value)[:, None]
        self.v, self.z = v.where(better, default_v), z.where(better, default_z)
        self.steps = torch.zeros_like(max_steps)
        self.converged, self.failed, self.noisy = torch.zeros(
            3, len(x), dtype=torch.bool, device=x.device
        )
        # The diagonal of the last Hessian, and its smallest pivot relative to the diagonal, or 0 if
        # that is only rounding.
        self.curvature = torch.zeros_like(self.v)
        self.min_pivot = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def run(self, spare: Tensor) -> Fits:
        """Descend until every problem ends; ``spare`` is a buffer with x's shape and dtype."""
        at, x = torch.arange(len(self.x), device=self.x.device), self.x
        while len(at):
            self._descend(at, x, spare[: len(at)])
            late = (self.steps[at] >= _FLOAT32_STEPS) & (x.dtype == torch.float32)
            if bool((self.converged[at] | late).any()):
                self._judge(at, x, spare[: len(at)])
            active = ~self.converged[at] & (self.steps[at] < self.max_steps[at]) & ~self.failed[at]
            active &= ~(late & self.noisy[at])
            if not bool(active.all()):
                at = at[active]
                x = self.x[at]
        v = self.v.double()
        coef = v[:, :-1] / self.frame.scale[:, None]
        intercept = v[:, -1] - (coef * self.frame.origin).sum(1)
        wrong = ((self.z > 0) != self.y).sum(1)
        return Fits(coef, intercept, self.steps, self.converged & ~self.noisy, wrong)

    def _judge(self, at: Tensor, x: Tensor, spare: Tensor) -> None:
        """Mark noisy problems ``at``, and revoke convergence that a stale factor caused.

        Noisy: rounding may have moved the optimum too far. To first order the optimum moves by H⁻¹
        times the rounding of the gradient, a sum of rᵢxᵢ, and by H⁻¹XW times the rounding of the
        margins. `min_pivot` estimates the smallest eigenvalue of H scaled to a unit diagonal. Both
        roundings are relative to the centred activations, so they include the rounding of x.

        Stale: a neuron has lost most of its curvature since the Hessian was factored, as happens
        when an outlier crosses to its side of the boundary. The factor then makes steps too short.
        """
        residual = torch.sigmoid(self.flip * self.z[at])
        # r² bounds the gradient and r (1 - r) the Hessian; their maximum needs only one pass.
        weight = torch.maximum(residual.square(), residual * (1 - residual))
        pull = torch.mul(x, weight.sqrt_()[:, None], out=spare).norm(dim=2)
        curvature, min_pivot, w = self.curvature[at, :-1], self.min_pivot[at], self.v[at, :-1]
        size = curvature.sqrt()
        shift = (pull / size).amax(1) / min_pivot + (w * size).norm(dim=1) / min_pivot.sqrt()
        shift *= torch.finfo(x.dtype).eps / size.amin(1)
        self.noisy[at] = ~(shift <= max(self.tol, NOISE) * w.abs().amax(1))
        current = pull.square() + self.penalty[at]
        self.converged[at] &= (curvature <= _STALE * current).all(1)

    def _descend(self, at: Tensor, x: Tensor, weighted: Tensor) -> None:
        """Factor the Hessians of problems ``at``, and take up to `STEPS` steps with them."""
        v, penalty, tol = self.v[at], self.penalty[at], self.tol
        z = _margins(x, v)
        factor, failed = self._factor(at, x, z, penalty, weighted)
        value, gradient = self._value(z, v, penalty), self._gradient(x, z, v, penalty)
        inverse = InverseHessian(factor)
        step = -inverse.start(gradient)
        steps, max_steps = self.steps[at], self.max_steps[at]
        converged, active = torch.zeros_like(failed), ~failed & (steps < max_steps)
        slack = 4 * torch.finfo(x.dtype).eps
        for k in range(STEPS):
            step = step.where(active[:, None], 0)  # it is NaN if the Hessian has no factor
            slope = (gradient * step).sum(1)
            change = _margins(x, step)
            t = (slope < 0).to(x.dtype)
            for _ in range(_HALVINGS):
                v2 = torch.addcmul(v, t[:, None], step)
                z2 = torch.addcmul(z, t[:, None], change)
                value2 = self._value(z2, v2, penalty)
                decreases = value2 <= value + 1e-4 * t * slope + slack * value
                if bool(decreases.all()):
                    break
                t = torch.where(decreases, t, t / 2)
            taken_step = v2 - v
            v, z, value = v2, z2, value2
            steps = steps + active
            # The first step is a Newton step, which squares the distance to the optimum.
            step_tol = tol if k else max(tol, 1e-2 * tol**0.5)
            size, length = v.abs(), step.abs()
            small = length[:, :-1].amax(1) <= step_tol * size[:, :-1].amax(1)
            small &= length[:, -1] <= step_tol * size[:, -1].clamp(min=1)
            # The residual of an outlier is an exponential of its margin: a step that is small in
            # every coefficient may still multiply it.
            stable = change.abs() <= 10 * step_tol * z.abs().clamp(min=1)
            small &= (stable | (z.abs() > _SATURATED)).all(1)
            converged |= small & active
            active &= ~converged & (steps < max_steps)
            if k + 1 == STEPS or not bool(active.any()):
                break
            new_gradient = self._gradient(x, z, v, penalty)
            step = -inverse.update(k, taken_step, new_gradient - gradient, new_gradient)
            gradient = new_gradient
        self.v[at], self.z[at], self.steps[at], self.converged[at] = v, z, steps, converged

    def _value(self, z: Tensor, v: Tensor, penalty: Tensor) -> Tensor:
        loss = softplus(self.flip * z).sum(1)
        return loss.addcmul_(penalty[:, 0], v[:, :-1].square().sum(1), value=0.5)

    def _gradient(self, x: Tensor, z: Tensor, v: Tensor, penalty: Tensor) -> Tensor:
        residual = torch.sigmoid(self.flip * z).mul_(self.flip)
        out = v * penalty
        out[:, -1] = residual.sum(1)
        out[:, :-1] += torch.bmm(residual[:, None], x.mT)[:, 0]
        return out

    def _factor(
        self, at: Tensor, x: Tensor, z: Tensor, penalty: Tensor, weighted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the upper Cholesky factors of the Hessians, and which problems have none."""
        weight = torch.sigmoid(z) * torch.sigmoid(-z)
        torch.mul(x, weight[:, None], out=weighted)
        h = x.new_empty(len(x), self.d + 1, self.d + 1)
        diagonal = h.diagonal(dim1=1, dim2=2)
        h[:, :-1, :-1] = torch.bmm(weighted, x.mT)
        diagonal[:, :-1] += penalty
        h[:, :-1, -1] = h[:, -1, :-1] = weighted.sum(2)
        h[:, -1, -1] = weight.sum(1)
        rounding = 4 * (self.d + 1) * torch.finfo(x.dtype).eps
        factor, info = torch.linalg.cholesky_ex(h, upper=True)
        pivot = (factor.diagonal(dim1=1, dim2=2).square() / diagonal).amin(1)
        self.min_pivot[at] = pivot.where((info == 0) & (pivot > rounding), 0)
        if self.damp and bool(info.any()):
            # Steps become too short, so `min_pivot` stays 0, but they lead to a better Hessian.
            diagonal *= 1 + rounding * (info > 0).to(x.dtype)[:, None]
            factor, info = torch.linalg.cholesky_ex(h, upper=True)
        self.curvature[at], self.failed[at] = diagonal, info > 0
        return factor, info > 0


def _margins(x: Tensor, v: Tensor) -> Tensor:
    """Return xᵀw + c; multiplying a row is several times as fast as multiplying a column."""
    return torch.baddbmm(v[:, None, -1:], v[:, None, :-1], x)[:, 0]
