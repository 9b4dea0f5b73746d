"""Many small L2-penalised logistic regressions at once: one exact Hessian for ten gradients.

A Newton step of n = 500 stimuli and d = 100 neurons costs 10 million operations for its Hessian,
and a gradient 0.2 million. So one Hessian's factor serves ten steps of limited-memory BFGS, which
starts from it where the textbook starts from a multiple of the identity; then comes the next one.
On a CPU each thread takes problems that its cache holds, and their results do not depend on how
many threads there are.

In float32 the answer is as good as the gradient's rounding allows. Where that is not enough, since
the smallest curvature is too small for it, the problem is gone on with in float64.

Source: Byrd, Nocedal & Schnabel, Representations of quasi-Newton matrices and their use in limited
memory methods, Mathematical Programming 63 (1994), theorem 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

_STEPS = 10  # of BFGS from one Hessian; 8 and 12 take more time, on three kinds of activations
_HALVINGS = 40
_SINGLE = 1e-5  # the tolerance that float32 is trusted with
_ROUGH = 3 * _STEPS  # after so many steps in float32, float64 takes over where rounding shows
# Bytes of activations that go through a CPU's cache together, of each thread, and on a GPU.
_CACHED, _ON_GPU = 2**22 * 3 // 2, 2**30


@dataclass(frozen=True)
class Fits:
    """How the fits of a batch ended; float64."""

    coef: Tensor  # (B, d)
    intercept: Tensor  # (B,)
    n_iter: Tensor  # (B,)
    converged: Tensor  # (B,)
    errors: Tensor  # (B,) wrong hard predictions


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

    def work(batches: list[slice]) -> None:
        # Fresh memory would cost as much as what is written to it.
        space = rows.new_empty(2, batches[0].stop - batches[0].start, d, n)
        for some in batches:
            gathered, spare = space[:, : some.stop - some.start]
            torch.index_select(rows, 0, columns[some].flatten(), out=gathered.view(-1, n))
            origin, scale = _standardise_(gathered)
            for j in range(t):
                begin = None if start is None else (start[0][some, j], start[1][some, j])
                fits = _fit(gathered, spare, y[j], origin, scale, C, tol, max_iter, begin)
                for name, values in out.items():
                    values[some, j] = getattr(fits, name).to(values.dtype)

    _share(work, list(_batches(b, d * n * dtype.itemsize, x.device)), x.device)
    return out


def neuron_major(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous rows (u, n) of neurons, and the columns' numbers among them.

    Without a copy where x (n, p) is laid out so; else of the columns in use alone.
    """
    if x.mT.is_contiguous():
        return x.mT, columns
    used, numbers = columns.unique(return_inverse=True)
    return x.index_select(1, used).mT.contiguous(), numbers


def _batches(b: int, size: int, device: torch.device) -> Iterator[slice]:
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


def _standardise_(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centre each neuron of x (B, d, n) and bring each problem's largest magnitude to 1/2 … 1.

    The intercept takes up a shift and the penalty a scale: neither moves the optimum. Returns what
    was taken, (B, d) and (B,) float64.
    """
    first = x[:, :, :1].clone()
    rest = x.sub_(first).mean(2, keepdim=True)  # exactly zero where a neuron is constant
    x -= rest
    origin = (first.double() + rest)[:, :, 0]
    flat = x.flatten(1)
    largest = torch.maximum(-flat.amin(1), flat.amax(1)).to(torch.float64)
    scale = torch.exp2(torch.frexp(largest).exponent.to(torch.float64))
    x *= (1 / scale).to(x.dtype)[:, None, None]
    return origin, scale


def _fit(
    x: Tensor,
    spare: Tensor,
    y: Tensor,
    origin: Tensor,
    scale: Tensor,
    C: float,
    tol: float,
    max_iter: int,
    start: tuple[Tensor, Tensor] | None,
) -> Fits:
    """The fits of one target y (n,) on what `_standardise_` left of x; spare is overwritten."""
    b, d, _ = x.shape
    penalty = 1 / (C * scale) / scale
    v = torch.zeros(b, d + 1, dtype=torch.float64, device=x.device)
    if start is None:
        share = y.double().mean()
        v[:, d] = torch.log(share / (1 - share))
    else:
        v[:, :d] = start[0] * scale[:, None]
        v[:, d] = start[1] + (start[0].double() * origin).sum(1)
    rough = _Descent(x.float(), y, penalty, v, max(tol, _SINGLE), max_iter)
    rough.run(spare if x.dtype == torch.float32 else torch.empty_like(rough.x))
    v, steps, converged = rough.v.double(), rough.steps, rough.converged
    z = rough.z.double()
    again = ~converged | rough.noisy() | (x.dtype == torch.float64 or tol < _SINGLE)
    if bool(again.any()):
        at = again.nonzero()[:, 0]
        begin = v[at].where(v[at].isfinite().all(1, keepdim=True), 0)
        fine = _Descent(x[at].double(), y, penalty[at], begin, tol, max_iter - steps[at])
        fine.run(spare[: len(at)] if x.dtype == torch.float64 else torch.empty_like(fine.x))
        v[at], z[at], converged[at] = fine.v, fine.z, fine.converged
        steps[at] += fine.steps
    coef = v[:, :d] / scale[:, None]
    intercept = v[:, d] - (coef * origin).sum(1)
    return Fits(coef, intercept, steps, converged, ((z > 0) != y).sum(1))


class _Descent:
    """Minimise Σᵢ log(1 + exp(-sᵢ zᵢ)) + λ/2 w·w, z = xᵀw + c, for problems x (B, d, n).

    After `run`: where it ended, v = (w, c) (B, d + 1), the margins z (B, n), the steps, and which
    converged.
    """

    def __init__(
        self, x: Tensor, y: Tensor, penalty: Tensor, v: Tensor, tol: float, most: Tensor | int
    ) -> None:
        self.x, self.tol, self.d = x, tol, x.shape[1]
        self.flip = 1 - 2 * y.to(x.dtype)  # -s: by it neither loss nor residual cancels
        self.penalty, self.v = penalty.to(x.dtype)[:, None], v.to(x.dtype)
        self.z = _margins(x, self.v)
        self.most = torch.as_tensor(most, device=x.device).expand(len(x))
        self.steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.converged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.least = torch.zeros(len(x), dtype=x.dtype, device=x.device)  # pivot of the last factor

    def run(self, spare: Tensor) -> None:
        """spare: memory of x's shape and dtype."""
        at, x = torch.arange(len(self.x), device=self.x.device), self.x
        while len(at):
            self._leg(at, x, spare[: len(at)])
            going = ~self.converged[at] & (self.steps[at] < self.most[at]) & (self.least[at] > 0)
            if x.dtype == torch.float32 and bool((self.steps[at] >= _ROUGH)[going].any()):
                going &= (self.steps[at] < _ROUGH) | ~self.noisy()[at]
            if not bool(going.all()):
                at = at[going]
                x = self.x[at]

    def noisy(self) -> Tensor:
        """Where the gradient's rounding may move the optimum by more than the tolerance."""
        residual = torch.sigmoid(self.flip * self.z).norm(dim=1)
        noise = torch.finfo(self.x.dtype).eps * residual * self.x.norm(dim=2).amax(1)
        return noise > self.tol * self.v[:, :-1].abs().amax(1) * self.least

    def _leg(self, at: Tensor, x: Tensor, weighted: Tensor) -> None:
        """One Hessian of the problems `at`, and up to `_STEPS` steps with it."""
        v, penalty, tol = self.v[at], self.penalty[at], self.tol
        z = _margins(x, v)
        factor, failed = self._factor(x, z, penalty, weighted)
        self.least[at] = factor.diagonal(dim1=1, dim2=2)[:, :-1].amin(1).square().where(~failed, 0)
        value, gradient = self._value(z, v, penalty), self._gradient(x, z, v, penalty)
        inverse = _Inverse(factor)
        step = -inverse.start(gradient)
        steps, most = self.steps[at], self.most[at]
        converged, going = torch.zeros_like(failed), ~failed & (steps < most)
        slack = 4 * torch.finfo(x.dtype).eps
        for k in range(_STEPS):
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
            converged |= small & going
            going &= ~converged & (steps < most)
            if k + 1 == _STEPS or not bool(going.any()):
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
        self, x: Tensor, z: Tensor, penalty: Tensor, weighted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factors of the Hessians, and which have none."""
        weight = torch.sigmoid(z) * torch.sigmoid(-z)
        torch.mul(x, weight[:, None], out=weighted)
        h = x.new_empty(len(x), self.d + 1, self.d + 1)
        h[:, :-1, :-1] = torch.bmm(weighted, x.mT)
        h[:, :-1, :-1].diagonal(dim1=1, dim2=2).add_(penalty)
        h[:, :-1, -1] = h[:, -1, :-1] = weighted.sum(2)
        h[:, -1, -1] = weight.sum(1)
        factor, info = torch.linalg.cholesky_ex(h, upper=True)
        return factor, info > 0


def _margins(x: Tensor, v: Tensor) -> Tensor:
    """xᵀw + c: a product of one row is several times as fast as one of one column."""
    return torch.baddbmm(v[:, None, -1:], v[:, None, :-1], x)[:, 0]


class _Inverse:
    """The inverse Hessian of B problems: a factor's, and what BFGS has learnt since.

    H = H₀ + P M Pᵀ with P = (S, Z), steps S, Z = H₀Y and changes of the gradient Y. With R the
    upper triangle of SᵀY, D its diagonal and E = D + YᵀZ,

        Hg = H₀g + S R⁻ᵀ(E R⁻¹Sᵀg - Zᵀg) - Z R⁻¹Sᵀg.
    """

    def __init__(self, factor: Tensor) -> None:
        b, m = factor.shape[:2]
        self.factor = factor
        self.pairs = factor.new_zeros(b, 2 * _STEPS, m)  # P, row by row
        self.inverse = factor.new_zeros(b, _STEPS, _STEPS)  # R⁻¹
        self.e = factor.new_zeros(b, _STEPS, _STEPS)
        self.last = self.pairs[:, 0]

    def start(self, gradient: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor.mT, gradient[:, :, None], upper=False)
        self.last = torch.linalg.solve_triangular(self.factor, half, upper=True)[:, :, 0]
        return self.last

    def update(self, k: int, moved: Tensor, turned: Tensor, gradient: Tensor) -> Tensor:
        """Take step k in, and give H times the gradient after it."""
        before = self.last
        now = self.start(gradient)
        curvature = (moved * turned).sum(1)
        fine = (curvature > 0)[:, None]
        self.pairs[:, k] = moved.where(fine, 0)
        self.pairs[:, _STEPS + k] = (now - before).where(fine, 0)
        both = torch.stack([turned.where(fine, 0), gradient], 1)
        (sy, zy), (sg, zg) = (
            a.unbind(1) for a in torch.bmm(both, self.pairs.mT).unflatten(2, (2, -1)).unbind(1)
        )
        self.e[:, k] = self.e[:, :, k] = zy
        self.e[:, k, k] += sy[:, k]
        rho = curvature.where(fine[:, 0], 1)[:, None]
        column = _times(self.inverse, sy) / -rho
        column[:, k] = 1 / rho[:, 0]
        self.inverse[:, :, k] = column
        t = _times(self.inverse, sg)
        u = _times(self.inverse.mT, _times(self.e, t) - zg)
        return torch.baddbmm(now[:, None], torch.cat([u, -t], 1)[:, None], self.pairs)[:, 0]


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(b[:, None], a.mT)[:, 0]
