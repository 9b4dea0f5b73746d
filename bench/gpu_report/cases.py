"""The rows of the report: every kernel at the study's shapes, and the formula it computes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.gpu_report.case import Call, Facts, Inputs, KernelCase, Shape, cast, load, make_case
from bench.gpu_report.solver_cases import (
    make_eigh_row,
    make_fits_row,
    make_riccati_row,
    make_svd_row,
)
from bench.gpu_report.stimulus_cases import (
    make_candidates_row,
    make_permutations_row,
    make_searchlight_row,
)

PAPER = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
# Channels and pixels of AlexNet's first layer, ResNet50's last, and the rehearsal's layer.
_UNITS = {193_600: (64, 55, 55), 100_352: (2048, 7, 7), 50: (2, 5, 5)}
_EXACT: Facts = {"precision": "ieee", "tolerance": 0.0}  # copies and masks don't round
_NEURONS = 8192  # per block; products with all neurons at once would fill the memory


def list_cases(quick: bool) -> list[KernelCase]:
    """Return all rows; each kernel has one among the first, in case time runs out."""
    layers = [(12, 50, 4)] if quick else [(50, 193_600, 16), (500, 100_352, 16)]
    float32, bfloat16 = (
        [Shape(*layer, dtype) for layer in layers] for dtype in (torch.float32, torch.bfloat16)
    )
    small, large = float32[0], float32[-1]
    tf32, ieee = (replace(large, precision=precision) for precision in ("tf32", "ieee"))
    if quick:  # without CUDA C++, which CuPy launches and which can't be rehearsed without a GPU
        once = [
            _make_linear_row(small, 16),
            make_riccati_row(4, 11),
            make_fits_row(small, 4, 8),
            make_permutations_row(12, 3, 2, 4),
            make_candidates_row(50, 12, 9),
            *(make_searchlight_row(8, 10, 9, folds) for folds in (1, 3)),
        ]
        return [
            *(_make_layer_rows(float32) + once + _make_layer_rows(bfloat16)),
            *(_make_cell_grams_row(small, partitions=2), *_make_product_rows(tf32)),
        ]
    return [
        *_make_layer_rows(float32),
        _make_linear_row(Shape(50, 4096, 16), 4096),  # a class's images in AlexNet's classifier
        *(make_riccati_row(16, 499), make_riccati_row(100, 49)),
        *(make_permutations_row(1024, 32, 24, 200), make_permutations_row(1024, 1, 1, 200)),
        *(make_candidates_row(20_000, 512, 17), make_candidates_row(1024, 4096, 17)),
        *(make_searchlight_row(32, 50_000, 100, folds) for folds in (1, 4)),
        *list_native_cases(quick),
        *(make_fits_row(s, 4096, 100) for s in (large, bfloat16[-1], tf32)),
        *_make_layer_rows(bfloat16),
        _make_cell_grams_row(replace(small, cells=100)),
        _make_cell_grams_row(small, partitions=4),
        *(_make_product_rows(tf32) + _make_product_rows(ieee)),
    ]


def list_native_cases(quick: bool) -> list[KernelCase]:
    """Return the rows of the CUDA C++ kernels."""
    if quick:
        return [
            make_eigh_row(4, 11),
            make_svd_row(4, 12, 11),
            _make_native_cell_grams_row(12, 50, 4),
        ]
    return [
        make_eigh_row(1000, 49),
        make_eigh_row(100, 127),
        make_eigh_row(16, 499),
        make_svd_row(1000, 50, 49),
        _make_native_cell_grams_row(50, 193_600, 16),
        _make_native_cell_grams_row(500, 100_352, 16),
    ]


def _make_layer_rows(shapes: list[Shape]) -> list[KernelCase]:
    makers = (
        _make_gram_row,
        _make_layers_row,
        _make_cell_grams_row,
        _make_class_means_row,
        _make_variate_weights_row,
        _make_ablate_row,
        _make_pointwise_row,
    )
    rows = [make(s) for s in shapes for make in makers]
    return rows + [_make_distances_row(s, metrics) for s in shapes for metrics in (("cka",), PAPER)]


def _make_product_rows(s: Shape) -> list[KernelCase]:
    return [_make_gram_row(s), _make_cell_grams_row(s), _make_variate_weights_row(s)]


def _centre(xp: Any, dtype: str, x: Any) -> Any:
    (c,) = cast(xp, dtype, x)
    return c - c.mean(0)


def _use_first_input(call: Call) -> Call:
    """Return a call that uses only the first input; the others are for the formula."""
    return lambda x, *_: call(x)


def _make_gram_row(s: Shape) -> KernelCase:
    def formula(xp: Any, dtype: str, x: Any) -> Any:
        c = _centre(xp, dtype, x)
        return c @ c.T

    options: Facts = {"kernel": "linear", "sigma": None}
    kernel = load("triton.gram:centered_gram", **options, precision=s.precision)
    backend = load("torch.gram:centered_gram", **options)
    cost = s.size + 8 * s.n**2, s.n * (s.n + 1) * s.p  # one of two symmetric elements
    return make_case("centered_gram", s, formula, cost, kernel, backend, precision=s.ceiling)


def _make_layers_row(s: Shape) -> KernelCase:
    """Return the row of the inner products of the Grams of layers of different sizes."""
    bounds = [int(s.p * (i / s.cells) ** 2) for i in range(s.cells + 1)]

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        x = s.activations(g)[0].contiguous()
        return tuple(x[:, start:stop] for start, stop in pairwise(bounds))

    def formula(xp: Any, dtype: str, *layers: Any) -> Any:
        centred = (_centre(xp, dtype, x) for x in layers)
        grams = xp.stack([(c @ c.T).reshape(-1) for c in centred])
        return grams @ grams.T

    def multiply(module: str, *layers: Tensor) -> Tensor:
        options: Facts = {"debiased": False}
        grams = load(f"{module}layer_grams", **options, precision="float32")(list(layers))[0]
        return load(f"{module}gram_products", **options, n=s.n)(grams, grams)[0]

    operations = s.n * (s.n + 1) * (s.p + s.cells**2)
    facts: Facts = {"detail": f" L={s.cells}", "inputs": inputs, "parts": s.cells}
    calls = partial(multiply, "triton.layer_grams:"), partial(multiply, "torch.layer_grams:")
    cost = s.size + 8 * s.cells * s.n**2, operations
    return make_case("layer_grams, all products", s, formula, cost, *calls, **facts)


def _make_cell_grams_row(
    s: Shape, partitions: int = 0, name: str = "cell_grams", kernel: Call | None = None
) -> KernelCase:
    """Return the row of all cells' Grams, for one partition or several."""
    tables = [s.labels(t) for t in range(max(partitions, 1))]
    count = len(tables) * s.cells
    kernel = partial(
        kernel or load("triton.gram:cell_grams", precision=s.precision),
        cells=np.stack(tables) if partitions else tables[0],
        n_cells=s.cells,
    )

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        """Return activations and the neurons of each cell, ready for the plain routes."""
        members = (np.flatnonzero(t == c) for t in tables for c in range(s.cells))
        return (*s.activations(g), *(torch.from_numpy(i).to(g.device) for i in members))

    def formula(xp: Any, dtype: str, x: Any, *members: Any) -> Any:
        rows = _centre(xp, dtype, x).T
        grams = xp.stack([b.T @ b for b in (rows[i] for i in members)])
        return grams.reshape(len(tables), s.cells, s.n, s.n) if partitions else grams

    def backend(x: Tensor) -> Tensor:
        grams = [load("torch.gram:cell_grams")(x, cells=t, n_cells=s.cells) for t in tables]
        return torch.stack(grams) if partitions else grams[0]

    cost = s.size + 8 * count * s.n**2, len(tables) * s.n * (s.n + 1) * s.p
    facts: Facts = {
        "detail": f" C={s.cells}" + (f" T={partitions}" if partitions else ""),
        "precision": s.ceiling,
        "inputs": inputs,
        "parts": count,
    }
    calls = _use_first_input(kernel), _use_first_input(backend)
    return make_case(name, s, formula, cost, *calls, **facts)


def _make_native_cell_grams_row(n: int, p: int, cells: int) -> KernelCase:
    s = Shape(n, p, cells, precision="ieee")
    return _make_cell_grams_row(s, name="cell_grams, CUDA C++", kernel=load("cupy.gram:cell_grams"))


def _make_class_means_row(s: Shape) -> KernelCase:
    k = 10
    labels = np.arange(s.n) % k

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        member = torch.from_numpy(labels == np.arange(k)[:, None]).to(g.device, torch.float64)
        return *s.activations(g), member / member.sum(1, keepdim=True)

    def formula(xp: Any, dtype: str, x: Any, averages: Any) -> Any:
        x, averages = cast(xp, dtype, x, averages)
        return averages @ x

    options: Facts = {"labels": labels, "n_classes": k}
    kernel = _use_first_input(load("triton.cells:class_means", **options))
    backend = _use_first_input(load("torch.cells:class_means", **options))
    cost = s.size + 8 * k * s.p, s.n * s.p
    facts: Facts = {
        "precision": "ieee",
        "tolerance": 1e-12,  # sums are in float64
        "inputs": inputs,
    }
    return make_case("class_means", s, formula, cost, kernel, backend, f" k={k}", **facts)


def _masked_inputs(s: Shape, cells: int, units: tuple[int, ...], outs: int = 0) -> Inputs:
    """Return inputs: activations (n, *units), labels, cells to mask, and a layer's parameters."""

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        x = s.activations(g)[0].contiguous().view(s.n, *units)
        masks = torch.from_numpy(s.labels()).to(g.device), torch.arange(cells, device=g.device)
        if not outs:
            return x, *masks
        size = outs, units[0], *(1 for _ in units[1:])
        weight = torch.randn(size, generator=g, device=g.device) / units[0] ** 0.5
        bias = torch.randn(outs, generator=g, device=g.device)
        return x, *masks, weight.to(s.dtype), bias.to(s.dtype)

    return inputs


def _mask_copies(xp: Any, x: Any, labels: Any, ids: Any) -> Any:
    """Return copies (C, n, p) of the activations, each with the units of one cell set to zero."""
    x = x.reshape(x.shape[0], -1)
    zero = xp.zeros_like(x[:1, :1])  # a Python 0 would not keep x's dtype in every library
    return xp.where((labels == ids[:, None])[:, None], zero, x)


def _apply_relu(xp: Any, x: Any) -> Any:
    return xp.clip(x, 0, None, out=x)


def _make_ablate_row(s: Shape) -> KernelCase:
    """Return the row of masked copies followed by a ReLU, one copy per cell."""
    units, cells = _UNITS[s.p], s.cells // 2

    def formula(xp: Any, dtype: str, x: Any, labels: Any, ids: Any) -> Any:
        return _apply_relu(xp, _mask_copies(xp, x, labels, ids)).reshape(-1, *units)

    def kernel(*inputs: Tensor) -> Tensor:
        epilogue = load("triton.masked_copies:Epilogue")(activate="relu")
        return load("triton.masked_copies:ablate")(*inputs, epilogue=epilogue)

    facts: Facts = {
        **_EXACT,
        "detail": f" C={cells}",
        "inputs": _masked_inputs(s, cells, units),
    }
    return make_case("ablate, ReLU", s, formula, ((1 + cells) * s.size, 0), kernel, **facts)


def _make_pointwise_row(s: Shape) -> KernelCase:
    """Return the row of a 1x1 convolution with bias and ReLU on each masked copy."""
    channels, *sizes = _UNITS[s.p]
    cells, outs = s.cells // 2, max(channels // 4, 16)

    def formula(xp: Any, dtype: str, x: Any, labels: Any, ids: Any, *layer: Any) -> Any:
        x, weight, bias = cast(xp, dtype, x, *layer)
        masked = _mask_copies(xp, x, labels, ids).reshape(cells * s.n, channels, -1)
        out = weight.reshape(outs, channels) @ masked + bias[:, None]
        return _apply_relu(xp, out).reshape(-1, outs, *sizes)

    facts: Facts = {
        "detail": f" C={cells} {channels}→{outs}",
        "inputs": _masked_inputs(s, cells, (channels, *sizes), outs),
        "plain": str(s.dtype).removeprefix("torch."),
        "cupy": False,
    }
    if s.dtype == torch.bfloat16:
        # Products of bfloat16 values are exact in float32; only the result is rounded.
        facts |= {"precision": "bfloat16", "tolerance": 2.0**-8}
    path = "triton.masked_pointwise:masked_pointwise"
    kernel = load(path, activate="relu", precision=s.precision)
    cost = s.size * (channels + cells * outs) // channels, 2 * cells * s.n * s.p * outs
    return make_case("masked_pointwise, ReLU", s, formula, cost, kernel, **facts)


def _make_linear_row(s: Shape, outs: int) -> KernelCase:
    """Return the row of a linear layer with ReLU on each masked copy of its input."""
    cells = s.labels()
    layer_of = load("triton.linear_cells:linear_cells", activate="relu", precision=s.precision)

    def formula(xp: Any, dtype: str, x: Any, labels: Any, ids: Any, *layer: Any) -> Any:
        x, weight, bias = cast(xp, dtype, x, *layer)
        return _apply_relu(xp, _mask_copies(xp, x, labels, ids).reshape(-1, s.p) @ weight.T + bias)

    def kernel(x: Tensor, labels: Tensor, ids: Tensor, *layer: Tensor) -> Tensor:
        return layer_of(x, cells, *layer, range(s.cells))

    numbers = s.n * s.p + s.p * outs + s.cells * s.n * outs
    cost = numbers * s.dtype.itemsize, 2 * s.n * s.p * outs
    facts: Facts = {
        "detail": f" C={s.cells} →{outs:,}",
        "inputs": _masked_inputs(s, s.cells, (s.p,), outs),
        "parts": s.cells,
        "cupy": False,
    }
    return make_case("linear_cells, ReLU", s, formula, cost, kernel, **facts)


def _make_variate_weights_row(s: Shape) -> KernelCase:
    """Return the row of PWCCA's weights for all ablations."""
    k = s.cells * (s.n - 1)

    def inputs(g: Generator) -> tuple[Tensor, ...]:
        h = torch.randn(k, s.n, generator=g, device=g.device, dtype=torch.float64)
        h -= h.mean(1, keepdim=True)  # canonical variates are centred
        return (h, *s.activations(g))

    def formula(xp: Any, dtype: str, h: Any, x: Any) -> Any:
        (h,) = cast(xp, dtype, h)
        blocks = (x[:, start : start + _NEURONS] for start in range(0, s.p, _NEURONS))
        return sum(abs(h @ _centre(xp, dtype, block)).sum(1) for block in blocks)

    kernel = load("triton.cca:variate_weights", precision=s.precision)
    backend = load("torch.cca:variate_weights")
    halves = 2 if s.dtype != torch.float32 and s.precision != "ieee" else 1  # of the directions
    cost = s.size + 8 * k * (s.n + 1), 2 * k * s.n * s.p * halves
    facts: Facts = {"detail": f" k={k:,}", "inputs": inputs, "parts": k, "precision": s.ceiling}
    return make_case("variate_weights", s, formula, cost, kernel, backend, **facts)


def _make_distances_row(s: Shape, metrics: tuple[str, ...]) -> KernelCase:
    """Return the row of the public operation, including checks and the n x n stage."""
    labels = s.labels()

    def distances(x: Tensor, backend: str) -> Tensor:
        table = rk.ablation_distances(
            x, labels, metrics=metrics, precision=s.precision, backend=backend
        )
        return torch.stack([table[m] for m in metrics])

    products = s.n + 1 + (2 * s.cells * s.n if "pwcca" in metrics else 0)
    return KernelCase(
        f"ablation_distances, {len(metrics)} metric{'s' * (len(metrics) > 1)}",
        f"n={s.n} p={s.p:,} C={s.cells}",
        s.dtype,
        s.ceiling,
        1e-4,  # the effect of the Grams' rounding on a distance
        bytes=s.size,
        operations=products * s.n * s.p,
        inputs=s.activations,
        kernel=partial(distances, backend="triton"),
        reference=lambda x: distances(x.double(), "torch"),
        routes={"backend": partial(distances, backend="torch")},
        parts=len(metrics) * s.cells,
    )
