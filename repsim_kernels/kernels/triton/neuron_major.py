"""Tiled transposition of a layer's activations to neuron-major order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch


@dataclass(frozen=True)
class Launch:
    block_p: int  # neurons per tile
    block_n: int  # stimuli per tile
    num_warps: int = 4


def choose(n: int, inner: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for n stimuli and `inner` neurons that are adjacent in memory."""
    # Writes lines of 256 bytes (128 for 16-bit values); a shorter row is written whole.
    block_n = min(64, triton.next_power_of_2(n))
    # 4096 elements per tile, 32 per thread: all loads are in flight before the first store, and at
    # most 64 registers let 8 programs share a multiprocessor (8192 16-bit elements took 178).
    block_p = min(4096 // block_n, triton.next_power_of_2(inner))
    return Launch(block_p, block_n, num_warps=4)


def floor(n: int, p: int, dtype: torch.dtype) -> _launch.Floor:
    """Lower bound: one read and one write."""
    return _launch.Floor(bytes=2 * n * p * dtype.itemsize, operations=0)


class _Axis(NamedTuple):
    """Evenly spaced neurons: `stride` elements apart in memory, `step` rows apart in the output."""

    size: int
    stride: int
    step: int


def _merge_axes(activation: Tensor) -> list[_Axis]:
    """List all dimensions but the first, smallest stride first, merged where strides allow it."""
    axes: list[_Axis] = []
    step = 1
    dimensions = zip(activation.shape[1:], activation.stride()[1:], strict=True)
    for size, stride in reversed(list(dimensions)):
        if size > 1:
            if axes and stride == axes[-1].size * axes[-1].stride:
                axes[-1] = axes[-1]._replace(size=size * axes[-1].size)
            else:
                axes.append(_Axis(size, stride, step))
        step *= size
    return sorted(axes, key=lambda axis: axis.stride)


@triton.jit
def _neuron_major_kernel(
    x_ptr,  # element i * stride_n + j * stride_inner + k * stride_outer: stimulus i, neuron (j, k)
    out_ptr,  # (p, n), row j * step_inner + k * step_outer
    n,
    inner,
    stride_n,
    stride_inner,
    stride_outer,
    step_inner,
    step_outer,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Stimuli vary fastest, so adjacent outputs are written at the same time.
    n_blocks = tl.cdiv(n, BLOCK_N)
    p_blocks = tl.cdiv(inner, BLOCK_P)
    block = tl.program_id(0).to(tl.int64)
    i = block % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    j = block // n_blocks % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    k = block // n_blocks // p_blocks
    inside = (j < inner)[:, None] & (i < n)[None, :]
    places = j[:, None] * stride_inner + i[None, :] * stride_n  # (BLOCK_P, BLOCK_N)
    x = tl.load(x_ptr + k * stride_outer + places, mask=inside)  # (BLOCK_P, BLOCK_N)
    rows = j * step_inner + k * step_outer
    tl.store(out_ptr + rows[:, None] * n + i[None, :], x, mask=inside)


def neuron_major(activation: Tensor, *, launch: Launch | None = None) -> Tensor:
    """Return the activation (n, …) as contiguous (p, n), neurons in C order of one stimulus.

    The result is a view if the activation already has that layout. The kernel reads contiguous and
    channels_last tensors along memory; PyTorch copies tensors with more than two dimensions after
    the first that can't be merged.
    """
    n, p = activation.shape[0], math.prod(activation.shape[1:])
    rows = activation.movedim(0, -1)
    if rows.is_contiguous():
        return rows.view(p, n)
    axes = _merge_axes(activation)
    if len(axes) > 2:
        return activation.reshape(n, p).t().contiguous()
    inner, outer = (*axes, _Axis(1, 0, 0), _Axis(1, 0, 0))[:2]
    capability = _launch.capability(activation.device)
    launch = launch or choose(n, inner.size, activation.dtype, capability)
    out = torch.empty(p, n, dtype=activation.dtype, device=activation.device)
    blocks = triton.cdiv(n, launch.block_n) * triton.cdiv(inner.size, launch.block_p) * outer.size
    _launch.launch(
        _neuron_major_kernel,
        (blocks,),
        activation,
        out,
        n,
        inner.size,
        activation.stride(0),
        inner.stride,
        outer.stride,
        inner.step,
        outer.step,
        BLOCK_P=launch.block_p,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
    )
    return out


def _make_case(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, order: torch.memory_format
) -> _launch.CompileCase:
    return _launch.CompileCase(
        f"{name}, {str(order)[6:]}, {str(dtype)[6:]}",
        lambda device: neuron_major(
            torch.empty(shape, dtype=dtype, device=device, memory_format=order)
        ),
        floor(shape[0], math.prod(shape[1:]), dtype),
    )


AOT_CASES: tuple[_launch.CompileCase, ...] = tuple(
    _make_case(name, shape, dtype, order)
    for name, shape in (
        ("AlexNet's first layer", (50, 64, 55, 55)),
        ("ResNet50's last block", (500, 2048, 7, 7)),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for order in (torch.contiguous_format, torch.channels_last)
)
