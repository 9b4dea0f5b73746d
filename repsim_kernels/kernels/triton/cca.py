"""PWCCA's weights: sums of a product's absolute values, without storing the product.

The neurons come from operands.py, which also serve the Gram matrices of the same call. Directions
are centred in place of the neurons, which is equivalent, and split in the same way. Three products
of halves are as accurate as float32; of "tf32", and of float16 and bfloat16 neurons, the missing
half saves products: one and two remain.

Predictions for an H200, since this was not run on a GPU, for 16 x 499 directions, n = 500 and
p = 100,352: 3 · 801 Gop take 3.0 ms at 800 TFLOP/s of float16, with 0.2 instructions issued for
each cycle of the tensor cores. Pipelines drain after the 8 steps of each tile, which may cost a
tenth more. The operands take 141 µs unless the Gram matrices left them, and the directions 10 µs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._operand_kernels import (
    find_factor,
    find_rows,
    load_tile,
    power_of_two,
)
from repsim_kernels.kernels.triton.gram import make_plan
from repsim_kernels.kernels.triton.operands import Operands, iter_operands

# Most sums of absolute values, one for each item of operands and direction: 256 MiB.
_SUMS = 2**25


@dataclass(frozen=True)
class Launch:
    block_k: int  # directions per tile
    block_p: int  # neurons per tile
    block_n: int  # stimuli per step
    num_warps: int
    num_stages: int


def choose(width: int, planes: int, products: int, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for operands of some planes of a width.

    ``products`` is the number of those of halves, or 0 for float32 operands.
    """
    if products == 0:
        return Launch(block_k=64, block_p=64, block_n=16, num_warps=4, num_stages=2)
    # A step of 128 stimuli has the fewest instructions around its products. With several products
    # it has space in shared memory only if the directions are loaded before the loop, and on 10.0,
    # where they are copied once more, not even then.
    block_n = width if products == 1 or (planes == 1 and capability < (10, 0)) else 64
    if capability < (9, 0):
        block_n = 64
    stages = 2 if products == 3 and (block_n == 128 or capability >= (10, 0)) else 3
    return Launch(
        # The product is the cost, so take the largest tile that does not spill.
        block_k=128,
        block_p=128,
        block_n=block_n,
        num_warps=8,
        num_stages=stages,
    )


def floor(k: int, n: int, p: int, itemsize: int, precision: str) -> _launch.Floor:
    """Lower bound: read x and the directions once; 2 k n p operations, twice that for 16 bits."""
    halves = 2 if itemsize == 2 and precision != "ieee" else 1  # of the directions
    products = _launch.name_products(precision, itemsize)
    return _launch.Floor(n * p * itemsize + 4 * k * n, 2 * k * n * p * halves, products)


@triton.jit
def _directions_kernel(
    h_ptr,  # (k, n) float32 or float64
    hi_ptr,  # (planes, rows, WIDTH)
    lo_ptr, unit_ptr, k, n, rows, planes, stride_k, stride_n,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    direction = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    h_ptr += direction * stride_k
    inside = direction < k
    total = tl.zeros((BLOCK_K, WIDTH), tl.float64)
    for plane in range(0, planes):
        h, _ = _load_plane(h_ptr, plane, inside, n, stride_n, WIDTH)
        total += h
    mean = tl.sum(total, 1) / n
    largest = tl.zeros((BLOCK_K, WIDTH), tl.float64)
    for plane in range(0, planes):
        h, mask = _load_plane(h_ptr, plane, inside, n, stride_n, WIDTH)
        largest = tl.maximum(largest, tl.where(mask, tl.abs(h - mean[:, None]), 0))
    factor = power_of_two(tl.max(largest, 1).to(tl.float32)).to(tl.float64)
    tl.store(unit_ptr + direction, 1 / factor)
    for plane in range(0, planes):
        h, mask = _load_plane(h_ptr, plane, inside, n, stride_n, WIDTH)
        h = tl.where(mask, (h - mean[:, None]) * factor[:, None], 0).to(tl.float32)
        hi = h.to(hi_ptr.dtype.element_ty)
        places = (plane * rows + direction)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(hi_ptr + places, hi)
        if SPLIT:
            tl.store(lo_ptr + places, (h - hi.to(tl.float32)).to(hi_ptr.dtype.element_ty))


@triton.jit
def _load_plane(rows_ptr, plane, inside, n, stride_n, WIDTH: tl.constexpr):
    """Return the stimuli of a plane for the directions that start at rows_ptr, and which exist."""
    stimulus = plane * WIDTH + tl.arange(0, WIDTH)
    mask = inside[:, None] & (stimulus < n)[None, :]
    places = rows_ptr[:, None] + stimulus.to(tl.int64)[None, :] * stride_n
    return tl.load(places, mask=mask, other=0).to(tl.float64), mask


@triton.jit
def _variate_weights_kernel(
    a_hi_ptr, a_lo_ptr, unit_ptr, b_hi_ptr, b_lo_ptr, items_ptr, slots_ptr, maxima_ptr, sums_ptr,
    out_ptr, k, a_rows, b_rows, n_cells, steps,
    A_SPLIT: tl.constexpr, B_SPLIT: tl.constexpr, MIXED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The directions of one item run concurrently: all but the first find its neurons in L2.
    tiles = tl.cdiv(k, BLOCK_K)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    first, end, cell, used = find_rows(
        items_ptr, slots_ptr, sums_ptr, item, n_cells, B_SPLIT, MIXED
    )
    if not used:
        return
    a_hi_ptr += tile * (BLOCK_K * WIDTH)
    a_lo_ptr += tile * (BLOCK_K * WIDTH)
    total = tl.zeros((BLOCK_K, 8), dtype=tl.float32)
    for row in range(first, end, BLOCK_P):
        product = tl.zeros((BLOCK_K, BLOCK_P), dtype=tl.float32)
        own = tl.zeros((), tl.int64)
        at = row * WIDTH
        for step in range(0, steps):
            a = load_tile(a_hi_ptr + own, BLOCK_K, BLOCK_N, WIDTH)
            b = load_tile(b_hi_ptr + at, BLOCK_P, BLOCK_N, WIDTH).T
            product = tl.dot(a, b, product, input_precision="ieee")
            if A_SPLIT:
                c = load_tile(a_lo_ptr + own, BLOCK_K, BLOCK_N, WIDTH)
                product = tl.dot(c, b, product)
            if B_SPLIT:
                d = load_tile(b_lo_ptr + at, BLOCK_P, BLOCK_N, WIDTH).T
                product = tl.dot(a, d, product)
            # To the next columns of a plane, or to the next plane.
            ends = (step + 1) % (WIDTH // BLOCK_N) == 0
            own += BLOCK_N + tl.where(ends, a_rows * WIDTH - WIDTH, 0)
            at += BLOCK_N + tl.where(ends, b_rows * WIDTH - WIDTH, 0)
        total += _sum_groups(product, BLOCK_K, BLOCK_P)
    factor = find_factor(maxima_ptr, sums_ptr, cell, n_cells, MIXED)
    _store_weights(out_ptr + item * k, unit_ptr, total, factor, tile, k, BLOCK_K)


@triton.jit(do_not_specialize=["k", "n_cells"])
def _one_plane_weights_kernel(
    a_hi_ptr, a_lo_ptr, unit_ptr, b_hi_ptr, b_lo_ptr, items_ptr, slots_ptr, maxima_ptr, sums_ptr,
    out_ptr, k, n_cells, A_SPLIT: tl.constexpr, B_SPLIT: tl.constexpr, MIXED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # As above, but the directions are loaded once, and the loop runs over neurons alone.
    tiles = tl.cdiv(k, BLOCK_K)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    first, end, cell, used = find_rows(
        items_ptr, slots_ptr, sums_ptr, item, n_cells, B_SPLIT, MIXED
    )
    if not used:
        return
    a = load_tile(a_hi_ptr + tile * (BLOCK_K * WIDTH), BLOCK_K, WIDTH, WIDTH)
    if A_SPLIT:
        c = load_tile(a_lo_ptr + tile * (BLOCK_K * WIDTH), BLOCK_K, WIDTH, WIDTH)
    total = tl.zeros((BLOCK_K, 8), dtype=tl.float32)
    for row in range(first, end, BLOCK_P):
        product = tl.zeros((BLOCK_K, BLOCK_P), dtype=tl.float32)
        b = load_tile(b_hi_ptr + row * WIDTH, BLOCK_P, WIDTH, WIDTH).T
        product = tl.dot(a, b, product)
        if A_SPLIT:
            product = tl.dot(c, b, product)
        if B_SPLIT:
            d = load_tile(b_lo_ptr + row * WIDTH, BLOCK_P, WIDTH, WIDTH).T
            product = tl.dot(a, d, product)
        total += _sum_groups(product, BLOCK_K, BLOCK_P)
    factor = find_factor(maxima_ptr, sums_ptr, cell, n_cells, MIXED)
    _store_weights(out_ptr + item * k, unit_ptr, total, factor, tile, k, BLOCK_K)


@triton.jit
def _store_weights(out_ptr, unit_ptr, total, factor, tile, k, BLOCK_K: tl.constexpr):
    """Store the sums of a tile of directions in units of x."""
    direction = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    unit = tl.load(unit_ptr + direction) / factor.to(tl.float64)
    tl.store(out_ptr + direction, tl.sum(total.to(tl.float64), 1) * unit, mask=direction < k)


@triton.jit
def _sum_groups(product, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum the absolute values of every 8th column, which one thread holds, to (BLOCK_K, 8)."""
    return tl.sum(tl.reshape(tl.abs(product), (BLOCK_K, BLOCK_P // 8, 8)), 1)


def variate_weights(
    h: Tensor,
    x: Tensor,
    *,
    precision: str = "tf32x3",
    operands: Operands | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Return Σⱼ |hᵢ · xⱼ| over the centred columns of x (n, p) for directions h (k, n).

    The result is (k,) float64. ``operands``: those of all of x, if they exist.
    """
    if operands is not None:
        return _weigh(h, operands, launch)
    plan = make_plan(x, x.shape[1], precision, False)
    total = h.new_zeros(len(h), dtype=torch.float64)
    for span in iter_operands(x[None], None, 1, plan.form):
        total += _weigh(h, span, launch)
    return total


def _weigh(h: Tensor, operands: Operands, launch: Launch | None) -> Tensor:
    """Return the sums over the neurons of some operands, for blocks of directions."""
    blocks = h.split(max(128, _SUMS // len(operands.items)))
    if len(blocks) > 1:
        return torch.cat([_weigh(block, operands, launch) for block in blocks])
    (k, n), form = h.shape, operands.format
    planes, capacity, width = operands.hi.shape
    rows = triton.cdiv(k, 128) * 128
    hi = torch.empty(planes, rows, width, dtype=form.dtype, device=h.device)
    lo = torch.empty_like(hi) if form.split else hi
    unit = torch.empty(rows, dtype=torch.float64, device=h.device)
    _launch.launch(
        _directions_kernel,
        (rows // 8,),
        *(h, hi, lo, unit, k, n, rows, planes, *h.stride()),
        SPLIT=form.split,
        WIDTH=width,
        BLOCK_K=8,
    )
    items = len(operands.items)
    out = torch.zeros(items, k, dtype=torch.float64, device=h.device)
    tables = operands.items, operands.slots, operands.maxima, operands.sums
    # Cells that need both halves, and those that fit in one.
    for split in (True, False) if form.mixed else (form.split,):
        products = 1 + form.split + split if form.dtype == torch.float16 else 0
        settings = launch or choose(width, planes, products, _launch.capability(h.device))
        options = {
            "A_SPLIT": form.split,
            "B_SPLIT": split,
            "MIXED": form.mixed,
            "WIDTH": width,
            "BLOCK_K": settings.block_k,
            "BLOCK_P": settings.block_p,
            "num_warps": settings.num_warps,
            "num_stages": settings.num_stages,
        }
        grid = (triton.cdiv(k, settings.block_k) * items,)
        arguments = (hi, lo, unit, operands.hi, operands.lo, *tables, out, k)
        if planes == 1 and settings.block_n == width:
            _launch.launch(
                _one_plane_weights_kernel, grid, *(*arguments, operands.n_cells), **options
            )
        else:
            _launch.launch(
                _variate_weights_kernel,
                grid,
                *(*arguments, rows, capacity, operands.n_cells),
                planes * (width // settings.block_n),
                BLOCK_N=settings.block_n,
                **options,
            )
    return out.sum(0)


def _make_case(
    k: int, n: int, p: int, dtype: torch.dtype, precision: str, rows: bool = False
) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        shape = (n, p) if rows else (p, n)
        x = torch.empty(shape, dtype=dtype, device=device)
        h = torch.empty(k, n, dtype=torch.float64, device=device)
        variate_weights(h, x if rows else x.mT, precision=precision)

    order = "stimuli" if rows else "neurons"
    return _launch.CompileCase(
        f"{k:,} directions, n = {n}, p = {p:,}, {str(dtype)[6:]}, {precision}, by {order}",
        call,
        floor(k, n, p, dtype.itemsize, precision),
        products=precision != "ieee",
    )


AOT_CASES = (
    _make_case(16 * 499, 500, 100_352, torch.float32, "tf32x3"),
    _make_case(16 * 499, 500, 100_352, torch.float32, "tf32x3", rows=True),
    _make_case(16 * 499, 500, 100_352, torch.float32, "tf32"),
    _make_case(16 * 499, 500, 100_352, torch.float32, "ieee"),
    _make_case(16 * 499, 500, 100_352, torch.bfloat16, "tf32x3"),
    _make_case(16 * 127, 128, 100_352, torch.float32, "tf32x3"),
    _make_case(16 * 49, 50, 193_600, torch.float32, "tf32x3"),
    _make_case(16 * 49, 50, 193_600, torch.bfloat16, "tf32x3"),
)
