"""Gram matrices of centred representations, whole and by cell, from one read of the activations.

The first stimulus is subtracted from all others as they are loaded; the mean over stimuli is then
removed from the n x n result in float64. This needs no centred copy and no pass for the means, and
a large feature mean costs no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch import distances
from repsim_kernels.kernels.torch import gram as torch_gram
from repsim_kernels.kernels.torch.columns import sort_by_cell
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.neuron_major import neuron_major

# Bytes of activations that several partitions read together: half of the 50 MB of an H100's L2
# cache (an H200 has 60 MB).
_L2 = 25 * 2**20


@dataclass(frozen=True)
class Launch:
    block_n: int  # stimuli per tile
    block_p: int  # neurons per step
    inner: int  # neurons summed in one accumulator of the tensor cores, which truncate
    chunk: int  # neurons per program
    num_warps: int
    num_stages: int


def choose(n: int, columns: int, precision: str, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for n stimuli and a number of columns, counted once per partition."""
    # One tile for up to 64 stimuli. With the gather, tiles of 128 spill: two levels of sums, 64-bit
    # addresses and the two parts of tf32x3's operands do not fit in 255 registers.
    block_n = max(16, triton.next_power_of_2(min(n, 64)))
    # Four waves of programs on 132 multiprocessors. With 8192 neurons, writing the tile is 1 % of
    # a program's traffic.
    chunk = columns * count_tiles(n, block_n) // (4 * 132) // 512 * 512
    # A tile of 64 has 16 accumulators per thread, twice for the two levels of sums. With 8 warps
    # the compiler then limits itself to 128 registers, too few on 10.0 for the two parts of
    # tf32x3's operands, and before 9.0 for operands in registers.
    crowded = {"tf32x3": capability >= (10, 0), "tf32": capability < (9, 0), "ieee": False}
    return Launch(
        block_n=block_n,
        # Two tensor-core steps; 32 neurons spill on 8.0 and with "ieee".
        block_p=16,
        # 64 steps of 8 neurons: truncation stays below 1e-5 of a diagonal element.
        inner=512,
        chunk=min(max(chunk, 512), 8192),
        num_warps=4 if block_n < 64 or crowded[precision] else 8,
        # 12 KiB per stage: three blocks on a multiprocessor hold all stages; 4 stages spill on
        # 10.0.
        num_stages=3 if capability >= (10, 0) else 4,
    )


def count_tiles(n: int, block_n: int) -> int:
    """Count the tiles on and below the diagonal."""
    tiles = -(-n // block_n)
    return tiles * (tiles + 1) // 2


def floor(n: int, p: int, itemsize: int, grams: int, precision: str) -> _launch.Floor:
    """Lower bound: read x once, write the Grams once; n (n + 1) p operations for all cells."""
    return _launch.Floor(n * p * itemsize + grams * n * n * 8, n * (n + 1) * p, precision)


def unsupported(x: Tensor) -> str | None:
    """Return why the kernel can't take x, or None if it can."""
    return _launch.unsupported(x)


@triton.jit
def _gram_kernel(
    x_ptr, scale_ptr, order_ptr, items_ptr, partial_ptr, varies_ptr, n, length, stride_n, stride_p,
    GATHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The tiles of one chunk run concurrently: all but the first find its neurons in the L2 cache.
    pairs = count_pairs(n, BLOCK_N)
    item = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    i, j = find_tile(pair)
    base = tl.load(items_ptr + 4 * item)
    first = tl.load(items_ptr + 4 * item + 1)
    last = tl.load(items_ptr + 4 * item + 2)
    scale = tl.load(scale_ptr)

    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    row_offset = rows.to(tl.int64) * stride_n
    col_offset = cols.to(tl.int64) * stride_n
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(first, last, INNER):
        part = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for step in range(start, tl.minimum(start + INNER, last), BLOCK_P):
            at = step + tl.arange(0, BLOCK_P)
            inside = at < last
            column = at.to(tl.int64)
            if GATHER:
                column = tl.load(order_ptr + at, mask=inside, other=0).to(tl.int64)
            source = x_ptr + base + column * stride_p
            origin = tl.load(source, mask=inside, other=0).to(tl.float32) * scale  # (BLOCK_P,)
            a_mask = (rows < n)[:, None] & inside[None, :]
            a = tl.load(source[None, :] + row_offset[:, None], mask=a_mask, other=0)
            a = tl.where(a_mask, a.to(tl.float32) * scale - origin[None, :], 0)
            b_mask = inside[:, None] & (cols < n)[None, :]
            b = tl.load(source[:, None] + col_offset[None, :], mask=b_mask, other=0)
            b = tl.where(b_mask, b.to(tl.float32) * scale - origin[:, None], 0)
            part = tl.dot(a, b, part, input_precision=PRECISION)  # (BLOCK_N, BLOCK_N)
            if GATHER:  # noqa: SIM102 (a compile-time condition, then a run-time one)
                if j == 0:
                    varies = tl.max(tl.abs(a), 0) > 0
                    tl.store(varies_ptr + i.to(tl.int64) * length + at, varies, mask=inside)
        total += part

    square = tl.arange(0, BLOCK_N)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    slot = tl.load(items_ptr + 4 * item + 3)  # loaded late: across the loop it would spill on 8.0
    tl.store(partial_ptr + (slot * pairs + pair) * (BLOCK_N * BLOCK_N) + square, total)


@triton.jit
def count_pairs(n, BLOCK_N: tl.constexpr):
    """Count the tiles on and below the diagonal for n stimuli."""
    tiles = tl.cdiv(n, BLOCK_N)
    return tiles * (tiles + 1) // 2


@triton.jit
def find_tile(pair):
    """Return the row and column of a tile on or below the diagonal."""
    i = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += (i + 1) * (i + 2) // 2 <= pair
    i -= i * (i + 1) // 2 > pair
    return i, pair - i * (i + 1) // 2


@triton.jit
def _sum_kernel(
    partial_ptr, slots_ptr, scale_ptr, g_ptr, n, BLOCK_N: tl.constexpr, STRIP: tl.constexpr
):
    pairs = count_pairs(n, BLOCK_N)
    cell = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    strip = tl.program_id(1)
    i, j = find_tile(pair)
    # Multiplying by a power of two is exact; dividing would spill.
    unit = 1.0 / tl.load(scale_ptr).to(tl.float64)
    within = strip * STRIP + tl.arange(0, STRIP)
    square = within[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((STRIP, BLOCK_N), dtype=tl.float64)
    for slot in range(tl.load(slots_ptr + cell), tl.load(slots_ptr + cell + 1)):
        total += tl.load(partial_ptr + (slot * pairs + pair) * (BLOCK_N * BLOCK_N) + square).to(
            tl.float64
        )
    total = total * unit * unit
    rows = (i * BLOCK_N + within)[:, None]
    cols = (j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    # Each element below the diagonal is written twice, so the result is exactly symmetric.
    lower = (rows < n) & (cols <= rows)
    g_ptr += cell * n * n
    tl.store(g_ptr + rows.to(tl.int64) * n + cols, total, mask=lower)
    tl.store(g_ptr + cols.to(tl.int64) * n + rows, total, mask=lower)


@triton.jit
def _shift_kernel(
    x_ptr,
    order_ptr,
    items_ptr,
    shift_ptr,
    n,
    stride_n,
    stride_p,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    first = tl.load(items_ptr + 4 * item + 1)
    last = tl.load(items_ptr + 4 * item + 2)
    slot = tl.load(items_ptr + 4 * item + 3)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    shift = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for step in range(first, last, BLOCK_P):
        at = step + tl.arange(0, BLOCK_P)
        inside = at < last
        column = tl.load(order_ptr + at, mask=inside, other=0).to(tl.int64)
        source = x_ptr + column * stride_p
        origin = tl.load(source, mask=inside, other=0).to(tl.float32).to(tl.float64)
        mask = (rows < n)[:, None] & inside[None, :]
        a = tl.load(source[None, :] + rows.to(tl.int64)[:, None] * stride_n, mask=mask, other=0)
        a = a.to(tl.float32).to(tl.float64)  # (BLOCK_N, BLOCK_P)
        shift += tl.sum(tl.where(mask, (a - origin[None, :]) * origin[None, :], 0), 1)
    tl.store(shift_ptr + slot * n + rows, shift, mask=rows < n)


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
    bounds = np.tile([[0, p]], (len(batch), 1))
    base = np.arange(len(batch)) * batch.stride(0)
    launch = launch or choose(n, p * len(batch), precision, _launch.capability(x.device))
    segments = _Segments(base, bounds, np.arange(len(batch)), len(batch), None)
    g = _sum_grams(batch, segments, precision, launch, False)[0].view(*x.shape[:-1], n)
    if kernel == "linear":
        return torch_gram.centre_gram(g)
    assert sigma is not None
    return torch_gram.double_centre(distances.rbf_from_gram(g, x, sigma))


def cell_grams(
    x: Tensor,
    *,
    cells: np.ndarray,
    n_cells: int,
    precision: str = "tf32x3",
    launch: Launch | None = None,
) -> Tensor:
    """Return the Gram matrix of each cell, (C, n, n) float64.

    ``cells`` are labels (p,), a membership (C, p), or partitions (T, p), which give (T, C, n, n).
    """
    g = cell_statistics(x, cells, n_cells, precision=precision, launch=launch)[0]
    if cells.ndim == 2 and cells.dtype != np.bool_:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the torch backend's `cell_statistics` from one read of x.

    The cells of T partitions are numbered consecutively, T C in all.
    """
    n, p = x.shape
    if x.stride(1) < x.stride(0):
        # A cell's neurons are scattered along a row; neuron-major, each is read as a whole row.
        x = neuron_major(x).mT
    partitions = cells.ndim == 2 and cells.dtype != np.bool_
    tables = cells if partitions else [cells]
    width = max(1, _L2 // (n * x.element_size())) if len(tables) > 1 else p
    orders, bounds, owners = [], [], []
    total = 0
    for start in range(0, p, width):
        span = slice(start, min(start + width, p))
        for t, table in enumerate(tables):
            order, offsets = sort_by_cell(table[..., span], n_cells)
            orders.append(order + start)
            bounds.append(np.stack([offsets[:-1], offsets[1:]], 1) + total)
            owners.append(np.arange(n_cells) + t * n_cells)
            total += len(order)
    order = np.concatenate(orders)
    launch = launch or choose(n, len(order), precision, _launch.capability(x.device))
    columns = torch.from_numpy(order.astype(np.int32)).to(x.device)
    owner = np.concatenate(owners)
    base = np.zeros(len(owner), dtype=np.int64)
    segments = _Segments(base, np.concatenate(bounds), owner, len(tables) * n_cells, columns)
    g, n_varying, u = _sum_grams(x, segments, precision, launch, shifts)
    if u is None:
        return torch_gram.centre_gram(g), n_varying, g.new_zeros(g.shape[:-1])
    shift = u + g.mean(-1)
    return torch_gram.centre_gram(g), n_varying, shift - shift.mean(-1, keepdim=True)


@dataclass(frozen=True)
class _Segments:
    """Runs of neurons: ``bounds[s, 0]`` up to ``bounds[s, 1]`` are summed into Gram owner[s]."""

    base: np.ndarray  # (S,), offset in memory of the matrix that a segment reads
    bounds: np.ndarray  # (S, 2), positions in columns
    owner: np.ndarray  # (S,)
    n_grams: int
    columns: Tensor | None  # neuron at each position, int32 on the device; None: the position


def _sum_grams(
    x: Tensor, segments: _Segments, precision: str, launch: Launch, shifts: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the Grams of D = x - x₀, their numbers of varying neurons, and D x₀.

    x₀ is the first stimulus. The numbers are zero if no columns are gathered; D x₀ is None without
    columns or without ``shifts``.
    """
    n, device, columns = x.shape[-2], x.device, segments.columns
    bounds, owner, n_grams = segments.bounds, segments.owner, segments.n_grams
    pieces = -(-(bounds[:, 1] - bounds[:, 0]) // launch.chunk)
    segment = np.repeat(np.arange(len(bounds)), pieces)
    piece = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = bounds[segment, 0] + piece * launch.chunk
    last = np.minimum(first + launch.chunk, bounds[segment, 1])
    # The pieces of a Gram are adjacent in memory, whatever the order in which they are computed.
    slot = np.empty(len(segment), dtype=np.int64)
    slot[np.argsort(owner[segment], kind="stable")] = np.arange(len(segment))
    counts = np.bincount(owner[segment], minlength=n_grams)
    slots = np.concatenate([[0], np.cumsum(counts)])
    table = np.stack([segments.base[segment], first, last, slot], 1).astype(np.int64)
    items = torch.from_numpy(table).to(device)

    pairs, tiles = count_tiles(n, launch.block_n), -(-n // launch.block_n)
    length = 0 if columns is None else len(columns)
    partial = torch.empty(len(items) * pairs * launch.block_n**2, device=device)
    varies = torch.zeros(tiles, length, dtype=torch.bool, device=device)
    g = torch.empty(n_grams, n, n, dtype=torch.float64, device=device)
    scale = _launch.find_scale(x)
    strides = x.stride()[-2:]
    if len(items):
        tensors = x, scale, columns, items, partial, varies
        _launch.launch(
            _gram_kernel,
            (len(items) * pairs,),  # y allows 65,535 blocks, the pairs of 23,104 stimuli
            *(*tensors, n, length, *strides),
            GATHER=columns is not None,
            BLOCK_N=launch.block_n,
            BLOCK_P=launch.block_p,
            INNER=launch.inner,
            PRECISION=precision,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    _launch.launch(
        _sum_kernel,
        (n_grams * pairs, launch.block_n // 16),
        *(partial, torch.from_numpy(slots).to(device), scale, g, n),
        BLOCK_N=launch.block_n,
        STRIP=16,
    )
    n_varying = torch.zeros(n_grams, dtype=torch.int64, device=device)
    if columns is None:
        return g, n_varying, None
    running = torch.cat([n_varying.new_zeros(1), varies.any(0).cumsum(0)])
    ends = torch.from_numpy(bounds).to(device)
    per_segment = running[ends[:, 1]] - running[ends[:, 0]]
    n_varying.index_add_(0, torch.from_numpy(owner).to(device), per_segment)
    if not shifts:
        return g, n_varying, None
    u = torch.zeros(len(items) + 1, n, dtype=torch.float64, device=device)
    if len(items):
        sizes = {"BLOCK_N": launch.block_n, "BLOCK_P": launch.block_p}
        _launch.launch(
            _shift_kernel, (len(items), tiles), *(x, columns, items, u, n, *strides), **sizes
        )
    # Pad the pieces of each Gram to the largest number with the row of zeros at the end.
    index = slots[:-1, None] + np.arange(max(1, counts.max(initial=0)))
    index[index >= slots[1:, None]] = len(items)
    return g, n_varying, u[torch.from_numpy(index).to(device)].sum(1)


def _make_case(
    n: int, p: int, cells: int, dtype: torch.dtype, precision: str
) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        x = torch.empty(p, n, dtype=dtype, device=device).mT
        if cells:
            labels = np.arange(p) % cells
            cell_statistics(x, labels, cells, shifts=True, precision=precision)
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
    _make_case(12, 1_000, 0, torch.float16, "tf32x3"),
)
