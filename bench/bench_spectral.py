"""The n x n stage alone: from Grams to distances, and spectra of many matrices.

``gram_ablation_distances`` is what users call. The stage within ``ablation_distances`` ends before
PWCCA's pass over the neurons, with its canonical variates; it is timed beside an eigh and SVDs for
each ablated Gram.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.inputs import DEVICE, activations, cells
from bench.common.tolerances import SAME, Tol, assert_close
from repsim_kernels.kernels.torch import cka, gram, panels, representation
from repsim_kernels.kernels.torch.spectral_distances import AblationBatch, Original

if DEVICE == "cuda":
    from repsim_kernels.kernels.triton.spectral import SOLVERS
else:
    from repsim_kernels.kernels.torch.spectral_distances import SOLVERS

Pair = tuple[Tensor, Tensor]
RIDGE = 0.1
METRICS = {
    "five metrics": ("cka", "procrustes", "cca", "cca_squared", "pwcca"),
    "Procrustes": ("procrustes",),
    "ridge CCA": ("cca", "cca_squared"),
}
GRAMS = ((500, 16), (50, 100))  # stimuli and cells
MATRICES = ((50, 100), (200, 16))  # sides and how many


@cache
def grams(n: int, n_cells: int) -> tuple[Tensor, Tensor]:
    """The Gram of rectified activations and those of their cells, float64."""
    x = activations(Generator(DEVICE).manual_seed(0), n, 20_000)
    parts = rk.cell_grams(x, cells(20_000, n_cells))
    return parts.sum(0), parts


def made(n: int, n_cells: int) -> Callable[[Generator], tuple[Tensor, ...]]:
    """The same numbers each time, in memory of their own."""
    return lambda g: tuple(t.clone() for t in grams(n, n_cells))


def unweighted(h: Tensor) -> Tensor:
    """What stands in the place of PWCCA's weights where there are no neurons."""
    return h.abs().sum(-1)


def pwcca(weights: Tensor, rho: Tensor) -> Tensor:
    return 1 - (weights * rho).sum(-1) / weights.sum(-1)


def ours(whole: Tensor, parts: Tensor, metrics: tuple[str, ...]) -> dict[str, Tensor]:
    """The package's stage, with the sums of PWCCA's variates in the place of its weights."""
    n = len(whole)
    original = Original(representation.spectrum_of_gram(whole), n, n - 1, RIDGE, 0.0, SOLVERS)
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    (flat,) = gram.to_vectors(panels.panels_view(whole[None]), u_centred=False)
    for batch in gram.iter_batches(list(range(len(parts))), whole):
        ablated = AblationBatch(original, cell=parts[batch])
        if "cka" in metrics:
            m = gram.to_vectors(panels.panels_view(parts[batch]), u_centred=False)
            found["cka"].append(cka.cosine_distance(m, flat, False, torch.zeros(())))
        if "procrustes" in metrics:
            found["procrustes"].append(ablated.procrustes()[0])
        if "pwcca" in metrics:
            h, rho = ablated.variates()
            found["pwcca"].append(pwcca(unweighted(h), rho))
        if "cca" in metrics:
            found["cca"].append(ablated.cca("pwcca" in metrics)[0])
            found["cca_squared"].append(ablated.cca_squared()[0])
    return {name: torch.cat(values) for name, values in found.items()}


def by_svd(
    whole: Tensor,
    parts: Tensor,
    metrics: tuple[str, ...],
    weigh: Callable[[Tensor], Tensor] = unweighted,
) -> dict[str, Tensor]:
    """What the definitions say: the spectrum of each ablated Gram, and the SVDs of products.

    ``weigh`` takes canonical variates (..., k, n) and gives PWCCA's weights (..., k).
    """
    n = len(whole)
    basis, v = representation.spectrum_of_gram(whole)
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    root = (v / (v + RIDGE * v.sum() / n)).sqrt()
    for batch in gram.iter_batches(list(range(len(parts))), whole):
        left = whole - parts[batch]
        if "cka" in metrics:
            similarity = (left * whole).sum((1, 2)) / left.square().sum((1, 2)).sqrt()
            found["cka"].append(1 - similarity / whole.square().sum().sqrt())
        u, w = representation.spectrum_of_gram(left)
        turned = basis.mT @ u
        if "procrustes" in metrics:
            matrix = v.sqrt()[:, None] * turned * w.sqrt()[:, None, :]
            nuclear = torch.linalg.svdvals(matrix).sum(-1)
            found["procrustes"].append(2 - 2 * nuclear / (v.sum() * w.sum(-1)).sqrt())
        if "cca" in metrics:
            other = (w / (w + RIDGE * w.sum(-1, keepdim=True) / n)).sqrt()
            matrix = root[:, None] * turned * other[:, None, :]
            if "pwcca" in metrics:
                directions, rho, _ = torch.linalg.svd(matrix)
                h = directions.mT @ representation.from_complement(root * basis).mT
                found["pwcca"].append(pwcca(weigh(h), rho))
            else:
                rho = torch.linalg.svdvals(matrix)
            found["cca"].append(1 - rho.sum(-1) / (n - 1))
            found["cca_squared"].append(1 - rho.square().sum(-1) / (n - 1))
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize(("n", "n_cells"), GRAMS)
@pytest.mark.parametrize("metrics", METRICS)
@pytest.mark.parametrize(
    ("name", "route", "other"),
    [("repsim_kernels", ours, by_svd), ("an eigh and SVDs for each", by_svd, ours)],
    ids=["ours", "by_svd"],
)
def test_stage(timed, n, n_cells, metrics, name, route, other):
    timed(
        "from Grams to distances",
        made(n, n_cells),
        call=lambda *some: route(*some, METRICS[metrics]),
        oracle=lambda *some: other(*some, METRICS[metrics]),
        what=metrics,
        name=name,
        shape={"n": n, "C": n_cells},
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("n", "n_cells"), GRAMS)
def test_gram_ablation_distances(timed, n, n_cells):
    names = ("cka", "procrustes", "cca", "cca_squared")
    timed(
        "gram_ablation_distances",
        made(n, n_cells),
        options={"metrics": names},
        oracle=lambda *some: by_svd(*some, names),
        what="CKA, Procrustes, mean and mean squared CCA",
        shape={"n": n, "C": n_cells},
        dtype=torch.float64,
    )


by_matrices = pytest.mark.parametrize(("side", "count"), MATRICES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def held(dtype: torch.dtype, spectrum: Pair, product: Pair, *vectors: Tensor) -> None:
    """Hold values and products to those wanted, and vectors to be orthonormal.

    To the rounding of the largest value, which is 1 here.
    """
    tol = Tol(0, 1e-5) if dtype == torch.float32 else SAME
    identity = torch.eye(vectors[0].shape[-1]).expand_as(vectors[0])
    for got, want in (spectrum, product, *((q.mT @ q, identity) for q in vectors)):
        assert_close(got, want, tol)


def square(g: Generator, side: int, count: int, dtype: torch.dtype) -> Tensor:
    a = torch.randn(count, side, side, generator=g, device=g.device, dtype=torch.float64)
    return (a / torch.linalg.matrix_norm(a, 2, keepdim=True)).to(dtype)


@by_dtype
@by_matrices
def test_eigh(timed, side, count, dtype):
    """Held to LAPACK's values in float64, and to the matrices that the vectors make again."""

    def symmetric(g: Generator) -> tuple[Tensor, ...]:
        a = square(g, side, count, torch.float64)
        return ((a @ a.mT).to(dtype),)

    def check(got: tuple[Tensor, Tensor], want: Tensor) -> None:
        w, v = (t.double() for t in got)
        held(dtype, (w, torch.linalg.eigvalsh(want)), (v * w[:, None] @ v.mT, want), v)

    shape = {"n": side, "matrices": count}
    timed("eigh", symmetric, oracle=Tensor.double, check=check, shape=shape, dtype=dtype)


@by_dtype
@by_matrices
def test_svd(timed, side, count, dtype):
    def check(got: tuple[Tensor, Tensor, Tensor], want: Tensor) -> None:
        u, s, vh = (t.double() for t in got)
        spectrum, product = (s, torch.linalg.svdvals(want)), (u * s[:, None] @ vh, want)
        held(dtype, spectrum, product, u, vh.mT)

    def make(g: Generator) -> tuple[Tensor, ...]:
        return (square(g, side, count, dtype),)

    shape = {"m": side, "n": side, "matrices": count}
    timed("svd", make, oracle=Tensor.double, check=check, shape=shape, dtype=dtype)
