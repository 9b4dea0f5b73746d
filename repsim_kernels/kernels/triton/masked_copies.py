"""Copies of an activation, each with the neurons of one cell set to zero.

The activation is read once and each copy written once, with the elementwise operations that follow
the layer (batch norm, ReLU, ReLU6) already applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch


class Epilogue(NamedTuple):
    """The operation on every element after the mask: ``activate(x * scale + shift)``, float32."""

    norm: tuple[Tensor, Tensor] | None = None  # scale and shift (channels,), along dimension 1
    activate: str = "none"  # or "relu", "relu6"


@dataclass(frozen=True)
class Launch:
    block: int  # neurons per program, of one stimulus
    cells: int  # copies that a program writes, one after another
    num_warps: int


def choose(n: int, p: int, cells: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for n stimuli of p neurons and a number of cells."""
    # 8 elements per thread in 4 warps: 16-byte stores, few registers, many resident programs.
    block = min(1024, max(16, triton.next_power_of_2(p)))
    # All copies from one read, unless that leaves fewer programs than a GPU runs concurrently.
    programs = n * -(-p // block)
    return Launch(block, min(cells, max(1, programs * cells // 1024)), num_warps=4)


def floor(n: int, p: int, cells: int, dtype: torch.dtype) -> _launch.Floor:
    """Lower bound: read the activation (n, p) and the cells, write the copies."""
    return _launch.Floor((1 + cells) * n * p * dtype.itemsize + 8 * p, operations=0)


def unsupported(activation: Tensor) -> str | None:
    """Return why the kernel can't take this activation, or None if it can."""
    return _launch.unsupported(activation)


@triton.jit
def apply_activation(x, ACTIVATE: tl.constexpr):
    """Apply no activation, ReLU or ReLU6 to a float32 tile; NaN stays NaN."""
    if ACTIVATE != "none":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATE == "relu6":
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _ablate_kernel(
    x_ptr, cells_ptr, ids_ptr, scale_ptr, shift_ptr, out_ptr,
    p, blocks, inner, copy, n_ids, channels, channel_stride, cells_per_program,
    OVERLAP: tl.constexpr, OUTERMOST: tl.constexpr, ACTIVATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # In memory x is (p / inner, n, inner) and out (p / inner, n_ids, n, inner); copy = n * inner.
    # u indexes neurons in memory order.
    first = tl.program_id(1) * cells_per_program
    last = tl.minimum(first + cells_per_program, n_ids)
    block = tl.program_id(0)
    if OUTERMOST:
        u = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        mask = u < p
        source = (block // blocks).to(tl.int64) * p + u
        target = source
    else:
        source = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        outer = source // copy
        u = outer * inner + source % inner
        mask = u < p
        target = source + outer * copy * (n_ids - 1)

    x = tl.load(x_ptr + source, mask=mask, other=0.0)  # (BLOCK,)
    zero = tl.zeros((BLOCK,), tl.float32)
    if scale_ptr is not None or ACTIVATE != "none":
        x = x.to(tl.float32)
        if scale_ptr is not None:
            channel = u // channel_stride % channels
            scale = tl.load(scale_ptr + channel, mask=mask, other=0.0)
            zero = tl.load(shift_ptr + channel, mask=mask, other=0.0)
            x = x * scale + zero
        x = apply_activation(x, ACTIVATE)
        zero = apply_activation(zero, ACTIVATE)
    x = x.to(out_ptr.dtype.element_ty)
    zero = zero.to(out_ptr.dtype.element_ty)

    ids_ptr += first
    out_ptr += first.to(tl.int64) * copy
    if OVERLAP:
        cells_ptr += first.to(tl.int64) * p
    else:
        label = tl.load(cells_ptr + u, mask=mask, other=-1)  # (BLOCK,)
    for _ in range(first, last):
        if OVERLAP:
            hit = tl.load(cells_ptr + u, mask=mask, other=0) != 0
            cells_ptr += p
        else:
            hit = label == tl.load(ids_ptr)
            ids_ptr += 1
        tl.store(out_ptr + target, tl.where(hit, zero, x), mask=mask)
        out_ptr += copy


def ablate(
    activation: Tensor,
    cells: Tensor,
    ids: Tensor,
    *,
    epilogue: Epilogue | tuple[tuple[Tensor, Tensor] | None, str] = (None, "none"),
    launch: Launch | None = None,
) -> Tensor:
    """Copy the activation (n, …) for each cell, zero its neurons and apply the epilogue.

    ``cells`` are labels (p,) or memberships (C, p) of one stimulus's p neurons in C order; ``ids``
    (int64) selects cells. All are on the activation's device. Returns (len(ids) n, …) with the
    activation's order of dimensions in memory; without an epilogue the copies are bit-identical
    to the activation outside their cells.
    """
    order = memory_order(activation)
    if not activation.permute(order).is_contiguous():
        activation = torch.empty_like(activation).copy_(activation)
    n, shape = activation.shape[0], activation.shape[1:]
    p, n_ids = shape.numel(), len(ids)
    out = empty_copies(activation, n_ids, order)
    if out.numel() == 0:
        return out
    overlap = cells.dtype == torch.bool
    rows = cells[ids].view(torch.uint8) if overlap else cells
    ranks = [d - 1 for d in order if d > 0]  # the neurons' dimensions, slowest first
    rows = rows.reshape(-1, *shape).permute(0, *(d + 1 for d in ranks)).contiguous()

    def extent(d: int) -> int:
        """Return how far apart neighbours along d are among one stimulus's neurons in memory."""
        return prod(activation.shape[e] for e in order[order.index(d) + 1 :] if e != 0)

    inner = extent(0)
    norm, activate = epilogue
    scale, shift = norm or (None, None)
    conf = launch or choose(n, p, n_ids, activation.dtype, _launch.capability(activation.device))
    blocks = -(-p // conf.block)
    outermost = inner == p
    _launch.launch(
        _ablate_kernel,
        (n * blocks if outermost else -(-n * p // conf.block), -(-n_ids // conf.cells)),
        activation, rows, ids, scale, shift, out,
        p, blocks, inner, n * inner, n_ids,
        *((activation.shape[1], extent(1)) if norm else (1, 1)), conf.cells,
        OVERLAP=overlap, OUTERMOST=outermost, ACTIVATE=activate, BLOCK=conf.block,
        num_warps=conf.num_warps,
    )  # fmt: skip
    return out


def memory_order(t: Tensor) -> list[int]:
    """List the dimensions from slowest to fastest in memory, as a copy of the tensor has them."""
    strides = torch.empty_like(t, device="meta").stride()
    return sorted(range(t.ndim), key=strides.__getitem__, reverse=True)


def empty_copies(t: Tensor, cells: int, order: list[int]) -> Tensor:
    """Allocate (cells n, …) with this order of dimensions in memory; one cell keeps t's strides."""
    if cells == 1:
        return torch.empty_like(t)
    sizes = cells * len(t), *t.shape[1:]
    out = torch.empty([sizes[d] for d in order], dtype=t.dtype, device=t.device)
    return out.permute([order.index(d) for d in range(t.ndim)])


def _make_case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    norm: bool = False,
    activate: str = "none",
    overlap: bool = False,
) -> _launch.CompileCase:
    n, cells, p = 50, 16, prod(shape)

    def call(device: torch.device) -> Tensor:
        labels = torch.zeros(p, dtype=torch.int64, device=device)
        channel = torch.empty(shape[0], device=device)
        return ablate(
            torch.empty(n, *shape, dtype=dtype, device=device),
            torch.zeros(cells, p, dtype=torch.bool, device=device) if overlap else labels,
            torch.zeros(cells, dtype=torch.int64, device=device),
            epilogue=Epilogue((channel, channel) if norm else None, activate),
        )

    epilogue = " ".join(["norm"] * norm + [activate] * (activate != "none")) or "mask alone"
    label = f"{name}, {str(dtype)[6:]}, {epilogue}{', overlapping' * overlap}"
    return _launch.CompileCase(label, call, floor(n, p, cells, dtype))


AOT_CASES: tuple[_launch.CompileCase, ...] = (
    *(
        _make_case(name, shape, dtype, norm=norm, activate=activate)
        for name, shape, norm, activate in (
            ("alexnet", (64, 55, 55), False, "relu"),
            ("mobilenet", (96, 112, 112), False, "none"),
            ("mobilenet", (96, 112, 112), True, "relu6"),
            ("resnet", (2048, 7, 7), True, "none"),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
    _make_case("resnet", (2048, 7, 7), torch.float32, overlap=True),
)
