"""The n x n stage on its own: from Grams to distances, and spectra of many matrices.

Users call ``gram_ablation_distances``. The stage inside ``ablation_distances`` ends before PWCCA's
pass over the neurons, with the canonical variates; it is compared with an eigh and SVDs for each
ablated Gram.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.inputs import DEVICE, assign_cells, draw_activations
from bench.common.tolerances import SAME, Tol, assert_close
from bench.conftest import Timer
from repsim_kernels.kernels.torch import cka, gram, panels, representation
from repsim_kernels.kernels.torch.spectral_distances import AblationBatch, Original

if DEVICE == "cuda":
    from repsim_kernels.kernels.triton.spectral import SOLVERS
else:
    from repsim_kernels.kernels.torch.spectral_distances import SOLVERS

Pair = tuple[Tensor, Tensor]
Route = Callable[[Tensor, Tensor, tuple[str, ...]], dict[str, Tensor]]
RIDGE = 0.1
METRICS = {
    "five metrics": ("cka", "procrustes", "cca", "cca_squared", "pwcca"),
    "Procrustes": ("procrustes",),
    "ridge CCA": ("cca", "cca_squared"),
}
GRAMS = ((500, 16), (50, 100))  # stimuli and cells
MATRICES = ((50, 100), (200, 16))  # side, and number of matrices


@cache
def compute_grams(n: int, n_cells: int) -> tuple[Tensor, Tensor]:
    """Return the Gram of rectified activations and the Grams of their cells, float64."""
    x = draw_activations(Generator(DEVICE).manual_seed(0), n, 20_000)
    parts = rk.cell_grams(x, assign_cells(20_000, n_cells))
    return parts.sum(0), parts


def make_grams(n: int, n_cells: int) -> Callable[[Generator], tuple[Tensor, ...]]:
    """Return a function that copies the same Grams to new memory."""
    return lambda g: tuple(t.clone() for t in compute_grams(n, n_cells))


def sum_variates(h: Tensor) -> Tensor:
    """Replace PWCCA's weights, which need neurons, by sums of the variates."""
    return h.abs().sum(-1)


def compute_pwcca(weights: Tensor, rho: Tensor) -> Tensor:
    return 1 - (weights * rho).sum(-1) / weights.sum(-1)


def compute_by_package(whole: Tensor, parts: Tensor, metrics: tuple[str, ...]) -> dict[str, Tensor]:
    """Run the package's n x n stage, with sums of variates as PWCCA's weights."""
    n = len(whole)
    original = Original(representation.spectrum_of_gram(whole), n, n - 1, RIDGE, 0.0, SOLVERS)
    out: dict[str, list[Tensor]] = {name: [] for name in metrics}
    (flat,) = gram.to_vectors(panels.panels_view(whole[None]), u_centred=False)
    for batch in gram.iter_batches(list(range(len(parts))), whole):
        ablated = AblationBatch(original, cell=parts[batch])
        if "cka" in metrics:
            m = gram.to_vectors(panels.panels_view(parts[batch]), u_centred=False)
            out["cka"].append(cka.cosine_distance(m, flat, False, 0.0, 0.0))
        if "procrustes" in metrics:
            out["procrustes"].append(ablated.procrustes()[0])
        if "pwcca" in metrics:
            h, rho = ablated.variates()
            out["pwcca"].append(compute_pwcca(sum_variates(h), rho))
        if "cca" in metrics:
            out["cca"].append(ablated.cca("pwcca" in metrics)[0])
            out["cca_squared"].append(ablated.cca_squared()[0])
    return {name: torch.cat(values) for name, values in out.items()}


def compute_by_svd(
    whole: Tensor,
    parts: Tensor,
    metrics: tuple[str, ...],
    pwcca_weights: Callable[[Tensor], Tensor] = sum_variates,
) -> dict[str, Tensor]:
    """Compute distances by the definitions: a spectrum and SVDs for each ablated Gram.

    ``pwcca_weights`` maps canonical variates (..., k, n) to PWCCA's weights (..., k).
    """
    n = len(whole)
    basis, v = representation.spectrum_of_gram(whole)
    out: dict[str, list[Tensor]] = {name: [] for name in metrics}
    root = (v / (v + RIDGE * v.sum() / n)).sqrt()
    for batch in gram.iter_batches(list(range(len(parts))), whole):
        rest = whole - parts[batch]
        if "cka" in metrics:
            similarity = (rest * whole).sum((1, 2)) / rest.square().sum((1, 2)).sqrt()
            out["cka"].append(1 - similarity / whole.square().sum().sqrt())
        u, w = representation.spectrum_of_gram(rest)
        rotation = basis.mT @ u
        if "procrustes" in metrics:
            matrix = v.sqrt()[:, None] * rotation * w.sqrt()[:, None, :]
            nuclear = torch.linalg.svdvals(matrix).sum(-1)
            out["procrustes"].append(2 - 2 * nuclear / (v.sum() * w.sum(-1)).sqrt())
        if "cca" in metrics:
            other = (w / (w + RIDGE * w.sum(-1, keepdim=True) / n)).sqrt()
            matrix = root[:, None] * rotation * other[:, None, :]
            if "pwcca" in metrics:
                directions, rho, _ = torch.linalg.svd(matrix)
                h = directions.mT @ representation.from_complement(root * basis).mT
                out["pwcca"].append(compute_pwcca(pwcca_weights(h), rho))
            else:
                rho = torch.linalg.svdvals(matrix)
            out["cca"].append(1 - rho.sum(-1) / (n - 1))
            out["cca_squared"].append(1 - rho.square().sum(-1) / (n - 1))
    return {name: torch.cat(values) for name, values in out.items()}


@pytest.mark.parametrize(("n", "n_cells"), GRAMS)
@pytest.mark.parametrize("metrics", METRICS)
@pytest.mark.parametrize(
    ("name", "route", "other"),
    [
        ("repsim_kernels", compute_by_package, compute_by_svd),
        ("an eigh and SVDs for each", compute_by_svd, compute_by_package),
    ],
    ids=["ours", "by_svd"],
)
def test_stage(
    timed: Timer, n: int, n_cells: int, metrics: str, name: str, route: Route, other: Route
) -> None:
    timed(
        "from Grams to distances",
        make_grams(n, n_cells),
        call=lambda whole, parts: route(whole, parts, METRICS[metrics]),
        oracle=lambda whole, parts: other(whole, parts, METRICS[metrics]),
        label=metrics,
        name=name,
        shape={"n": n, "C": n_cells},
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("n", "n_cells"), GRAMS)
def test_gram_ablation_distances(timed: Timer, n: int, n_cells: int) -> None:
    names = ("cka", "procrustes", "cca", "cca_squared")
    timed(
        "gram_ablation_distances",
        make_grams(n, n_cells),
        options={"metrics": names},
        oracle=lambda whole, parts: compute_by_svd(whole, parts, names),
        label="CKA, Procrustes, mean and mean squared CCA",
        shape={"n": n, "C": n_cells},
        dtype=torch.float64,
    )


by_matrices = pytest.mark.parametrize(("side", "count"), MATRICES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def assert_factors(dtype: torch.dtype, spectrum: Pair, product: Pair, *vectors: Tensor) -> None:
    """Compare values and products with the expected ones, and check that vectors are orthonormal.

    The tolerance is the rounding of the largest value, which is 1.
    """
    tol = Tol(0, 1e-5) if dtype == torch.float32 else SAME
    identity = torch.eye(vectors[0].shape[-1]).expand_as(vectors[0])
    for got, want in (spectrum, product, *((q.mT @ q, identity) for q in vectors)):
        assert_close(got, want, tol)


def draw_matrices(g: Generator, side: int, count: int, dtype: torch.dtype) -> Tensor:
    a = torch.randn(count, side, side, generator=g, device=g.device, dtype=torch.float64)
    return (a / torch.linalg.matrix_norm(a, 2, keepdim=True)).to(dtype)


@by_dtype
@by_matrices
def test_eigh(timed: Timer, side: int, count: int, dtype: torch.dtype) -> None:
    """Check eigenvalues against float64 LAPACK, and that the vectors rebuild the matrices."""

    def make_symmetric(g: Generator) -> tuple[Tensor, ...]:
        a = draw_matrices(g, side, count, torch.float64)
        return ((a @ a.mT).to(dtype),)

    def check(got: tuple[Tensor, Tensor], want: Tensor) -> None:
        w, v = (t.double() for t in got)
        assert_factors(dtype, (w, torch.linalg.eigvalsh(want)), (v * w[:, None] @ v.mT, want), v)

    shape = {"n": side, "matrices": count}
    timed("eigh", make_symmetric, oracle=Tensor.double, check=check, shape=shape, dtype=dtype)


@by_dtype
@by_matrices
def test_svd(timed: Timer, side: int, count: int, dtype: torch.dtype) -> None:
    def check(got: tuple[Tensor, Tensor, Tensor], want: Tensor) -> None:
        u, s, vh = (t.double() for t in got)
        spectrum, product = (s, torch.linalg.svdvals(want)), (u * s[:, None] @ vh, want)
        assert_factors(dtype, spectrum, product, u, vh.mT)

    def make(g: Generator) -> tuple[Tensor, ...]:
        return (draw_matrices(g, side, count, dtype),)

    shape = {"m": side, "n": side, "matrices": count}
    timed("svd", make, oracle=Tensor.double, check=check, shape=shape, dtype=dtype)
