"""Rows of the report for permutations of stimuli, the nearest stimuli, and searchlights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from bench.gpu_report.case import Call, Facts, KernelCase, Shape, cast, load, make_case


def make_permutations_row(n: int, rows: int, cols: int, count: int) -> KernelCase:
    """Return the row of the inner products of Grams with permuted ones."""
    s = Shape(n, n, count, torch.float64, "ieee")  # as many "neurons" as a Gram has columns
    entries = n * (n + 1) // 2

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=g.device, dtype=torch.float64)

        k = draw(n, n, cols)
        k = (k + k.transpose(0, 1)).view(n * n, cols)
        orders = [torch.randperm(n, generator=g, device=g.device) for _ in range(count)]
        return draw(rows, entries), k, torch.stack(orders)

    def formula(xp: Any, dtype: str, h: Any, k: Any, orders: Any) -> Any:
        h, k = cast(xp, dtype, h, k)
        i, j = torch.tril_indices(n, n, device=orders.device)
        return xp.stack([h @ k[order[i] * n + order[j]] for order in orders])

    facts: Facts = {
        "detail": f" {rows}x{cols} K={count}",
        "inputs": inputs,
        "precision": "float64",
        "tolerance": 1e-12,
        "parts": count,
        "plain": "float64",
        "cupy": False,
    }
    cost = (
        8 * (entries * (rows + count * cols) + count * rows * cols),
        2 * count * rows * cols * entries,
    )
    kernel = load("triton.calibration:permuted_products")
    backend = load("torch.calibration:permuted_products")
    return make_case("permuted_products", s, formula, cost, kernel, backend, **facts)


def make_candidates_row(n: int, p: int, count: int) -> KernelCase:
    """Return the row of the squared distances of the nearest stimuli of each."""
    s = Shape(n, p, 1)

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        z = torch.nn.functional.normalize(s.activations(g)[0]).contiguous()
        return z, z.double().square().sum(1)

    def formula(xp: Any, dtype: str, z: Any, energy: Any) -> Any:
        z, energy = cast(xp, dtype, z, energy)
        d2 = torch.addmm(energy, z, z.mT, alpha=-2).add_(energy[:, None])
        return d2.fill_diagonal_(torch.inf).topk(count, largest=False).values

    def measure(path: str) -> Call:
        def call(z: Tensor, energy: Tensor) -> Tensor:
            _, lower, upper = load(path)(z, energy, count)
            return (lower.double() + upper.double()) / 2

        return call

    facts: Facts = {
        "detail": f" c={count}",
        "inputs": inputs,
        "parts": n,
        "precision": s.ceiling,
        "cupy": False,
    }
    cost = s.size + 16 * n * count, 2 * n * n * p
    kernel = measure("triton.nearest:find_candidates")
    backend = measure("torch.nearest:find_candidates")
    return make_case("find_candidates", s, formula, cost, kernel, backend, **facts)


def make_searchlight_row(n: int, spheres: int, size: int, folds: int) -> KernelCase:
    """Return the row of the RDMs of spheres: crossnobis of several folds, euclidean of one."""
    s = Shape(n, spheres, spheres, torch.float64, "ieee")  # each sphere is around a neuron

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        slabs = torch.randn(spheres, folds, n, generator=g, device=g.device, dtype=torch.float64)
        indptr = torch.arange(spheres + 1, device=g.device) * size
        near = torch.arange(spheres, device=g.device)[:, None] + torch.arange(size, device=g.device)
        return slabs, indptr, near.flatten() % spheres

    def formula(xp: Any, dtype: str, slabs: Any, indptr: Any, indices: Any) -> Any:
        (z,) = cast(xp, dtype, slabs[indices.reshape(spheres, size)])
        i, j = torch.triu_indices(n, n, 1, device=slabs.device)

        def square(rows: Any) -> Any:
            gram = rows.mT @ rows
            energy = gram.diagonal(dim1=1, dim2=2)
            return energy[:, i] + energy[:, j] - 2 * gram[:, i, j]

        within = square(z.reshape(spheres, -1, n))
        if folds == 1:
            return within.sqrt()
        return (square(z.sum(2)) - within) / (folds * (folds - 1) * size)

    def measure(path: str) -> Call:
        return load(path, distance="euclidean" if folds == 1 else "crossnobis")

    facts: Facts = {
        "detail": f" k={size} K={folds}",
        "inputs": inputs,
        "precision": "float64",
        "tolerance": 1e-7,  # rounding to float32
        "parts": spheres,
        "plain": "float64",
        "cupy": False,
    }
    products, pairs = folds + (folds > 1), n * (n - 1) // 2
    cost = (
        spheres * (8 * (folds * n + size) + 4 * pairs),
        2 * products * spheres * size * n * n,
    )
    kernel = measure("triton.searchlight:searchlight_rdms")
    backend = measure("torch.searchlight:searchlight_rdms")
    return make_case("searchlight_rdms", s, formula, cost, kernel, backend, **facts)
