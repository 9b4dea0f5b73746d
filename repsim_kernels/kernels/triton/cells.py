"""Class means and the selectivity grid, from one read of the activations in memory order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch.cells import grid_from_sums
from repsim_kernels.kernels.triton import _launch


@dataclass(frozen=True)
class Launch:
    classes: int  # per tile
    block_p: int  # neurons per tile
    block_n: int  # stimuli per tile
    num_warps: int


def choose(
    n: int,
    p: int,
    n_classes: int,
    by_neuron: bool,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> Launch:
    """Choose launch settings for n stimuli; by_neuron: x is neuron-major in memory."""
    if by_neuron:
        # A class's stimuli are scattered in memory, so a tile sums 16 classes (8 if there are no
        # more) by a one-hot product; with a single group of classes, stimuli are read in order.
        classes = 8 if n_classes <= 8 else 16
        # 64 x 32 float64 operands: 128 registers per thread, so four programs fit on a
        # multiprocessor. On 10.0 Triton 3.6 has no float64 product and the unrolled code spills,
        # so the tile is half as large there.
        block_n = 16 if capability >= (10, 0) else 32
        return Launch(classes, block_p=64, block_n=block_n, num_warps=4)
    # A class is a set of memory rows: one class per program, no product. 32 values per thread: 128
    # registers, four programs, 32 KiB of 16-bit values in flight per multiprocessor. Small classes
    # get shorter tiles, because a tall one would be mostly empty.
    block_n = min(16, triton.next_power_of_2(-(-n // n_classes)))
    return Launch(1, block_p=256, block_n=block_n, num_warps=min(4, block_n))


def floor(n: int, p: int, n_classes: int, dtype: torch.dtype) -> _launch.Floor:
    """Lower bound: read x once, write the means once; one float64 addition per element."""
    size = n * p * dtype.itemsize + 8 * n_classes * p
    return _launch.Floor(bytes=size, operations=n * p)


def unsupported(x: Tensor) -> str | None:
    """Return why the kernel can't take x, or None if it can."""
    return _launch.unsupported(x)


@triton.jit
def _tile(x_ptr, order_ptr, slot, end, j, p, stride_n, stride_p, GATHER: tl.constexpr):
    """Load neurons j (BLOCK_P,) of the stimuli in these slots (BLOCK_N,); 0 outside."""
    i = tl.load(order_ptr + slot, mask=slot < end, other=0) if GATHER else slot
    places = j[:, None] * stride_p + i.to(tl.int64)[None, :] * stride_n  # (BLOCK_P, BLOCK_N)
    inside = (j < p)[:, None] & (slot < end)[None, :]
    return tl.load(x_ptr + places, mask=inside, other=0)


@triton.jit
def _class_means_kernel(
    x_ptr,  # (n, p)
    means_ptr,  # (n_classes, p) float64
    start_ptr,  # (groups + 1,) first slot of each group of classes
    order_ptr,  # (n,) stimulus in each slot
    class_ptr,  # (n,) class of that stimulus
    count_ptr,  # (n_classes,) divisor of each sum
    p,
    n_classes,
    groups,
    stride_n,
    stride_p,
    GATHER: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Groups that read the same neurons run concurrently, so they share sectors through the cache.
    group = tl.program_id(0) % groups
    j = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = group * CLASSES + tl.arange(0, CLASSES)
    start, end = tl.load(start_ptr + group), tl.load(start_ptr + group + 1)
    slots = tl.arange(0, BLOCK_N)

    total = tl.zeros([BLOCK_P, BLOCK_N if CLASSES == 1 else CLASSES], tl.float64)
    tile = _tile(x_ptr, order_ptr, start + slots, end, j, p, stride_n, stride_p, GATHER)
    for first in range(start, end, BLOCK_N):
        x = tile.to(tl.float32).to(tl.float64)  # (BLOCK_P, BLOCK_N)
        # The next tile is loaded before this one is summed. Triton 3.8 also fails to compile a
        # float64 product of a 16-bit load in the same iteration.
        slot = first + BLOCK_N + slots
        tile = _tile(x_ptr, order_ptr, slot, end, j, p, stride_n, stride_p, GATHER)
        if CLASSES == 1:
            total += x
        else:
            slot = first + slots
            label = tl.load(class_ptr + slot, mask=slot < end, other=-1)
            member = (label[:, None] == c[None, :]).to(tl.float64)  # (BLOCK_N, CLASSES)
            total = tl.dot(x, member, total, input_precision="ieee", out_dtype=tl.float64)

    if CLASSES == 1:
        total = tl.sum(total, 1, keep_dims=True)
    count = tl.load(count_ptr + c, mask=c < n_classes, other=1).to(tl.float64)
    inside = (j < p)[:, None] & (c < n_classes)[None, :]
    means = means_ptr + c.to(tl.int64)[None, :] * p + j[:, None]  # (BLOCK_P, CLASSES)
    tl.store(means, total / count[None, :], mask=inside)


def _sum_and_divide(
    x: Tensor, labels: np.ndarray, counts: np.ndarray, launch: Launch | None
) -> Tensor:
    """Sum x over the stimuli of each class and divide by the class's entry of counts (k,)."""
    n, p = x.shape
    k = len(counts)
    by_neuron = x.stride(0) < x.stride(1)
    capability = _launch.capability(x.device)
    launch = launch or choose(n, p, k, by_neuron, x.dtype, capability)
    groups = triton.cdiv(k, launch.classes)
    group = labels // launch.classes
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(groups + 1))
    # One array for a single copy to the device; its rows are multiples of 16 bytes, for alignment.
    plan = np.zeros((4, -(-max(n, k, groups + 1) // 4) * 4), dtype=np.int32)
    for row, values in zip(plan, (starts, order, labels[order], counts), strict=True):
        row[: len(values)] = values
    out = torch.empty(k, p, dtype=torch.float64, device=x.device)
    _launch.launch(
        _class_means_kernel,
        (groups * triton.cdiv(p, launch.block_p),),
        x,
        out,
        *torch.from_numpy(plan).to(x.device),
        p,
        k,
        groups,
        x.stride(0),
        x.stride(1),
        GATHER=groups > 1,
        CLASSES=launch.classes,
        BLOCK_P=launch.block_p,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
    )
    return out


def class_means(
    x: Tensor, *, labels: np.ndarray, n_classes: int, launch: Launch | None = None
) -> Tensor:
    """Average x (n, p) over the stimuli of each class: (n_classes, p), float64."""
    return _sum_and_divide(x, labels, np.bincount(labels, minlength=n_classes), launch)


def selectivity_grid(
    x: Tensor,
    *,
    labels: np.ndarray,
    target: int,
    grid: tuple[int, int],
    edges: str,
    launch: Launch | None = None,
) -> Tensor:
    """Assign each neuron of x (n, p) to a cell by selectivity, then magnitude: (p,) or (C, p)."""
    is_target = labels == target
    sums = _sum_and_divide(x, is_target.astype(np.int64), np.ones(2, np.int64), launch)
    return grid_from_sums(*sums, n_target=int(is_target.sum()), n=len(x), grid=grid, edges=edges)


def _make_case(
    name: str, n: int, p: int, k: int, by_neuron: bool, dtype: torch.dtype
) -> _launch.CompileCase:
    def call(device: torch.device) -> Tensor:
        x = torch.empty((p, n) if by_neuron else (n, p), dtype=dtype, device=device)
        return class_means(x.t() if by_neuron else x, labels=np.arange(n) % k, n_classes=k)

    order = "neuron by neuron" if by_neuron else "stimulus by stimulus"
    title = f"{name}, {k} classes, {order}, {str(dtype)[6:]}"
    return _launch.CompileCase(title, call, floor(n, p, k, dtype))


AOT_CASES: tuple[_launch.CompileCase, ...] = tuple(
    _make_case(name, n, p, k, by_neuron, dtype)
    for name, n, p, k in (
        ("AlexNet's first layer", 50, 193_600, 10),
        ("ResNet50's last block", 500, 100_352, 10),
        ("ResNet50's last block", 500, 100_352, 2),  # as selectivity_grid calls it
        ("ResNet50's last block", 500, 100_352, 100),  # several groups
    )
    for by_neuron in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
)
