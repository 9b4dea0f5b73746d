"""The row of the sheet for a linear layer behind the masks of all cells."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu_report.case import PRODUCTS, Case, Shape, function, labelled


def cases(quick: bool) -> list[Case]:
    """The images of a class, in AlexNet's classifier."""
    if quick:
        return [_linear(Shape(12, 50, 4, torch.float32), 16)]
    return [_linear(Shape(50, 4096, 16, torch.float32), 4096)]


def _linear(s: Shape, outs: int) -> Case:
    labels = labelled(s)

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        weight = torch.randn(outs, s.p, generator=g, device=g.device) / s.p**0.5
        bias = torch.randn(outs, generator=g, device=g.device)
        cells = torch.from_numpy(labels).to(g.device)
        x = s.activations(g)[0].contiguous()
        return x, weight.to(s.dtype), bias.to(s.dtype), cells

    def layer(x: Tensor, weight: Tensor, bias: Tensor, cells: Tensor) -> Tensor:
        left = torch.stack([torch.where(cells == c, 0, x) for c in range(s.cells)])
        return (left.flatten(0, 1) @ weight.mT + bias).relu_()

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, cells: Tensor) -> Tensor:
        return function("triton.linear_cells:linear_cells")(
            x, labels, weight, bias, range(s.cells), activate="relu", precision=s.precision
        )

    def reference(x: Tensor, weight: Tensor, bias: Tensor, cells: Tensor) -> Tensor:
        return layer(x.double(), weight.double(), bias.double(), cells)

    return Case(
        "linear_cells, ReLU",
        f"n={s.n} p={s.p:,} C={s.cells} →{outs:,}",
        s.dtype,
        s.precision,
        PRODUCTS[s.precision],
        bytes=(s.n * s.p + s.p * outs + s.cells * s.n * outs) * s.dtype.itemsize,
        operations=2 * s.n * s.p * outs,
        inputs=inputs,
        kernel=kernel,
        reference=reference,
        routes={"plain": layer},
        parts=s.cells,
    )
