"""The kernels that make operands, and what those that multiply them share.

operands.py starts them, and describes what they write.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(largest):
    """Return the power of two that moves a float32 to 2^13 … 2^14, within 2^-114 … 2^126."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(267 - exponent, 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def keeps_digits(sums_ptr, cells, n_cells):
    """Whether cells keep their digits if the Gram is centred, not the neurons.

    The rounding of products is proportional to the energy before centring. At most 4 times that
    after centring, and it stays below 1e-5 of the Gram; rectified Gaussians have 1.5 times.
    """
    before = tl.load(sums_ptr + n_cells + cells)
    after = tl.load(sums_ptr + 2 * n_cells + cells)
    return (after > 0) & (after < float("inf")) & (before <= 4 * after)


@triton.jit
def find_factor(maxima_ptr, sums_ptr, cells, n_cells, MIXED: tl.constexpr):
    """Return the power of two that the values of cells are multiplied by."""
    reach = tl.load(maxima_ptr + cells)
    factor = power_of_two(reach) * 0.5
    if MIXED:
        own = power_of_two(tl.maximum(reach, tl.load(maxima_ptr + n_cells + cells)))
        factor = tl.where(keeps_digits(sums_ptr, cells, n_cells), own, factor)
    return factor


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
def load_tile(place, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Load the rows and columns of operands that start at a place."""
    # A scalar place and constant offsets: 64-bit addresses of each element would spill.
    return tl.load(place + (tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLS)[None, :]))


@triton.jit
def find_rows(
    items_ptr, slots_ptr, sums_ptr, item, n_cells, SPLIT: tl.constexpr, MIXED: tl.constexpr
):
    """Return an item's first row, the row after its last, its cell, and whether it is multiplied.

    A kernel with SPLIT multiplies the cells that need both halves, and one without it the others.
    """
    used = item < tl.load(slots_ptr + n_cells)
    first = tl.load(items_ptr + 3 * item, mask=used, other=0)
    end = tl.load(items_ptr + 3 * item + 1, mask=used, other=0)
    cell = tl.load(items_ptr + 3 * item + 2, mask=used, other=0)
    if MIXED:
        used = used & (keeps_digits(sums_ptr, cell, n_cells) != SPLIT)
    return first, end, cell, used


@triton.jit
def _show_alignment(
    n, p, stride_b, stride_n, stride_p, BY_NEURON: tl.constexpr, ALIGN: tl.constexpr
):
    """Return sizes and strides such that the compiler sees which are multiples of ALIGN.

    It then loads adjacent values together. `tl.multiple_of` is lost on a kernel's arguments.
    """
    stride_b = stride_b // ALIGN * ALIGN  # not used for one matrix
    if BY_NEURON:
        n, stride_p = n // ALIGN * ALIGN, stride_p // ALIGN * ALIGN
    else:
        p, stride_n = p // ALIGN * ALIGN, stride_n // ALIGN * ALIGN
    return n, p, stride_b, stride_n, stride_p


@triton.jit
def _reach_kernel(
    x_ptr,
    reach_ptr,  # (4, batch p): half the largest difference from the first stimulus, its value,
    # and with ENERGY the sums of half the differences and of their squares
    n, p, total, stride_b, stride_n, stride_p,
    ENERGY: tl.constexpr, BY_NEURON: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, p, stride_b, stride_n, stride_p = _show_alignment(
        n, p, stride_b, stride_n, stride_p, BY_NEURON, ALIGN
    )
    blocks = tl.cdiv(p, BLOCK_P)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    neuron = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = neuron < p
    source = x_ptr + batch * stride_b + neuron.to(tl.int64) * stride_p
    first = tl.load(source, mask=inside, other=0).to(tl.float32)  # (BLOCK_P,)
    largest = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    total_d = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    total_dd = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in range(0, n, BLOCK_N):
        stimulus = step + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (stimulus < n)[None, :]
        x = tl.load(source[:, None] + stimulus.to(tl.int64)[None, :] * stride_n, mask=mask, other=0)
        # Halves, since a difference may exceed float32.
        d = tl.where(mask, x.to(tl.float32) * 0.5 - first[:, None] * 0.5, 0)
        largest = tl.maximum(largest, tl.abs(d))
        if ENERGY:
            total_d += d
            total_dd += d * d
    reach = tl.max(largest, 1)
    # Denormal numbers count as the smallest normal one.
    reach = tl.where(reach > 0, tl.maximum(reach, 1.2e-38), 0)
    at = batch * p + neuron
    tl.store(reach_ptr + at, reach, mask=inside)
    tl.store(reach_ptr + total + at, first, mask=inside)
    if ENERGY:
        tl.store(reach_ptr + 2 * total + at, tl.sum(total_d, 1), mask=inside)
        tl.store(reach_ptr + 3 * total + at, tl.sum(total_dd, 1), mask=inside)


@triton.jit(do_not_specialize=["n_cells", "total", "planes"])
def _plan_kernel(
    reach_ptr,
    order_ptr,  # neurons (of all partitions) by cell
    offsets_ptr,  # (C + 1,) first of each cell in the order
    places_ptr,  # (partitions p,) row of each neuron
    hi_ptr, lo_ptr, items_ptr, slots_ptr,
    maxima_ptr,  # (2, C, SPLITS)
    sums_ptr,  # (3, C, SPLITS)
    n, n_cells, p, total, capacity, planes, chunk,
    SORTED: tl.constexpr, SPLIT: tl.constexpr, ENERGY: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    row = tl.zeros((), tl.int64)
    slot = tl.zeros((), tl.int64)
    for start in range(0, cell, BLOCK):
        other = start + tl.arange(0, BLOCK)
        mask = other < cell
        size = tl.load(offsets_ptr + other + 1, mask=mask, other=0)
        size -= tl.load(offsets_ptr + other, mask=mask, other=0)
        size = (size + PAD - 1) // PAD * PAD
        row += tl.sum(size, 0)
        slot += tl.sum((size + chunk - 1) // chunk, 0)
    begin = tl.load(offsets_ptr + cell)
    end = tl.load(offsets_ptr + cell + 1)
    filled = row + end - begin
    last = row + (end - begin + PAD - 1) // PAD * PAD

    if part == 0:
        tl.store(slots_ptr + cell, slot)
        if cell == n_cells - 1:
            tl.store(slots_ptr + n_cells, slot + (last - row + chunk - 1) // chunk)
        for piece in range(row, last, chunk):
            item = items_ptr + 3 * (slot + (piece - row) // chunk)
            tl.store(item, piece)
            tl.store(item + 1, tl.minimum(piece + chunk, last))
            tl.store(item + 2, cell.to(tl.int64))

    reach = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    varying = tl.zeros((BLOCK,), tl.float64)
    before = tl.zeros((BLOCK,), tl.float64)
    after = tl.zeros((BLOCK,), tl.float64)
    for here in range(begin + part * BLOCK, end, SPLITS * BLOCK):
        at = here + tl.arange(0, BLOCK)
        mask = at < end
        neuron = at
        if SORTED:
            place = tl.load(order_ptr + at, mask=mask, other=0)
            tl.store(places_ptr + place, row + at - begin, mask=mask)
            neuron = place % p
        own = tl.load(reach_ptr + neuron, mask=mask, other=0)
        reach = tl.maximum(reach, own)
        first = tl.load(reach_ptr + total + neuron, mask=mask, other=0)
        size = tl.maximum(size, tl.abs(first))
        varying += tl.where(own > 0, 1.0, 0.0)
        if ENERGY:
            # If these overflow or vanish, `keeps_digits` is false, which is always safe.
            d = 2 * tl.load(reach_ptr + 2 * total + neuron, mask=mask, other=0).to(tl.float64)
            dd = 4 * tl.load(reach_ptr + 3 * total + neuron, mask=mask, other=0).to(tl.float64)
            origin = first.to(tl.float64)
            before += dd + origin * (2 * d + n * origin)
            after += dd - d * d / n
    out = cell.to(tl.int64) * SPLITS + part
    step = tl.num_programs(0).to(tl.int64)  # all cells
    tl.store(maxima_ptr + out, tl.max(reach, 0))
    tl.store(maxima_ptr + step + out, tl.max(size, 0))
    tl.store(sums_ptr + out, tl.sum(varying, 0))
    tl.store(sums_ptr + step + out, tl.sum(before, 0))
    tl.store(sums_ptr + 2 * step + out, tl.sum(after, 0))

    padding = filled + part * (PAD // SPLITS) + tl.arange(0, PAD // SPLITS)
    zeros = tl.zeros((PAD // SPLITS, WIDTH), hi_ptr.dtype.element_ty)
    for plane in range(0, planes):
        places = (plane * capacity + padding)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(hi_ptr + places, zeros, mask=(padding < last)[:, None])
        if SPLIT:
            tl.store(lo_ptr + places, zeros, mask=(padding < last)[:, None])


@triton.jit(do_not_specialize=["n_cells", "partitions", "planes"])
def _write_kernel(
    x_ptr, cells_ptr, places_ptr, maxima_ptr, sums_ptr, hi_ptr, lo_ptr,
    n, p, n_cells, partitions, capacity, planes, stride_b, stride_n, stride_p,
    SORTED: tl.constexpr, SPLIT: tl.constexpr, MIXED: tl.constexpr, SHIFTS: tl.constexpr,
    BY_NEURON: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, p, stride_b, stride_n, stride_p = _show_alignment(
        n, p, stride_b, stride_n, stride_p, BY_NEURON, ALIGN
    )
    # Tiles are read along memory, in either layout of x; whole runs of stimuli are written.
    steps = planes * (WIDTH // BLOCK_N)
    blocks = tl.cdiv(p, BLOCK_P)
    step = tl.program_id(0) % steps
    block = tl.program_id(0) // steps % blocks
    batch = (tl.program_id(0) // steps // blocks).to(tl.int64)
    stimulus = step * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron = block * BLOCK_P + tl.arange(0, BLOCK_P)
    source = x_ptr + batch * stride_b + neuron.to(tl.int64) * stride_p
    mask = (neuron < p)[:, None] & (stimulus < n)[None, :]
    x = tl.load(source[:, None] + stimulus.to(tl.int64)[None, :] * stride_n, mask=mask, other=0)
    x = x.to(tl.float32)  # (BLOCK_P, BLOCK_N)
    first = tl.load(source, mask=neuron < p, other=0).to(tl.float32)
    difference = tl.where(mask, x * 0.5 - first[:, None] * 0.5, 0)

    plane = (step // (WIDTH // BLOCK_N)).to(tl.int64) * capacity
    column = step % (WIDTH // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    for partition in range(0, partitions):
        if SORTED:
            at = partition * p + neuron
            cell = tl.load(cells_ptr + at, mask=neuron < p, other=-1).to(tl.int32)
            used = cell >= 0
            cell = tl.maximum(cell, 0)
            row = tl.load(places_ptr + at, mask=used, other=0)
        else:
            used = neuron < p
            cell = tl.zeros_like(neuron) + batch
            row = batch * ((p + PAD - 1) // PAD * PAD) + neuron
        factor = tl.where(used, find_factor(maxima_ptr, sums_ptr, cell, n_cells, MIXED), 0)
        y = difference * (2 * factor)[:, None]
        if SHIFTS:
            own = tl.where(used, power_of_two(tl.load(maxima_ptr + n_cells + cell)), 0)
            y = tl.where((stimulus == 0)[None, :], (first * own)[:, None], y)
        if MIXED:
            kept = keeps_digits(sums_ptr, cell, n_cells)
            y = tl.where(kept[:, None], x * tl.where(kept, factor, 0)[:, None], y)
        hi = y.to(hi_ptr.dtype.element_ty)
        places = (plane + row)[:, None] * WIDTH + column[None, :]
        tl.store(hi_ptr + places, hi, mask=used[:, None])
        if SPLIT:
            lo = (y - hi.to(tl.float32)).to(hi_ptr.dtype.element_ty)
            tl.store(lo_ptr + places, lo, mask=used[:, None])
