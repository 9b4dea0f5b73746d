"""Rows of the sheet for many logistic regressions at once."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.gpu_report.case import Case, Shape, function

_STEPS = 8  # of Newton's, from a cold start


def cases(quick: bool) -> list[Case]:
    if quick:
        return [_fits(Shape(12, 50, 0, torch.float32), 4, 8)]
    shapes = [Shape(500, 100_352, 0, dtype) for dtype in (torch.float32, torch.bfloat16)]
    shapes.append(Shape(500, 100_352, 0, torch.float32, "tf32"))
    return [_fits(s, 4096, 100) for s in shapes]


def _fits(s: Shape, count: int, d: int) -> Case:
    rng = np.random.default_rng(0)
    columns = np.stack([rng.choice(s.p, d, replace=False) for _ in range(count)])
    target = np.arange(s.n) % 10 == 0
    options = {"targets": target[None], "C": 1.0, "tol": 1e-5, "max_iter": 100}

    def fits(x: Tensor, path: str, **more: str) -> Tensor:
        own = torch.from_numpy(columns).to(x.device)
        return function(path)(x, columns=own, **options, **more)["coef"][:, 0]

    def newton(x: Tensor, dtype: torch.dtype) -> Tensor:
        y = torch.from_numpy(target).to(x.device, dtype)
        found = []
        for own in torch.from_numpy(columns).to(x.device).split(256):
            found.append(_newton(x.mT[own].to(dtype), y))
        return torch.cat(found)

    used = len(np.unique(columns))
    return Case(
        "logistic_fits",
        f"n={s.n} p={s.p:,} d={d} b={count:,}",
        s.dtype,
        s.precision,
        1e-4,  # the promise: of the largest coefficient
        bytes=used * s.n * s.dtype.itemsize + 8 * count * d,
        operations=count * _STEPS * s.n * d * (d + 1),  # Hessians, of which one half is enough
        inputs=s.activations,
        kernel=partial(fits, path="triton.logistic:logistic_fits", precision=s.precision),
        reference=lambda x: newton(x, torch.float64),
        routes={
            "backend": partial(fits, path="torch.logistic:logistic_fits"),
            "plain": lambda x: newton(x, torch.float32),
        },
        parts=count,
    )


def _newton(x: Tensor, y: Tensor) -> Tensor:
    """Coefficients (b, d) for x (b, d, n), by Newton's method without any care."""
    a = torch.cat([x - x.mean(2, keepdim=True), torch.ones_like(x[:, :1])], 1)
    penalty = torch.ones(a.shape[1], dtype=x.dtype, device=x.device)
    penalty[-1] = 0
    v = torch.zeros_like(a[:, :, 0])
    for _ in range(15):
        p = torch.sigmoid((v[:, None] @ a)[:, 0])
        gradient = (a @ (p - y)[:, :, None])[:, :, 0] + penalty * v
        hessian = (a * (p * (1 - p))[:, None]) @ a.mT + penalty.diag()
        v = v - torch.linalg.solve(hessian, gradient)
    return v[:, :-1]
