"""Rows of the sheet for what follows the Gram matrices, n x n in float64, and for CUDA C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu_report.case import PRODUCTS, Case, Shape, function, labelled, members
from bench.gpu_report.plain_cupy import PlainCupy, cell_grams

_DEFICITS = 1e-9  # what the end of the iterations promises
_STEPS = 8  # that these parts take, in fours
_LAYERS = ((50, 193_600), (500, 100_352))


def cases(quick: bool) -> list[Case]:
    if quick:  # CUDA C++ is started by CuPy, which has no rehearsal without a GPU
        return [_riccati(4, 11)]
    return [_riccati(16, 499), _riccati(100, 49), *native(quick)]


def native(quick: bool) -> list[Case]:
    """Rows of the CUDA C++ kernels."""
    if quick:
        return [_eigh(4, 11), _svd(4, 12, 11), _cell_grams(Shape(12, 50, 4, torch.float32, "ieee"))]
    eigh = [_eigh(*s) for s in ((1000, 49), (100, 127), (16, 499))]
    grams = [_cell_grams(Shape(n, p, 16, torch.float32, "ieee")) for n, p in _LAYERS]
    return [*eigh, _svd(1000, 50, 49), *grams]


def _eigh(batch: int, m: int) -> Case:
    """Eigenvalues and vectors of nearly diagonal matrices, as ablations have them."""

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device) * 1e-3
        return (a + a.mT + torch.diag(torch.linspace(0, 1, m, dtype=a.dtype, device=g.device)),)

    def restored(found: dict[str, Tensor]) -> Tensor:
        w, v = found["values"], found["vectors"]
        return (v * w[..., None, :]) @ v.mT

    def by_cupy(xp: Any, a: Any) -> Any:
        w, v = xp.linalg.eigh(a)
        return (v * w[..., None, :]) @ v.swapaxes(1, 2)

    return Case(
        "eigh",
        f"n={m} C={batch}",
        torch.float64,
        "ieee",
        1e-13 * m,
        bytes=batch * (2 * m * m + m) * 8,
        operations=0,  # they depend on the sweeps
        inputs=inputs,
        kernel=lambda a: restored(function("cupy.spectral:solve_batch")(a, vectors=True)),
        reference=lambda a: a,
        routes={
            "backend": lambda a: restored(function("torch.spectral:eigh")(a, vectors=True)),
            "cupy": PlainCupy(by_cupy),
        },
        parts=batch,
    )


def _svd(batch: int, rows: int, n: int) -> Case:
    """Singular values and vectors of tall matrices."""

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(batch, rows, n, generator=g, dtype=torch.float64, device=g.device),)

    def restored(found: dict[str, Tensor]) -> Tensor:
        return (found["left"] * found["values"][..., None, :]) @ found["right"]

    def by_cupy(xp: Any, a: Any) -> Any:
        u, s, vh = xp.linalg.svd(a, full_matrices=False)
        return (u * s[..., None, :]) @ vh

    return Case(
        "svd",
        f"n={rows} m={n} C={batch}",
        torch.float64,
        "ieee",
        1e-13 * rows,
        bytes=batch * (2 * rows * n + n * n + n) * 8,
        operations=0,  # they depend on the sweeps
        inputs=inputs,
        kernel=lambda a: restored(function("cupy.spectral:svd")(a, vectors=True)),
        reference=lambda a: a,
        routes={
            "backend": lambda a: restored(function("torch.spectral:svd")(a, vectors=True)),
            "cupy": PlainCupy(by_cupy),
        },
        parts=batch,
    )


def _cell_grams(s: Shape) -> Case:
    cells = labelled(s)

    def grams(x: Tensor, module: str) -> Tensor:
        return function(f"{module}.gram:cell_grams")(x, cells=cells, n_cells=s.cells)

    return Case(
        "cell_grams, CUDA C++",
        f"n={s.n} p={s.p:,} C={s.cells}",
        s.dtype,
        s.precision,
        PRODUCTS[s.precision],
        bytes=s.size + 8 * s.cells * s.n**2,
        operations=s.n * (s.n + 1) * s.p,
        inputs=s.activations,
        kernel=lambda x: grams(x, "cupy"),
        reference=lambda x: grams(x.double(), "torch"),
        routes={
            "backend": lambda x: grams(x, "torch"),
            "cupy": PlainCupy(cell_grams, lambda device: members(s, 0, device)),
        },
        parts=s.cells,
    )


def _riccati(batch: int, m: int) -> Case:
    """The sums of square roots that Procrustes and CCA of all ablations need."""

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        """Parts with a sixteenth of the whole each, and up to a quarter of a direction."""
        v = torch.linspace(1, 0.05, m, dtype=torch.float64, device=g.device)
        a = torch.randn(batch, m, m, generator=g, dtype=torch.float64, device=g.device)
        a *= v[:, None] / (16 * m) ** 0.5
        return v, a @ a.mT

    def eigenvalues(v: Tensor, f: Tensor) -> Tensor:
        return v.sum() - torch.linalg.eigvalsh(torch.diag(v * v) - f).sqrt().sum(-1)

    def deficit(v: Tensor, f: Tensor, advance: str) -> Tensor:
        return function("torch.riccati:deficit")(v, f, function(advance))[0]

    return Case(
        "riccati",
        f"n={m + 1} C={batch}",
        torch.float64,
        "float64",  # on a GPU; a rehearsal's steps are float32
        _DEFICITS,
        bytes=_STEPS * 24 * batch * m**2,
        operations=_STEPS * 2 * batch * m**3,
        inputs=inputs,
        kernel=lambda v, f: deficit(v, f, "triton.riccati:advance"),
        reference=eigenvalues,
        routes={
            "backend": lambda v, f: deficit(v, f, "torch.riccati:advance"),
            "eigenvalues": eigenvalues,
        },
        parts=batch,
    )
