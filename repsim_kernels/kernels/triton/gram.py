"""Gram matrices of centred representations, whole and by cell, from operands made once.

The kernel multiplies what operands.py wrote and does nothing more: a step of its loop loads tiles
and adds their products. The first stimulus is subtracted from all others in the operands; the mean
over stimuli is then removed from the n x n result in float64. This needs no pass for the means, and
a large feature mean costs no digits.

``precision="tf32x3"`` multiplies two halves of float16 in three products, whose result is as
accurate as float32's and which take half the time of three TF32 products. "tf32" multiplies the
first halves, with the 11 bits of TF32. float16 and bfloat16 need one product in either case.

Predictions for an H200, since this was not run on a GPU, for n = 500 and p = 100,352 in float32:
the operands take 141 µs for 607 MB. 10 tiles of 128 x 128 on and below the diagonal are 3 · 33 Gop:
125 µs at 790 TFLOP/s of float16, with 0.2 instructions issued for each cycle of the tensor cores.
They read 1.0 GB, mostly from the L2 cache, and pipelines drain every 512 neurons: 150 to 200 µs.
The sums take 10 µs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels._cell_sets import Cells, SparseCells, are_partitions
from repsim_kernels.kernels.torch import distances
from repsim_kernels.kernels.torch import gram as torch_gram
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._operand_kernels import (
    count_pairs,
    find_factor,
    find_rows,
    find_tile,
    keeps_digits,
    load_tile,
    power_of_two,
)
from repsim_kernels.kernels.triton.operands import (
    Format,
    Operands,
    count_matrices,
    iter_operands,
    number_cells,
)

_MEMBERSHIP = 2**26  # most elements of sparse cells that become a membership together


@dataclass(frozen=True)
class Launch:
    block_n: int  # stimuli per tile
    block_p: int  # neurons per step
    inner: int  # neurons summed in one accumulator of the tensor cores, which truncate
    chunk: int  # neurons per program
    num_warps: int
    num_stages: int


def choose(
    n: int, columns: int, products: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Launch:
    """Choose launch settings for n stimuli and the columns of one matrix or partition.

    ``products`` is 3 for two halves, and otherwise 1; ``dtype`` is that of the operands.
    """
    # A tile of 128 has 128 accumulators per thread for the two levels of sums. Before 9.0 operands
    # are in registers too, and it would spill.
    large = dtype == torch.float16 and n > 64 and capability >= (9, 0)
    block_n = 128 if large else 64
    # Four waves of programs on 132 multiprocessors. With 8192 neurons, writing the tile is 1 % of
    # a program's traffic.
    chunk = columns * count_tiles(n, block_n) // (4 * 132) // 512 * 512
    if dtype == torch.float32:
        block_p, num_warps, num_stages = 16, 8, 2
    elif capability < (9, 0):
        block_p, num_warps, num_stages = (32, 4, 3) if products == 3 else (128, 8, 3)
    elif large:
        # 64 KB per stage either way; on 10.0 the left tiles of three products are copied once more.
        block_p = 64 if products == 3 else 128
        num_warps, num_stages = 8, 2 if products == 3 and capability >= (10, 0) else 3
    else:
        # Long steps, since a tile of 64 has few products for the instructions around them.
        block_p, num_warps, num_stages = (128, 4, 3) if products == 3 else (256, 4, 2)
    return Launch(
        block_n=block_n,
        block_p=block_p,
        # 32 steps of 16 neurons: truncation stays below 1e-5 of a diagonal element.
        inner=512,
        chunk=min(max(chunk, 512), 8192),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def count_tiles(n: int, block_n: int) -> int:
    """Count the tiles on and below the diagonal."""
    tiles = -(-n // block_n)
    return tiles * (tiles + 1) // 2


def floor(n: int, p: int, itemsize: int, grams: int, precision: str) -> _launch.Floor:
    """Lower bound: read x once, write the Grams once; n (n + 1) p operations for all cells."""
    products = _launch.name_products(precision, itemsize)
    return _launch.Floor(n * p * itemsize + grams * n * n * 8, n * (n + 1) * p, products)


def unsupported(x: Tensor) -> str | None:
    """Return why the kernel can't take x, or None if it can."""
    return _launch.unsupported(x)


@dataclass(frozen=True)
class Plan:
    """The operands' format, and the kernel launches that multiply all of them."""

    form: Format
    launches: tuple[tuple[Launch, bool], ...]  # and whether it multiplies both halves


def make_plan(
    x: Tensor, columns: int, precision: str, shifts: bool, launch: Launch | None = None
) -> Plan:
    """Plan the products of x (…, n, p), with the columns of one matrix or partition.

    Others must not change how its neurons are divided. ``shifts`` need both halves, whatever the
    precision.
    """
    dtype = torch.float32 if precision == "ieee" else torch.float16
    mixed = x.dtype != torch.float32 and dtype == torch.float16
    split = dtype == torch.float16 and (precision == "tf32x3" or mixed or shifts)
    capability = _launch.capability(x.device)
    launches = [
        (launch or choose(x.shape[-2], columns, 3 if both else 1, dtype, capability), both)
        for both in ((True, False) if mixed else (split,))
    ]
    pad = max(128, *(each.block_p for each, _ in launches))
    block_n, chunk = launches[0][0].block_n, launches[0][0].chunk
    return Plan(Format(block_n, pad, chunk, dtype, split, mixed), tuple(launches))


@triton.jit(do_not_specialize=["n_cells"])
def _gram_kernel(
    hi_ptr, lo_ptr, items_ptr, slots_ptr, sums_ptr, partial_ptr, n, n_cells, capacity,
    SPLIT: tl.constexpr, MIXED: tl.constexpr, SAME: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # The tiles of one item run concurrently: all but the first find its neurons in the L2 cache.
    pairs = count_pairs(n, BLOCK_N)
    item = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    first, end, _, used = find_rows(items_ptr, slots_ptr, sums_ptr, item, n_cells, SPLIT, MIXED)
    if not used:
        return
    i, j = find_tile(pair)
    row = i.to(tl.int64) * capacity
    col = j.to(tl.int64) * capacity
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, INNER):
        part = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for step in range(start, tl.minimum(start + INNER, end), BLOCK_P):
            a = load_tile(hi_ptr + (row + step) * BLOCK_N, BLOCK_P, BLOCK_N, BLOCK_N)
            b = a
            if not SAME:
                b = load_tile(hi_ptr + (col + step) * BLOCK_N, BLOCK_P, BLOCK_N, BLOCK_N)
            part = tl.dot(a.T, b, part, input_precision="ieee")
            if SPLIT:
                c = load_tile(lo_ptr + (row + step) * BLOCK_N, BLOCK_P, BLOCK_N, BLOCK_N)
                d = c
                if not SAME:
                    d = load_tile(lo_ptr + (col + step) * BLOCK_N, BLOCK_P, BLOCK_N, BLOCK_N)
                part = tl.dot(a.T, d, part)
                part = tl.dot(c.T, b, part)
        total += part
    square = tl.arange(0, BLOCK_N)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial_ptr + (item * pairs + pair) * (BLOCK_N * BLOCK_N) + square, total)


@triton.jit(do_not_specialize=["n_cells"])
def _sum_kernel(
    partial_ptr, slots_ptr, maxima_ptr, sums_ptr, g_ptr, shift_ptr, n, n_cells,
    MIXED: tl.constexpr, SHIFTS: tl.constexpr, FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    strips = BLOCK_N // STRIP
    pairs = count_pairs(n, BLOCK_N)
    strip = tl.program_id(0) % strips
    pair = tl.program_id(0) // strips % pairs
    cell = (tl.program_id(0) // strips // pairs).to(tl.int64)
    i, j = find_tile(pair)
    within = strip * STRIP + tl.arange(0, STRIP)
    square = within[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((STRIP, BLOCK_N), dtype=tl.float64)
    for slot in range(tl.load(slots_ptr + cell), tl.load(slots_ptr + cell + 1)):
        total += tl.load(partial_ptr + (slot * pairs + pair) * (BLOCK_N * BLOCK_N) + square).to(
            tl.float64
        )
    # Multiplying by a power of two is exact; dividing would spill.
    unit = 1.0 / find_factor(maxima_ptr, sums_ptr, cell, n_cells, MIXED).to(tl.float64)
    rows = (i * BLOCK_N + within)[:, None]
    cols = (j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    if SHIFTS:
        # The first stimulus is zero, and its place is taken by its values, with their own factor.
        has_first = True
        if MIXED:
            has_first = not keeps_digits(sums_ptr, cell, n_cells)
        other = 1.0 / power_of_two(tl.load(maxima_ptr + n_cells + cell)).to(tl.float64)
        shift = tl.where((cols == 0) & (rows > 0) & has_first, total * (unit * other), 0)
        shift_rows = i * BLOCK_N + within
        place = shift_ptr + cell * n + shift_rows
        shift = tl.sum(shift, 1)
        if not FIRST:
            shift += tl.load(place, mask=(j == 0) & (shift_rows < n), other=0)
        tl.store(place, shift, mask=(j == 0) & (shift_rows < n))
        total = tl.where((cols == 0) & has_first, 0, total)
    total = total * unit * unit
    # Each element below the diagonal is written twice, so the result is exactly symmetric.
    lower = (rows < n) & (cols <= rows)
    g_ptr += cell * n * n
    if not FIRST:
        total += tl.load(g_ptr + rows.to(tl.int64) * n + cols, mask=lower, other=0)
    tl.store(g_ptr + rows.to(tl.int64) * n + cols, total, mask=lower)
    tl.store(g_ptr + cols.to(tl.int64) * n + rows, total, mask=lower)


def centered_gram(
    x: Tensor,
    *,
    kernel: str,
    sigma: float | None,
    precision: str = "tf32x3",
    launch: Launch | None = None,
) -> Tensor:
    """Return the Gram matrices (…, n, n) of x (…, n, p), centred, in float64."""
    n, p = x.shape[-2:]
    batch = x.reshape(-1, n, p)
    plan = make_plan(x, p, precision, False, launch)
    parts = batch.split(count_matrices(n, p, plan.form))
    spans = (iter_operands(part, None, len(part), plan.form) for part in parts)
    g = torch.cat([sum_grams(operands, plan.launches)[0] for operands in spans]).view(
        *x.shape[:-1], n
    )
    if kernel == "linear":
        return torch_gram.centre_gram(g)
    assert sigma is not None
    return torch_gram.double_centre(distances.rbf_from_gram(g, x, sigma))


def cell_grams(
    x: Tensor,
    *,
    cells: Cells,
    n_cells: int,
    precision: str = "tf32x3",
    launch: Launch | None = None,
) -> Tensor:
    """Return the Gram matrix of each cell, (C, n, n) float64.

    ``cells`` are labels (p,), a membership (C, p) or sparse, or partitions (T, p), which give
    (T, C, n, n). Sparse cells become memberships chunk by chunk.
    """
    if isinstance(cells, SparseCells):
        g = torch.empty(n_cells, len(x), len(x), dtype=torch.float64, device=x.device)
        step = max(1, _MEMBERSHIP // cells.p)
        for start in range(0, n_cells, step):
            chunk = cells.select(slice(start, start + step)).to_membership()
            grams = cell_statistics(x, chunk, len(chunk), precision=precision, launch=launch)[0]
            g[start : start + step] = grams
        return g
    g = cell_statistics(x, cells, n_cells, precision=precision, launch=launch)[0]
    if are_partitions(cells):
        return g.view(len(cells), n_cells, *g.shape[1:])
    return g


def cell_statistics(
    x: Tensor,
    cells: np.ndarray,
    n_cells: int,
    shifts: bool = False,
    *,
    precision: str = "tf32x3",
    launch: Launch | None = None,
    kept: list[Operands] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the torch backend's `cell_statistics` from operands, without waiting for the device.

    The cells of T partitions are numbered consecutively, T C in all. ``kept`` receives operands
    that serve `variate_weights` as well: those of labels (p,), which must leave out no neuron.
    """
    labels, total = number_cells(cells, n_cells, x.device)
    columns = x.shape[1] if cells.dtype != np.bool_ else int(np.count_nonzero(cells))
    plan = make_plan(x, columns, precision, shifts, launch)
    spans = iter_operands(x, labels, total, plan.form, shifts)
    if kept is not None and cells.ndim == 1 and not shifts:
        kept.clear()
        spans = _keep(spans, kept, x.shape[1])
    g, n_varying, u = sum_grams(spans, plan.launches)
    if u is None:
        return torch_gram.centre_gram(g), n_varying, g.new_empty(len(g), 0)
    shift = u + g.mean(-1)
    return torch_gram.centre_gram(g), n_varying, shift - shift.mean(-1, keepdim=True)


def _keep(spans: Iterable[Operands], kept: list[Operands], p: int) -> Iterator[Operands]:
    """Yield operands, and keep those of all p neurons, unless padding makes them much larger."""
    for operands in spans:
        if operands.neurons == p and operands.hi.shape[1] <= p + max(p // 4, 4096):
            kept.append(operands)
        yield operands


def sum_grams(
    spans: Iterable[Operands], launches: tuple[tuple[Launch, bool], ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the Grams of each cell's operands, their numbers of varying neurons, and D x₀.

    D = x - x₀, where x₀ is the first stimulus; D x₀ is None if the operands hold no shifts. The
    Grams of cells that keep their digits are those of x.
    """
    results: list[Tensor] = []
    for operands in spans:
        n, n_cells, device = operands.n, operands.n_cells, operands.hi.device
        form, capacity = operands.format, operands.hi.shape[1]
        width, pairs = form.width, count_tiles(n, form.width)
        partial = torch.empty(len(operands.items) * pairs * width**2, device=device)
        for launch, split in launches:
            _launch.launch(
                _gram_kernel,
                (len(operands.items) * pairs,),  # y allows 65,535 blocks
                *(operands.hi, operands.lo, operands.items, operands.slots, operands.sums, partial),
                *(n, n_cells, capacity),
                SPLIT=split,
                MIXED=form.mixed,
                SAME=n <= width,
                BLOCK_N=width,
                BLOCK_P=launch.block_p,
                INNER=launch.inner,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
        is_first = not results
        if is_first:
            g = torch.empty(n_cells, n, n, dtype=torch.float64, device=device)
            u = g.new_empty(n_cells if operands.shifts else 0, n)
            results = [g, operands.sums[0], u]
        else:
            results[1] = results[1] + operands.sums[0]
        _launch.launch(
            _sum_kernel,
            (n_cells * pairs * (width // 16),),
            *(partial, operands.slots, operands.maxima, operands.sums, *results[::2]),
            *(n, n_cells),
            MIXED=form.mixed,
            SHIFTS=operands.shifts,
            FIRST=is_first,
            BLOCK_N=width,
            STRIP=16,
        )
    g, n_varying, u = results
    return g, n_varying, u if len(u) else None


def _make_case(
    n: int, p: int, cells: int, dtype: torch.dtype, precision: str
) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        x = torch.empty(p, n, dtype=dtype, device=device).mT
        if cells:
            labels = np.arange(p) % cells
            cell_statistics(x, labels, cells, precision=precision)
        else:
            centered_gram(x, kernel="linear", sigma=None, precision=precision)

    label = f"{cells} cells" if cells else "whole"
    return _launch.CompileCase(
        f"{label}, n = {n}, p = {p:,}, {str(dtype)[6:]}, {precision}",
        call,
        floor(n, p, dtype.itemsize, max(cells, 1), precision),
        products=precision != "ieee",
    )


AOT_CASES = (
    _make_case(50, 193_600, 100, torch.float32, "tf32x3"),
    _make_case(500, 100_352, 16, torch.float32, "tf32x3"),
    _make_case(500, 100_352, 16, torch.float32, "tf32"),
    _make_case(500, 100_352, 16, torch.float32, "ieee"),
    _make_case(500, 100_352, 16, torch.bfloat16, "tf32x3"),
    _make_case(500, 100_352, 0, torch.float32, "tf32x3"),
    _make_case(128, 100_352, 16, torch.float32, "tf32x3"),
    _make_case(128, 100_352, 16, torch.bfloat16, "tf32x3"),
    _make_case(12, 1_000, 0, torch.float16, "tf32x3"),
)
