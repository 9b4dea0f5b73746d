"""A linear layer of activations with the columns of one cell set to zero, for many cells at once.

The cells partition the columns, so the output without a cell is the sum of the other cells'
outputs: every column of the activations and the weights is read once, for any number of cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.masked_copies import apply_activation
from repsim_kernels.kernels.triton.masked_pointwise import product_dtype


@dataclass(frozen=True)
class Launch:
    rows: int  # stimuli per program
    outs: int  # outputs per program
    depth: int  # columns per step
    chunk: int  # columns per program, in one accumulator of the tensor cores, which truncate
    block: int  # outputs per program of the second kernel
    num_warps: int
    num_stages: int


def choose(n: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for n stimuli."""
    return Launch(
        # The weights are gathered once per 64 stimuli.
        rows=max(16, min(64, triton.next_power_of_2(n))),
        outs=64,
        depth=16 if dtype == torch.float32 else 32,
        # 64 steps of 8 columns: truncation stays near float32's rounding.
        chunk=512,
        block=256,
        num_warps=8,
        num_stages=3,
    )


def floor(
    n: int, p: int, outs: int, cells: int, dtype: torch.dtype, precision: str
) -> _launch.Floor:
    """Lower bound: read activations and weights once, write the outputs; one product in all."""
    numbers = n * p + p * outs + cells * n * outs
    return _launch.Floor(numbers * dtype.itemsize, 2 * n * p * outs, precision)


@triton.jit
def _parts_kernel(
    x_ptr, weight_ptr, order_ptr, items_ptr, parts_ptr, n, p, outs, x_row, x_column,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * OUTS + tl.arange(0, OUTS)  # (OUTS,)
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    first = tl.load(items_ptr + 2 * item)
    last = tl.load(items_ptr + 2 * item + 1)
    x_at = x_ptr + i.to(tl.int64)[:, None] * x_row
    w_at = weight_ptr + o.to(tl.int64)[None, :] * p
    part = tl.zeros((ROWS, OUTS), tl.float32)
    for step in range(first, last, DEPTH):
        at = step + tl.arange(0, DEPTH)  # (DEPTH,)
        column = tl.load(order_ptr + at, mask=at < last, other=0)
        x_mask = (i < n)[:, None] & (at < last)[None, :]
        w_mask = (at < last)[:, None] & (o < outs)[None, :]
        x = tl.load(x_at + column.to(tl.int64)[None, :] * x_column, mask=x_mask, other=0.0)
        w = tl.load(w_at + column[:, None], mask=w_mask, other=0.0)  # (DEPTH, OUTS)
        x = x.to(tl.float32).to(PRODUCT)  # (ROWS, DEPTH)
        w = w.to(tl.float32).to(PRODUCT)
        part = tl.dot(x, w, part, input_precision=PRECISION)  # (ROWS, OUTS)
    target = (item * n + i)[:, None] * outs + o[None, :]
    tl.store(parts_ptr + target, part, mask=(i < n)[:, None] & (o < outs)[None, :])


@triton.jit
def _others_kernel(
    parts_ptr, ranges_ptr, scale_ptr, bias_ptr, out_ptr, items, size, outs, cells,
    ACTIVATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,), in (n, outs)
    mask = e < size
    total = tl.zeros((BLOCK,), tl.float64)
    source = parts_ptr
    for _ in range(0, items):
        total += tl.load(source + e, mask=mask, other=0.0)
        source += size
    for _ in range(0, cells):
        first = tl.load(ranges_ptr)
        last = tl.load(ranges_ptr + 1)
        ranges_ptr += 2
        cell_sum = tl.zeros((BLOCK,), tl.float64)
        source = parts_ptr + first.to(tl.int64) * size
        for _ in range(first, last):
            cell_sum += tl.load(source + e, mask=mask, other=0.0)
            source += size
        value = total - cell_sum
        # A NaN or infinity in this cell makes the difference NaN; sum the other cells instead.
        if tl.max((value != value).to(tl.int32), 0) != 0:
            value = tl.zeros((BLOCK,), tl.float64)
            source = parts_ptr
            for item in range(0, items):
                outside = (item < first) | (item >= last)
                value += tl.load(source + e, mask=mask & outside, other=0.0)
                source += size
        if scale_ptr is not None:
            value *= tl.load(scale_ptr + e % outs, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + e % outs, mask=mask, other=0.0).to(tl.float32)
        y = apply_activation(value.to(tl.float32), ACTIVATE).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + e, y, mask=mask)
        out_ptr += size


def linear_cells(
    x: Tensor,
    cells: np.ndarray[Any, Any],
    weight: Tensor,
    bias: Tensor | None,
    ids: Iterable[int],
    *,
    scale: Tensor | None = None,
    activate: str = "none",
    precision: str = "tf32x3",
    launch: Launch | None = None,
) -> Tensor:
    """Apply ``activate(weight @ x * scale + bias)`` without the columns of each cell in ids.

    ``cells`` are labels (p,) of the columns of x (n, p); they and ``ids`` are on the host. Returns
    (len(ids) n, outs).
    """
    (n, p), outs, ids = x.shape, len(weight), np.asarray(list(ids), dtype=np.int64)
    out = x.new_empty(len(ids) * n, outs)
    if out.numel() == 0:
        return out
    conf = launch or choose(n, x.dtype, precision, _launch.capability(x.device))
    order, items, ranges = _plan_items(cells, ids, conf.chunk)
    weight = weight.contiguous()
    parts = torch.empty(len(items), n, outs, dtype=torch.float32, device=x.device)

    def to_device(a: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(a.astype(np.int32)).to(x.device)

    _launch.launch(
        _parts_kernel, (len(items), -(-outs // conf.outs), -(-n // conf.rows)),
        x, weight, to_device(order), to_device(items), parts, n, p, outs, *x.stride(),
        PRODUCT=product_dtype(x.dtype), PRECISION=precision,
        ROWS=conf.rows, OUTS=conf.outs, DEPTH=conf.depth,
        num_warps=conf.num_warps, num_stages=conf.num_stages,
    )  # fmt: skip
    _launch.launch(
        _others_kernel, (-(-n * outs // conf.block),),
        parts, to_device(ranges), scale, bias, out, len(items), n * outs, outs, len(ids),
        ACTIVATE=activate, BLOCK=conf.block, num_warps=4,
    )  # fmt: skip
    return out


def _plan_items(
    cells: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], chunk: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return columns sorted by cell, bounds of the items (items, 2), and items of each id (ids, 2).

    An item has at most ``chunk`` columns of one cell; the cells outside ids are merged into one.
    """
    key = np.where(np.isin(cells, ids), cells, -1)
    order = np.argsort(key, kind="stable")
    groups, sizes = np.unique(key, return_counts=True)
    ends, pieces = np.cumsum(sizes), -(-sizes // chunk)
    last_item = np.cumsum(pieces)
    rank = np.arange(pieces.sum()) - np.repeat(last_item - pieces, pieces)  # within its cell
    first = np.repeat(ends - sizes, pieces) + chunk * rank
    items = np.stack([first, np.minimum(first + chunk, np.repeat(ends, pieces))], 1)
    at = np.minimum(np.searchsorted(groups, ids), len(groups) - 1)
    last = np.where(groups[at] == ids, last_item[at], 0)
    return order, items, np.stack([last - np.where(last > 0, pieces[at], 0), last], 1)


def _make_case(n: int, p: int, outs: int, cells: int, dtype: torch.dtype) -> _launch.CompileCase:
    def call(device: torch.device) -> Tensor:
        return linear_cells(
            torch.empty(n, p, dtype=dtype, device=device),
            np.arange(p) % cells,
            torch.empty(outs, p, dtype=dtype, device=device),
            torch.empty(outs, dtype=dtype, device=device),
            range(cells),
            activate="relu",
        )

    name = f"{p} to {outs}, {str(dtype)[6:]}"
    precision = "tf32x3" if dtype == torch.float32 else "bfloat16"
    bound = floor(n, p, outs, cells, dtype, precision)
    return _launch.CompileCase(name, call, bound, products=True)


AOT_CASES: tuple[_launch.CompileCase, ...] = tuple(
    _make_case(50, 9216, 4096, 16, dtype) for dtype in (torch.float32, torch.bfloat16)
)
