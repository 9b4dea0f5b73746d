"""From Grams to distances: Riccati iterations and Cholesky solves against an eigh and SVDs each.

Both start from the Gram of a whole and those of its parts, and end before PWCCA's pass over the
neurons, with its canonical variates. Run all, in one process, with ``make bench``; the ratios
within a group are the result. Answers are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.bench_ablation import activations, cells
from repsim_kernels.kernels.torch import cka, gram, spectrum
from repsim_kernels.kernels.torch.ablated import Ablated, Original

RIDGE = 0.1
METRICS = {
    "five metrics": ("cka", "procrustes", "cca", "cca_squared", "pwcca"),
    "Procrustes": ("procrustes",),
    "ridge CCA": ("cca", "cca_squared"),
}


def grams(n: int, p: int, n_cells: int) -> tuple[Tensor, Tensor]:
    """The Gram of rectified activations and those of their cells, float64."""
    x = activations(n, p)
    parts = rk.cell_grams(x, cells(p, n_cells))
    return parts.sum(0), parts


def ours(whole: Tensor, parts: Tensor, metrics: tuple[str, ...]) -> dict[str, Tensor]:
    """The package's stage, with the sums of PWCCA's variates in the place of its weights."""
    n = len(whole)
    original = Original(spectrum.of_gram(whole), n, n - 1, RIDGE, 0.0)
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for batch in gram.batches(list(range(len(parts))), whole):
        ablated = Ablated(original, cell=parts[batch])
        if "cka" in metrics:
            found["cka"].append(cka.cosine_distance(parts[batch], whole, False, torch.zeros(())))
        if "procrustes" in metrics:
            found["procrustes"].append(ablated.procrustes()[0])
        if "pwcca" in metrics:
            h, rho = ablated.variates()
            found["pwcca"].append((h.abs().sum(-1) * rho).sum(-1))
        if "cca" in metrics:
            found["cca"].append(ablated.cca("pwcca" in metrics)[0])
            found["cca_squared"].append(ablated.cca_squared()[0])
    return {name: torch.cat(values) for name, values in found.items()}


def by_svd(whole: Tensor, parts: Tensor, metrics: tuple[str, ...]) -> dict[str, Tensor]:
    """What the definitions say: the spectrum of each ablated Gram, and the SVDs of products."""
    n = len(whole)
    basis, v = spectrum.of_gram(whole)
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    root = (v / (v + RIDGE * v.sum() / n)).sqrt()
    for batch in gram.batches(list(range(len(parts))), whole):
        left = whole - parts[batch]
        if "cka" in metrics:
            similarity = (left * whole).sum((1, 2)) / left.square().sum((1, 2)).sqrt()
            found["cka"].append(1 - similarity / whole.square().sum().sqrt())
        u, w = spectrum.of_gram(left)
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
                h = directions.mT @ spectrum.from_complement(root * basis).mT
                found["pwcca"].append((h.abs().sum(-1) * rho).sum(-1))
            else:
                rho = torch.linalg.svdvals(matrix)
            found["cca"].append(1 - rho.sum(-1) / (n - 1))
            found["cca_squared"].append(1 - rho.square().sum(-1) / (n - 1))
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.fixture(scope="module", params=[(500, 20_000, 16), (50, 20_000, 100)], ids=["500", "50"])
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return grams(*request.param)


@pytest.mark.parametrize("metrics", METRICS)
@pytest.mark.parametrize("route", [ours, by_svd], ids=["ours", "eigh + SVD"])
def test_spectral(
    benchmark,
    problem: tuple[Tensor, Tensor],
    route: Callable[..., dict[str, Tensor]],
    metrics: str,
) -> None:
    whole, parts = problem
    benchmark.group = f"{metrics}: {len(parts)} Grams of {len(whole)} x {len(whole)}"
    got, want = (f(whole, parts, METRICS[metrics]) for f in (ours, by_svd))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-12)
    benchmark.pedantic(route, (whole, parts, METRICS[metrics]), rounds=7, warmup_rounds=1)
