"""Rows of the report for solvers: many regressions or many n x n matrices at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from bench.gpu_report.case import (
    Call,
    Case,
    Facts,
    Formula,
    Inputs,
    PlainCupy,
    Shape,
    cast,
    load,
    make_case,
)

_STEPS = 8  # that Riccati iterations, in fours, and Newton's from a cold start take


def fits(s: Shape, count: int, d: int) -> Case:
    """Many logistic regressions at once, on neurons that are drawn at random."""
    rng = np.random.default_rng(0)
    columns = np.stack([rng.choice(s.p, d, replace=False) for _ in range(count)])
    target = np.arange(s.n) % 10 == 0

    def coefficients(path: str, **more: str) -> Call:
        options = {"targets": target[None], "C": 1.0, "tol": 1e-5, "max_iter": 100}
        call = load(path, **options, **more)
        return lambda x: call(x, columns=torch.from_numpy(columns).to(x.device))["coef"][:, 0]

    def formula(xp: Any, dtype: str, x: Tensor) -> Tensor:
        (y,) = cast(xp, dtype, torch.from_numpy(target).to(x.device))
        own = torch.from_numpy(columns).to(x.device).split(256)
        parts = (cast(xp, dtype, x.mT[some])[0] for some in own)
        return torch.cat([_newton(part, y) for part in parts])

    kernel = coefficients("triton.logistic:logistic_fits", precision=s.precision)
    backend = coefficients("torch.logistic:logistic_fits")
    moved = len(np.unique(columns)) * s.n * s.dtype.itemsize + 8 * count * d
    # Hessians, of which one half is enough.
    cost = moved, count * _STEPS * s.n * d * (d + 1)
    detail = f" d={d} b={count:,}"
    # The promise is of the largest coefficient.
    facts: Facts = {"tolerance": 1e-4, "parts": count, "cupy": False}
    return make_case("logistic_fits", s, formula, cost, kernel, backend, detail, **facts)


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


def eigh(batch: int, m: int) -> Case:
    """Eigenvalues and vectors of nearly diagonal matrices, as ablations have them."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device) * 1e-3
        return (a + a.mT + torch.diag(torch.linspace(0, 1, m, dtype=a.dtype, device=g.device)),)

    def formula(xp: Any, dtype: str, a: Any) -> Any:
        w, v = xp.linalg.eigh(a)
        return (v * w[..., None, :]) @ v.swapaxes(1, 2)

    paths = "cupy.spectral:solve_batch", "torch.spectral:eigh"
    size = m, batch * (2 * m * m + m) * 8
    return _spectrum("eigh", f"n={m} C={batch}", inputs, paths, formula, batch, size)


def svd(batch: int, rows: int, n: int) -> Case:
    """Singular values and vectors of tall matrices."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        return (torch.randn(batch, rows, n, generator=g, dtype=torch.float64, device=g.device),)

    def formula(xp: Any, dtype: str, a: Any) -> Any:
        u, s, vh = xp.linalg.svd(a, full_matrices=False)
        return (u * s[..., None, :]) @ vh

    paths = "cupy.spectral:svd", "torch.spectral:svd"
    size = rows, batch * (2 * rows * n + n * n + n) * 8
    return _spectrum("svd", f"n={rows} m={n} C={batch}", inputs, paths, formula, batch, size)


def _spectrum(
    name: str,
    shape: str,
    inputs: Inputs,
    paths: tuple[str, str],
    formula: Formula,
    batch: int,
    size: tuple[int, int],
) -> Case:
    """The matrices, made again of their spectra; ``size``: rows, and bytes that are moved."""

    def restored(call: Callable[..., Any], a: Tensor) -> Tensor:
        parts = call(a)
        left = parts["left"] if name == "svd" else parts["vectors"]
        right = parts["right"] if name == "svd" else left.mT
        return (left * parts["values"][..., None, :]) @ right

    kernel, backend = (partial(restored, load(path, vectors=True)) for path in paths)
    rows, moved = size
    return Case(
        *(name, shape, torch.float64, "ieee", 1e-13 * rows),
        bytes=moved,
        operations=0,  # they depend on the sweeps
        inputs=inputs,
        kernel=kernel,
        reference=lambda a: a,
        routes={"backend": backend, "cupy": PlainCupy(formula)},
        parts=batch,
    )


def riccati(batch: int, m: int) -> Case:
    """The sums of square roots that Procrustes and CCA of all ablations need."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        """Parts with a sixteenth of the whole each, and up to a quarter of a direction."""
        v = torch.linspace(1, 0.05, m, dtype=torch.float64, device=g.device)
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device)
        a *= v[:, None] / (16 * m) ** 0.5
        return v, a @ a.mT

    def eigenvalues(v: Tensor, f: Tensor) -> Tensor:
        return v.sum() - torch.linalg.eigvalsh(torch.diag(v * v) - f).sqrt().sum(-1)

    def deficit(v: Tensor, f: Tensor, advance: str) -> Tensor:
        return load("torch.riccati:solve_deficit")(v, f, load(advance))[0]

    return Case(
        "riccati",
        f"n={m + 1} C={batch}",
        torch.float64,
        "float64",  # on a GPU; a rehearsal's steps are float32
        1e-9,  # what the end of the iterations promises
        bytes=_STEPS * 24 * batch * m**2,
        operations=_STEPS * 2 * batch * m**3,
        inputs=inputs,
        kernel=partial(deficit, advance="triton.riccati:advance"),
        reference=eigenvalues,
        routes={
            "backend": partial(deficit, advance="torch.riccati:advance"),
            "eigenvalues": eigenvalues,
        },
        parts=batch,
    )
