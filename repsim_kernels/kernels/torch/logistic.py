"""Many small L2-penalised logistic regressions at once: one exact Hessian for ten gradients.

A Newton step of n = 500 stimuli and d = 100 neurons costs 10 million operations for its Hessian,
and a gradient 0.2 million. So one Hessian's factor serves ten steps of limited-memory BFGS, which
starts from it where the textbook starts from a multiple of the identity; then comes the next one.
On a CPU each thread takes problems that its cache holds, and their results do not depend on how
many threads there are.

Descents start in float32. Each is judged at its end by how far rounding may have moved its optimum;
where that is more than 3e-5 of the largest coefficient, or where the descent failed, it resumes in
float64 from the original activations, measured from each neuron's median. One outlier of 10⁷ moves
a neuron's mean by much more than its ordinary activations differ; it leaves the median in place.
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

from repsim_kernels.kernels.torch._bfgs import STEPS, Inverse

_HALVINGS = 40
_SINGLE = 1e-5  # the tolerance that float32 is trusted with
NOISE = 3e-5  # of the largest coefficient: what rounding may move a converged fit by
_ROUGH = 3 * STEPS  # steps in float32 after which float64 takes over where rounding shows
_FAR = 700.0  # the margin from which on a residual is 0 or 1 in float64
_STALE = 16.0  # times the curvature that is left; for ordinary activations it is 6 at most
# Bytes of activations that go through a CPU's cache together, of each thread, and on a GPU.
_CACHED, _ON_GPU = 2**22 * 3 // 2, 2**30


@dataclass(frozen=True)
class _Frame:
    """What was subtracted from each neuron, and what each problem was then divided by; float64."""

    origin: Tensor  # (B, d)
    scale: Tensor  # (B,)


class Fits(NamedTuple):
    """How the fits of a batch ended, on the original activations."""

    coef: Tensor  # (B, d) float64
    intercept: Tensor  # (B,) float64
    n_iter: Tensor  # (B,) int64
    converged: Tensor  # (B,) bool
    errors: Tensor  # (B,) int64, wrong hard predictions

    def chosen(self, at: Tensor) -> Fits:
        return Fits(*(a[at] for a in self))

    def resumed(self, at: Tensor, more: Fits) -> Fits:
        """These fits, where those `at` have gone on to `more`."""
        return Fits(*(a.index_copy(0, at, b) for a, b in zip(self, more, strict=True)))


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
    """Fit targets (t, n) on columns (b, d) of x (n, p): coef (b, t, d), the others (b, t)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = neuron_major(x, columns)
    rows, y = rows.to(dtype), torch.from_numpy(targets).to(x.device)
    (b, d), (t, n) = columns.shape, y.shape
    out = {
        "coef": rows.new_empty(b, t, d),
        "intercept": rows.new_empty(b, t),
        "n_iter": torch.empty(b, t, dtype=torch.int64, device=x.device),
        "converged": torch.empty(b, t, dtype=torch.bool, device=x.device),
        "errors": torch.empty(b, t, dtype=torch.int64, device=x.device),
    }

    def work(slices: list[slice]) -> None:
        # Fresh memory would cost as much as what is written to it.
        space = rows.new_empty(2, slices[0].stop - slices[0].start, d, n)
        for some in slices:
            gathered, spare = space[:, : some.stop - some.start]
            torch.index_select(rows, 0, columns[some].flatten(), out=gathered.view(-1, n))
            frame = _standardise_(gathered)
            for j in range(t):
                if start is None:
                    begin = torch.zeros_like(frame.origin), _log_odds(y[j]).expand_as(frame.scale)
                else:
                    begin = start[0][some, j].double(), start[1][some, j].double()
                fits = _fit(gathered, spare, y[j], frame, C, begin, tol, max_iter)
                # What float32 converges to meets no tolerance below its own.
                again = ~fits.converged | (dtype == torch.float32 and tol < _SINGLE)
                at = (again & (fits.n_iter < max_iter)).nonzero()[:, 0]
                if len(at):
                    own = rows[columns[some][at]].double()
                    fits = fits.resumed(at, refit(own, y[j], C, fits.chosen(at), tol, max_iter))
                for name, values in out.items():
                    values[some, j] = getattr(fits, name).to(values.dtype)

    _share(work, list(iter_slices(b, d * n * dtype.itemsize, x.device)), x.device)
    return out


def neuron_major(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous rows (u, n) of neurons, and the columns' numbers among them.

    Without a copy where x (n, p) is laid out so; else of the columns in use alone.
    """
    if x.mT.is_contiguous():
        return x.mT, columns
    used, numbers = columns.unique(return_inverse=True)
    return x.index_select(1, used).mT.contiguous(), numbers


def iter_slices(b: int, size: int, device: torch.device) -> Iterator[slice]:
    count = max(1, (_CACHED if device.type == "cpu" else _ON_GPU) // size)
    return (slice(i, min(i + count, b)) for i in range(0, b, count))


def _share(work: Callable[[list[slice]], None], items: list[slice], device: torch.device) -> None:
    """Work on all items, on a CPU some on each thread: LAPACK's batches run on one alone."""
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


def _standardise_(x: Tensor, origin: Tensor | None = None) -> _Frame:
    """Centre each neuron of x (B, d, n) and bring each problem's largest magnitude to 1/2 … 1.

    The intercept absorbs a shift and the penalty a scale, so neither moves the optimum. The default
    origin is the mean, kept within the neuron's range: it leaves exact zeros of a constant neuron.
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
    """The fits of one target y (n,) on what `_standardise_` left of x; spare is overwritten."""
    most = torch.full(x.shape[:1], max_iter, device=x.device)
    rough = _Descent(x.float(), y, frame, C, start, max(tol, _SINGLE), most)
    if x.dtype == torch.float32:
        return rough.run(spare)
    fits = rough.run(torch.empty_like(rough.x))
    return _resume(x, y, frame, C, fits, tol, max_iter, spare)


def refit(x: Tensor, y: Tensor, C: float, fits: Fits, tol: float, max_iter: int) -> Fits:
    """Resume fits of one target y (n,) in float64; n_iter counts all steps.

    x: the original activations (b, d, n) float64, overwritten.
    """
    # The median lies among the ordinary activations, however far away an outlier is.
    frame = _standardise_(x, x.sort(2).values[:, :, x.shape[2] // 2, None])
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
    start, most = (fits.coef.double(), fits.intercept.double()), max_iter - fits.n_iter
    more = _Descent(x, y, frame, C, start, tol, most, damp).run(spare)
    return more._replace(n_iter=fits.n_iter + more.n_iter)


class _Descent:
    """Minimise Σᵢ log(1 + exp(-sᵢ zᵢ)) + λ/2 w·w, z = xᵀw + c, for problems x (B, d, n).

    start: coefficients (B, d) and intercepts (B,) of the original activations, float64. most: steps
    (B,). damp: whether a Hessian without a Cholesky factor gets one by a larger diagonal.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        frame: _Frame,
        C: float,
        start: tuple[Tensor, Tensor],
        tol: float,
        most: Tensor,
        damp: bool = False,
    ) -> None:
        self.x, self.frame, self.tol, self.most, self.damp = x, frame, tol, most, damp
        self.y, self.d = y, x.shape[1]
        self.flip = 1 - 2 * y.to(x.dtype)  # -s: by it neither loss nor residual cancels
        scale = frame.scale[:, None]
        self.penalty = (1 / (C * scale) / scale).to(x.dtype)
        intercept = start[1] + (start[0] * frame.origin).sum(1)
        v = torch.cat([start[0] * scale, intercept[:, None]], 1).to(x.dtype)
        z = _margins(x, v)
        # A start that is worse than none may leave all weights zero, and no Newton step from there.
        cold = torch.zeros_like(v)
        cold[:, -1] = _log_odds(y)
        flat = cold[:, -1:].expand_as(z)
        better = self._value(z, v, self.penalty) <= self._value(flat, cold, self.penalty)
        self.v, self.z = v.where(better[:, None], cold), z.where(better[:, None], flat)
        self.steps = torch.zeros_like(most)
        self.converged, self.failed, self.noisy = torch.zeros(
            3, len(x), dtype=torch.bool, device=x.device
        )
        # The last Hessian's diagonal, and the least pivot as a share of it; 0 where that is no
        # more than rounding.
        self.curvature = torch.zeros_like(self.v)
        self.least = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def run(self, spare: Tensor) -> Fits:
        """spare: memory of x's shape and dtype."""
        at, x = torch.arange(len(self.x), device=self.x.device), self.x
        while len(at):
            self._leg(at, x, spare[: len(at)])
            late = (self.steps[at] >= _ROUGH) & (x.dtype == torch.float32)
            if bool((self.converged[at] | late).any()):
                self._judge(at, x, spare[: len(at)])
            going = ~self.converged[at] & (self.steps[at] < self.most[at]) & ~self.failed[at]
            going &= ~(late & self.noisy[at])
            if not bool(going.all()):
                at = at[going]
                x = self.x[at]
        v = self.v.double()
        coef = v[:, :-1] / self.frame.scale[:, None]
        intercept = v[:, -1] - (coef * self.frame.origin).sum(1)
        wrong = ((self.z > 0) != self.y).sum(1)
        return Fits(coef, intercept, self.steps, self.converged & ~self.noisy, wrong)

    def _judge(self, at: Tensor, x: Tensor, spare: Tensor) -> None:
        """Mark the problems `at` that are noisy, and take back convergence by a stale factor.

        Noisy: rounding may move the optimum too far. To first order the optimum moves by H⁻¹ times
        the rounding of the gradient, a sum of rᵢxᵢ, and by H⁻¹XW times the rounding of the margins.
        `least` estimates the smallest eigenvalue of H with its diagonal scaled to 1. Both roundings
        are relative to the centred activations, so they include that of x itself.

        Stale: a neuron has lost most of its curvature since the factor was made, as happens when an
        outlier crosses to its side of the boundary. Steps are then short because of the factor.
        """
        residual = torch.sigmoid(self.flip * self.z[at])
        # At least r² for the gradient, and r (1 - r) for the Hessian: one pass for both.
        share = torch.maximum(residual.square(), residual * (1 - residual))
        pull = torch.mul(x, share.sqrt_()[:, None], out=spare).norm(dim=2)
        curvature, least, w = self.curvature[at, :-1], self.least[at], self.v[at, :-1]
        size = curvature.sqrt()
        moved = (pull / size).amax(1) / least + (w * size).norm(dim=1) / least.sqrt()
        moved *= torch.finfo(x.dtype).eps / size.amin(1)
        self.noisy[at] = ~(moved <= max(self.tol, NOISE) * w.abs().amax(1))
        left = pull.square() + self.penalty[at]
        self.converged[at] &= (curvature <= _STALE * left).all(1)

    def _leg(self, at: Tensor, x: Tensor, weighted: Tensor) -> None:
        """One Hessian of the problems `at`, and up to `STEPS` steps with it."""
        v, penalty, tol = self.v[at], self.penalty[at], self.tol
        z = _margins(x, v)
        factor, failed = self._factor(at, x, z, penalty, weighted)
        value, gradient = self._value(z, v, penalty), self._gradient(x, z, v, penalty)
        inverse = Inverse(factor)
        step = -inverse.start(gradient)
        steps, most = self.steps[at], self.most[at]
        converged, going = torch.zeros_like(failed), ~failed & (steps < most)
        slack = 4 * torch.finfo(x.dtype).eps
        for k in range(STEPS):
            step = step.where(going[:, None], 0)  # NaN where there was no factor
            slope = (gradient * step).sum(1)
            change = _margins(x, step)
            t = (slope < 0).to(x.dtype)
            for _ in range(_HALVINGS):
                v2 = torch.addcmul(v, t[:, None], step)
                z2 = torch.addcmul(z, t[:, None], change)
                value2 = self._value(z2, v2, penalty)
                down = value2 <= value + 1e-4 * t * slope + slack * value
                if bool(down.all()):
                    break
                t = torch.where(down, t, t / 2)
            moved = v2 - v
            v, z, value = v2, z2, value2
            steps = steps + going
            # A step of Newton's own squares the distance.
            enough = tol if k else max(tol, 1e-2 * tol**0.5)
            size, length = v.abs(), step.abs()
            small = length[:, :-1].amax(1) <= enough * size[:, :-1].amax(1)
            small &= length[:, -1] <= enough * size[:, -1].clamp(min=1)
            # An outlier acts by its residual, an exponential of its margin: a step that no
            # coefficient shows may still multiply it.
            kept = change.abs() <= 10 * enough * z.abs().clamp(min=1)
            small &= (kept | (z.abs() > _FAR)).all(1)
            converged |= small & going
            going &= ~converged & (steps < most)
            if k + 1 == STEPS or not bool(going.any()):
                break
            after = self._gradient(x, z, v, penalty)
            step = -inverse.update(k, moved, after - gradient, after)
            gradient = after
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
        """The upper Cholesky factors of the Hessians, and which have none."""
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
        least = (factor.diagonal(dim1=1, dim2=2).square() / diagonal).amin(1)
        self.least[at] = least.where((info == 0) & (least > rounding), 0)
        if self.damp and bool(info.any()):
            # Steps become too short, so `least` stays 0, but they lead to a better Hessian.
            diagonal *= 1 + rounding * (info > 0).to(x.dtype)[:, None]
            factor, info = torch.linalg.cholesky_ex(h, upper=True)
        self.curvature[at], self.failed[at] = diagonal, info > 0
        return factor, info > 0


def _margins(x: Tensor, v: Tensor) -> Tensor:
    """xᵀw + c: a product of one row is several times as fast as one of one column."""
    return torch.baddbmm(v[:, None, -1:], v[:, None, :-1], x)[:, 0]
