"""What the sheet measures: every kernel at the study's shapes, and what it is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.gpu_report import linear_cases, probe_cases, spectral_cases
from bench.gpu_report.case import (
    DISTANCES,
    EXACT,
    MEANS,
    PRODUCTS,
    Case,
    Shape,
    function,
    labelled,
    members,
)
from bench.gpu_report.plain_cupy import PlainCupy, cell_grams, centred

PAPER = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
# Channels and pixels of AlexNet's first layer, ResNet50's last, and of the rehearsal.
_UNITS = {193_600: (64, 55, 55), 100_352: (2048, 7, 7), 50: (2, 5, 5)}
_NEURONS = 8192  # of a block, where products with all neurons would fill the memory


def cases(quick: bool) -> list[Case]:
    """All rows: every kernel once at the study's shapes first, in case there is no more time."""
    shapes = [(12, 50, 4)] if quick else [(50, 193_600, 16), (500, 100_352, 16)]
    rows = _of(torch.float32, shapes)
    rows += linear_cases.cases(quick) + spectral_cases.cases(quick) + probe_cases.cases(quick)
    rows += _of(torch.bfloat16, shapes)
    n, p, c = shapes[0]
    rows += [] if quick else [_cells(Shape(n, p, 100, torch.float32))]
    rows += [_cells(Shape(n, p, c, torch.float32), partitions=2 if quick else 4)]
    n, p, c = shapes[-1]
    for precision in ("tf32",) if quick else ("tf32", "ieee"):
        s = Shape(n, p, c, torch.float32, precision)
        rows += [_whole(s), _cells(s), _weights(s)]
    return rows


def _of(dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> list[Case]:
    default = [Shape(*s, dtype) for s in shapes]
    rows = [row(s) for s in default for row in _KERNELS]
    return rows + [_distances(s, metrics) for s in default for metrics in (("cka",), PAPER)]


def _centred(x: Tensor, dtype: torch.dtype) -> Tensor:
    c = x.to(dtype)
    return c - c.mean(0)


def _whole(s: Shape) -> Case:
    def product(x: Tensor, dtype: torch.dtype) -> Tensor:
        c = _centred(x, dtype)
        return c @ c.mT

    def by_cupy(xp: Any, x: Any) -> Any:
        c = centred(x)
        return c @ c.T

    options = {"kernel": "linear", "sigma": None}
    return Case(
        "centered_gram",
        f"n={s.n} p={s.p:,}",
        s.dtype,
        s.precision,
        PRODUCTS[s.precision],
        bytes=s.size + 8 * s.n**2,
        operations=s.n * (s.n + 1) * s.p,  # one of two symmetric elements
        inputs=s.activations,
        kernel=lambda x: function("triton.gram:centered_gram")(x, **options, precision=s.precision),
        reference=lambda x: product(x, torch.float64),
        routes={
            "backend": lambda x: function("torch.gram:centered_gram")(x, **options),
            "plain": lambda x: product(x, torch.float32),
            "cupy": PlainCupy(by_cupy),
        },
    )


def _cells(s: Shape, partitions: int = 0) -> Case:
    """The Grams of all cells, of one partition or of several."""
    tables = [labelled(s, t) for t in range(max(partitions, 1))]
    labels = np.stack(tables) if partitions else tables[0]
    detail = f" T={partitions}" if partitions else ""

    def products(x: Tensor, dtype: torch.dtype) -> Tensor:
        rows = _centred(x, dtype).mT
        grams = []
        for t in range(len(tables)):
            own = (rows[i] for i in members(s, t, x.device))
            grams.append(torch.stack([b.mT @ b for b in own]))
        return torch.stack(grams) if partitions else grams[0]

    def by_cupy(xp: Any, x: Any, *own: Any) -> Any:
        grams = cell_grams(xp, x, *own)
        return grams.reshape(len(tables), s.cells, s.n, s.n) if partitions else grams

    def beside(device: torch.device) -> list[Tensor]:
        return [i for t in range(len(tables)) for i in members(s, t, device)]

    def backend(x: Tensor) -> Tensor:
        grams = [function("torch.gram:cell_grams")(x, cells=t, n_cells=s.cells) for t in tables]
        return torch.stack(grams) if partitions else grams[0]

    count = len(tables) * s.cells
    return Case(
        "cell_grams",
        f"n={s.n} p={s.p:,} C={s.cells}{detail}",
        s.dtype,
        s.precision,
        PRODUCTS[s.precision],
        bytes=s.size + 8 * count * s.n**2,
        operations=len(tables) * s.n * (s.n + 1) * s.p,
        inputs=s.activations,
        kernel=lambda x: function("triton.gram:cell_grams")(
            x, cells=labels, n_cells=s.cells, precision=s.precision
        ),
        reference=lambda x: products(x, torch.float64),
        routes={
            "backend": backend,
            "plain": lambda x: products(x, torch.float32),
            "cupy": PlainCupy(by_cupy, beside),
        },
        parts=count,
    )


def _means(s: Shape) -> Case:
    k = 10
    labels = np.arange(s.n) % k
    options = {"labels": labels, "n_classes": k}

    def means(x: Tensor, dtype: torch.dtype) -> Tensor:
        member = torch.from_numpy(labels == np.arange(k)[:, None]).to(x.device, dtype)
        return (member / member.sum(1, keepdim=True)) @ x.to(dtype)

    def by_cupy(xp: Any, x: Any) -> Any:
        # Labels go round, so that a class is every k-th stimulus.
        return xp.stack([x[i::k].astype("float32").mean(0) for i in range(k)])

    return Case(
        "class_means",
        f"n={s.n} p={s.p:,} k={k}",
        s.dtype,
        "ieee",
        MEANS,
        bytes=s.size + 8 * k * s.p,
        operations=s.n * s.p,
        inputs=s.activations,
        kernel=lambda x: function("triton.cells:class_means")(x, **options),
        reference=lambda x: means(x, torch.float64),
        routes={
            "backend": lambda x: function("torch.cells:class_means")(x, **options),
            "plain": lambda x: means(x, torch.float32),
            "cupy": PlainCupy(by_cupy),
        },
    )


def _neuron_major(s: Shape) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        return (s.activations(g)[0].contiguous(),)

    def plain(x: Tensor) -> Tensor:
        return x.mT.contiguous()

    return Case(
        "neuron_major",
        f"n={s.n} p={s.p:,}",
        s.dtype,
        "ieee",
        EXACT,
        bytes=2 * s.size,
        operations=0,
        inputs=inputs,
        kernel=lambda x: function("triton.neuron_major:neuron_major")(x),
        reference=plain,
        routes={
            "plain": plain,
            "cupy": PlainCupy(lambda xp, x: xp.ascontiguousarray(x.T)),
        },
    )


def _ablate(s: Shape) -> Case:
    """Copies with one cell of units masked and the ReLU behind the layer done."""
    units = _UNITS[s.p]
    cells = s.cells // 2

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        x = s.activations(g)[0].contiguous().view(s.n, *units)
        return x, torch.from_numpy(labelled(s)).to(g.device), torch.arange(cells, device=g.device)

    def plain(x: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        masks = (labels == ids[:, None]).view(-1, 1, *units)
        return torch.where(masks, 0, x).relu_().flatten(0, 1)

    def by_cupy(xp: Any, x: Any, labels: Any, ids: Any) -> Any:
        masks = (labels == ids[:, None]).reshape(-1, 1, *units)
        copies = xp.where(masks, x.dtype.type(0), x)
        return xp.maximum(copies, 0, out=copies).reshape(-1, *units)

    def kernel(x: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        epilogue = function("triton.ablate:Epilogue")(activate="relu")
        return function("triton.ablate:ablate")(x, labels, ids, epilogue=epilogue)

    return Case(
        "ablate, ReLU",
        f"n={s.n} p={s.p:,} C={cells}",
        s.dtype,
        "ieee",
        EXACT,
        bytes=(1 + cells) * s.size,
        operations=0,
        inputs=inputs,
        kernel=kernel,
        reference=plain,
        routes={"plain": plain, "cupy": PlainCupy(by_cupy)},
    )


def _pointwise(s: Shape) -> Case:
    """A 1x1 convolution with bias and ReLU, for one cell of units masked after the other."""
    channels, *sizes = _UNITS[s.p]
    pixels, cells, outs = s.p // channels, s.cells // 2, max(channels // 4, 16)
    # Products of bfloat16 are exact in float32, and only the result is rounded.
    wide = s.dtype == torch.float32
    precision = s.precision if wide else "bfloat16"

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        x = s.activations(g)[0].contiguous().view(s.n, channels, *sizes)
        weight = torch.randn(outs, channels, 1, 1, generator=g, device=g.device) / channels**0.5
        bias = torch.randn(outs, generator=g, device=g.device)
        labels = torch.from_numpy(labelled(s)).to(g.device)
        ids = torch.arange(cells, device=g.device)
        return x, labels, ids, weight.to(s.dtype), bias.to(s.dtype)

    def one(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        masked = torch.where(mask, 0, x.flatten(1)).view(-1, channels, pixels)
        return (weight.flatten(1) @ masked + bias[:, None]).relu_().view(-1, outs, *sizes)

    def reference(x: Tensor, labels: Tensor, ids: Tensor, *layer: Tensor) -> Tensor:
        weight, bias = (t.double() for t in layer)
        return torch.cat([one(x.double(), labels == i, weight, bias) for i in ids])

    def plain(x: Tensor, labels: Tensor, ids: Tensor, *layer: Tensor) -> Tensor:
        return one(x, labels == ids[:, None, None], *layer)

    return Case(
        "masked_pointwise, ReLU",
        f"n={s.n} p={s.p:,} C={cells} {channels}→{outs}",
        s.dtype,
        precision,
        PRODUCTS[s.precision] if wide else 2.0**-8,
        bytes=s.size * (channels + cells * outs) // channels,
        operations=2 * cells * s.n * s.p * outs,
        inputs=inputs,
        kernel=lambda x, labels, ids, *layer: function("triton.masked_pointwise:masked_pointwise")(
            x, labels, ids, *layer, activate="relu", precision=s.precision
        ),
        reference=reference,
        routes={"plain": plain},
    )


def _weights(s: Shape) -> Case:
    """PWCCA's weights of all ablations at once."""
    k = s.cells * (s.n - 1)

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        h = torch.randn(k, s.n, generator=g, device=g.device, dtype=torch.float64)
        h -= h.mean(1, keepdim=True)  # as canonical variates are
        return (h, *s.activations(g))

    def weights(h: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        h = h.to(dtype)
        parts = (h @ _centred(b, dtype) for b in x.split(_NEURONS, 1))
        return torch.stack([b.abs_().sum(1) for b in parts]).sum(0)

    def by_cupy(xp: Any, h: Any, x: Any) -> Any:
        h, total = h.astype("float32"), xp.zeros(len(h), "float32")
        for start in range(0, s.p, _NEURONS):
            total += abs(h @ centred(x[:, start : start + _NEURONS])).sum(1)
        return total

    return Case(
        "variate_weights",
        f"n={s.n} p={s.p:,} k={k:,}",
        s.dtype,
        s.precision,
        PRODUCTS[s.precision],
        bytes=s.size + 8 * k * (s.n + 1),
        operations=2 * k * s.n * s.p,
        inputs=inputs,
        kernel=lambda h, x: function("triton.cca:variate_weights")(h, x, precision=s.precision),
        reference=lambda h, x: weights(h, x, torch.float64),
        routes={
            "backend": lambda h, x: function("torch.cca:variate_weights")(h, x),
            "plain": lambda h, x: weights(h, x, torch.float32),
            "cupy": PlainCupy(by_cupy),
        },
        parts=k,
    )


def _distances(s: Shape, metrics: tuple[str, ...]) -> Case:
    """The operation that users call, checks and small matrices included."""
    labels = labelled(s)

    def distances(x: Tensor, backend: str) -> Tensor:
        found = rk.ablation_distances(
            x, labels, metrics=metrics, precision=s.precision, backend=backend
        )
        return torch.stack([found[m] for m in metrics])

    products = s.n + 1 + (2 * s.cells * s.n if "pwcca" in metrics else 0)
    return Case(
        f"ablation_distances, {len(metrics)} metric{'s' * (len(metrics) > 1)}",
        f"n={s.n} p={s.p:,} C={s.cells}",
        s.dtype,
        s.precision,
        DISTANCES,
        bytes=s.size,
        operations=products * s.n * s.p,
        inputs=s.activations,
        kernel=lambda x: distances(x, "triton"),
        reference=lambda x: distances(x.double(), "torch"),
        routes={"backend": lambda x: distances(x, "torch")},
        parts=len(metrics) * s.cells,
    )


_KERNELS = (_whole, _cells, _means, _neuron_major, _weights, _ablate, _pointwise)
