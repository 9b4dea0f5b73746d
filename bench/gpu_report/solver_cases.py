"""Rows of the report for solvers: many regressions or many n x n matrices per call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from bench.gpu_report.case import (
    Call,
    Facts,
    Formula,
    Inputs,
    KernelCase,
    PlainCupy,
    Shape,
    cast,
    load,
    make_case,
)

_STEPS = 8  # of Riccati iterations (in groups of four) and of Newton's method from zero


def make_fits_row(s: Shape, count: int, d: int) -> KernelCase:
    """Return the row of many logistic regressions on randomly drawn neurons."""
    rng = np.random.default_rng(0)
    columns = np.stack([rng.choice(s.p, d, replace=False) for _ in range(count)])
    target = np.arange(s.n) % 10 == 0

    def coefficients(path: str, **extra: str) -> Call:
        options = {"targets": target[None], "C": 1.0, "tol": 1e-5, "max_iter": 100}
        call = load(path, **options, **extra)
        return lambda x: call(x, columns=torch.from_numpy(columns).to(x.device))["coef"][:, 0]

    def formula(xp: Any, dtype: str, x: Tensor) -> Tensor:
        (y,) = cast(xp, dtype, torch.from_numpy(target).to(x.device))
        blocks = torch.from_numpy(columns).to(x.device).split(256)
        parts = (cast(xp, dtype, x.mT[block])[0] for block in blocks)
        return torch.cat([_fit_by_newton(part, y) for part in parts])

    kernel = coefficients("triton.logistic:logistic_fits", precision=s.precision)
    backend = coefficients("torch.logistic:logistic_fits")
    moved = len(np.unique(columns)) * s.n * s.dtype.itemsize + 8 * count * d
    # The Hessians; they are symmetric, so half of each is enough.
    cost = moved, count * _STEPS * s.n * d * (d + 1)
    detail = f" d={d} b={count:,}"
    # The tolerance is relative to the largest coefficient.
    facts: Facts = {"tolerance": 1e-4, "parts": count, "cupy": False}
    return make_case("logistic_fits", s, formula, cost, kernel, backend, detail, **facts)


def _fit_by_newton(x: Tensor, y: Tensor) -> Tensor:
    """Return coefficients (b, d) for x (b, d, n) by plain Newton steps, without safeguards."""
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


def make_eigh_row(batch: int, m: int) -> KernelCase:
    """Return the row of eigendecompositions of nearly diagonal matrices, as in ablations."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device) * 1e-3
        return (a + a.mT + torch.diag(torch.linspace(0, 1, m, dtype=a.dtype, device=g.device)),)

    def formula(xp: Any, dtype: str, a: Any) -> Any:
        w, v = xp.linalg.eigh(a)
        return (v * w[..., None, :]) @ v.swapaxes(1, 2)

    paths = "cupy.spectral:solve_batch", "torch.spectral:eigh"
    size = m, batch * (2 * m * m + m) * 8
    return _make_spectrum_row("eigh", f"n={m} C={batch}", inputs, paths, formula, batch, size)


def make_svd_row(batch: int, rows: int, n: int) -> KernelCase:
    """Return the row of singular value decompositions of tall matrices."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        return (torch.randn(batch, rows, n, generator=g, dtype=torch.float64, device=g.device),)

    def formula(xp: Any, dtype: str, a: Any) -> Any:
        u, s, vh = xp.linalg.svd(a, full_matrices=False)
        return (u * s[..., None, :]) @ vh

    paths = "cupy.spectral:svd", "torch.spectral:svd"
    size = rows, batch * (2 * rows * n + n * n + n) * 8
    return _make_spectrum_row(
        "svd", f"n={rows} m={n} C={batch}", inputs, paths, formula, batch, size
    )


def _make_spectrum_row(
    name: str,
    shape: str,
    inputs: Inputs,
    paths: tuple[str, str],
    formula: Formula,
    batch: int,
    size: tuple[int, int],
) -> KernelCase:
    """Return a row that rebuilds matrices from their spectra; ``size`` is (rows, bytes)."""

    def restore(call: Callable[..., Any], a: Tensor) -> Tensor:
        parts = call(a)
        left = parts["left"] if name == "svd" else parts["vectors"]
        right = parts["right"] if name == "svd" else left.mT
        return (left * parts["values"][..., None, :]) @ right

    kernel, backend = (partial(restore, load(path, vectors=True)) for path in paths)
    rows, moved = size
    return KernelCase(
        *(name, shape, torch.float64, "ieee", 1e-13 * rows),
        bytes=moved,
        operations=0,  # they depend on the number of sweeps
        inputs=inputs,
        kernel=kernel,
        reference=lambda a: a,
        routes={"backend": backend, "cupy": PlainCupy(formula)},
        parts=batch,
    )


def make_riccati_row(batch: int, m: int) -> KernelCase:
    """Return the row of the sums of square roots for Procrustes and CCA of all ablations."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        """Draw parts that hold a sixteenth of the whole, and up to a quarter of a direction."""
        v = torch.linspace(1, 0.05, m, dtype=torch.float64, device=g.device)
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device)
        a *= v[:, None] / (16 * m) ** 0.5
        return v, a @ a.mT

    def eigenvalues(v: Tensor, f: Tensor) -> Tensor:
        return v.sum() - torch.linalg.eigvalsh(torch.diag(v * v) - f).sqrt().sum(-1)

    def deficit(v: Tensor, f: Tensor, advance: str) -> Tensor:
        return load("torch.riccati:solve_deficit")(v, f, load(advance))[0]

    return KernelCase(
        "riccati",
        f"n={m + 1} C={batch}",
        torch.float64,
        "float64",  # on a GPU; the steps of a rehearsal are float32
        1e-9,  # the accuracy promised by the final Newton step
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
