"""Operands of products: activations converted once, for every product that reads them.

The kernels of gram.py and cca.py multiply what this module writes, so that their loops only load
and multiply. Neurons become rows, sorted by cell. A row holds the stimuli relative to the first
one, multiplied by a power of two and split in two halves of float16, which together keep 22 bits.

* The power of two belongs to a cell, whose largest difference it moves to 2^14: with one for the
  whole matrix, a cell of tiny neurons would vanish in float16.
* Each cell is padded with rows of zeros to a multiple of ``pad``, so that no product needs a mask.
* Stimuli are padded with zeros to planes of ``width``. The rows of a plane are adjacent: a tile is
  one run of memory.
* float16 and bfloat16 values fit in one half as they are. The n x n result is centred instead, but
  not for cells whose means would cost digits: those are split like float32 (see `keeps_digits`).

Predictions for an H200, since this was not run on a GPU, for n = 500 and p = 100,352 in float32:

    pass               reads     writes    time
    `_reach_kernel`    201 MB     1 MB     47 µs
    `_write_kernel`    201 MB   206 MB     95 µs

Next to these, PyTorch sorts the labels and starts four small operations, and `_plan_kernel` takes
some 10 µs. The host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch

# Bytes of operands that exist at a time; more neurons are processed in spans.
_MEMORY = 4 * 2**30
# Programs that plan one cell together, so that a single cell of all neurons does not take long.
_SPLITS = 8


@dataclass(frozen=True)
class Format:
    """How operands are stored, and which cells need which product."""

    width: int  # stimuli per plane
    pad: int  # cells are padded to a multiple of this number of neurons
    chunk: int  # neurons per item: what one program of the Gram kernel adds
    dtype: torch.dtype  # float16 or float32
    split: bool  # whether there are two halves
    mixed: bool  # whether cells may hold their values as they are, in the first half


@dataclass(frozen=True)
class Operands:
    """A span of neurons, ready for products. All tensors are on the device.

    Cells are numbered consecutively over partitions, and so are the matrices of a batch.
    """

    format: Format
    n: int
    neurons: int  # in the span, of each matrix
    hi: Tensor  # (planes, rows, width)
    lo: Tensor  # the same shape; hi itself without a second half
    items: Tensor  # (I, 3) first row, last row and cell
    slots: Tensor  # (C + 1,) first item of each cell; the last is the number of items in use
    maxima: Tensor  # (2, C) half the largest difference from the first stimulus, its largest value
    sums: Tensor  # (3, C) varying neurons, energy, energy after centring
    shifts: bool  # whether the first stimulus, which is zero, is replaced by its values

    @property
    def n_cells(self) -> int:
        """Number of cells of all partitions."""
        return len(self.slots) - 1


def floor(n: int, p: int, itemsize: int, split: bool) -> _launch.Floor:
    """Lower bound: read x twice, since its largest value comes first, and write once."""
    return _launch.Floor(n * p * (2 * itemsize + (4 if split else 2)), 0)


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
    return before <= 4 * tl.load(sums_ptr + 2 * n_cells + cells)


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
def _reach_kernel(
    x_ptr,
    reach_ptr,  # (2, batch p) half the largest difference from the first stimulus, and its size
    energy_ptr,  # (2, batch p) before and after centring
    n, p, total, stride_b, stride_n, stride_p,
    ENERGY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(p, BLOCK_P)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    neuron = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = neuron < p
    source = x_ptr + batch * stride_b + neuron.to(tl.int64) * stride_p
    first = tl.load(source, mask=inside, other=0).to(tl.float32)  # (BLOCK_P,)
    low = tl.zeros((BLOCK_P, BLOCK_N), tl.float32) + first[:, None]
    high = low
    total_d = tl.zeros((BLOCK_P, BLOCK_N), tl.float64)
    total_dd = tl.zeros((BLOCK_P, BLOCK_N), tl.float64)
    for step in range(0, n, BLOCK_N):
        stimulus = step + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (stimulus < n)[None, :]
        x = tl.load(source[:, None] + stimulus.to(tl.int64)[None, :] * stride_n, mask=mask, other=0)
        x = tl.where(mask, x.to(tl.float32), first[:, None])
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        if ENERGY:
            d = x.to(tl.float64) - first.to(tl.float64)[:, None]
            total_d += d
            total_dd += d * d
    lowest = tl.min(low, 1)
    highest = tl.max(high, 1)
    # Halves, since a difference may exceed float32.
    reach = tl.maximum(highest * 0.5 - first * 0.5, first * 0.5 - lowest * 0.5)
    reach = tl.where(highest > lowest, tl.maximum(reach, 1e-38), 0)
    at = batch * p + neuron
    tl.store(reach_ptr + at, reach, mask=inside)
    tl.store(reach_ptr + total + at, tl.abs(first), mask=inside)
    if ENERGY:
        d = tl.sum(total_d, 1)
        dd = tl.sum(total_dd, 1)
        origin = first.to(tl.float64)
        tl.store(energy_ptr + at, dd + origin * (2 * d + n * origin), mask=inside)
        tl.store(energy_ptr + total + at, dd - d * d / n, mask=inside)


@triton.jit
def _plan_kernel(
    reach_ptr, energy_ptr,
    order_ptr,  # neurons (of all partitions) by cell
    offsets_ptr,  # (C + 1,) first of each cell in the order
    places_ptr,  # (partitions p,) row of each neuron
    hi_ptr, lo_ptr, items_ptr, slots_ptr,
    maxima_ptr,  # (2, C, SPLITS)
    sums_ptr,  # (3, C, SPLITS)
    n_cells, p, total, capacity, planes, chunk,
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
        size = tl.maximum(size, tl.load(reach_ptr + total + neuron, mask=mask, other=0))
        varying += tl.where(own > 0, 1.0, 0.0)
        if ENERGY:
            before += tl.load(energy_ptr + neuron, mask=mask, other=0)
            after += tl.load(energy_ptr + total + neuron, mask=mask, other=0)
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


@triton.jit
def _write_kernel(
    x_ptr, cells_ptr, places_ptr, maxima_ptr, sums_ptr, hi_ptr, lo_ptr,
    n, p, n_cells, partitions, capacity, planes, stride_b, stride_n, stride_p,
    SORTED: tl.constexpr, SPLIT: tl.constexpr, MIXED: tl.constexpr, SHIFTS: tl.constexpr,
    WIDTH: tl.constexpr, PAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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

    plane = (step * BLOCK_N // WIDTH).to(tl.int64) * capacity
    column = step * BLOCK_N % WIDTH + tl.arange(0, BLOCK_N)
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
        factor = find_factor(maxima_ptr, sums_ptr, cell, n_cells, MIXED)
        y = difference * (2 * factor)[:, None]
        if SHIFTS:
            size = tl.load(maxima_ptr + n_cells + cell)
            y = tl.where((stimulus == 0)[None, :], (first * power_of_two(size))[:, None], y)
        if MIXED:
            kept = keeps_digits(sums_ptr, cell, n_cells)
            y = tl.where(kept[:, None], x * factor[:, None], y)
        hi = y.to(hi_ptr.dtype.element_ty)
        places = (plane + row)[:, None] * WIDTH + column[None, :]
        tl.store(hi_ptr + places, hi, mask=used[:, None])
        if SPLIT:
            lo = (y - hi.to(tl.float32)).to(hi_ptr.dtype.element_ty)
            tl.store(lo_ptr + places, lo, mask=used[:, None])


def number_cells(cells: np.ndarray, n_cells: int, device: torch.device) -> tuple[Tensor, int]:
    """Return the cell of each neuron for each partition (T, p), -1 for none, and their number.

    ``cells`` are labels (p,), partitions (T, p), or a membership (C, p), which becomes C partitions
    of one cell.
    """
    if cells.dtype == np.bool_:
        member = torch.from_numpy(cells).to(device)
        own = torch.arange(len(cells), dtype=torch.int32, device=device)
        return torch.where(member, own[:, None], -1), len(cells)
    partitions = len(cells) if cells.ndim == 2 else 1
    # 16-bit integers are sorted in half the time.
    dtype = np.int16 if partitions * n_cells < 2**15 else np.int32
    labels = torch.from_numpy(cells.astype(dtype)).to(device).view(partitions, -1)
    if partitions > 1:
        first = torch.arange(partitions, dtype=labels.dtype, device=device)[:, None] * n_cells
        labels = torch.where(labels < 0, -1, labels + first)
    return labels, partitions * n_cells


def iter_operands(
    x: Tensor, cells: Tensor | None, n_cells: int, form: Format, shifts: bool = False
) -> Iterator[Operands]:
    """Yield the operands of x (n, p) in spans of neurons that suit the memory.

    ``cells`` (T, p) and ``n_cells`` come from `number_cells`. Without them, each matrix of a batch x
    (B, n, p) is a cell; `count_matrices` limits B.
    """
    n, p = x.shape[-2:]
    max_rows = _count_rows_in_memory(n, form)
    width = p
    while width > 1 and (
        max_rows < len(x) * _count_rows(width, 1, form.pad)
        if cells is None
        else max_rows < _count_rows(len(cells) * width, n_cells, form.pad)
    ):
        width = (width + 1) // 2
    for start in range(0, p, width):
        span = slice(start, start + width)
        if cells is None:
            yield _make_operands(x[..., span], None, n_cells, form, shifts)
        else:
            yield _make_operands(x[None, :, span], cells[:, span], n_cells, form, shifts)


def count_matrices(n: int, p: int, form: Format) -> int:
    """Return how many matrices of a batch suit the memory together, at least 1."""
    return max(1, _count_rows_in_memory(n, form) // _count_rows(p, 1, form.pad))


def _count_rows_in_memory(n: int, form: Format) -> int:
    planes, halves = triton.cdiv(n, form.width), 2 if form.split else 1
    return _MEMORY // (planes * form.width * form.dtype.itemsize * halves)


def _count_rows(count: int, n_cells: int, pad: int) -> int:
    """Return the most rows that ``count`` neurons in cells need after padding."""
    return triton.cdiv(count + min(count, n_cells) * (pad - 1), pad) * pad


def _make_operands(
    x: Tensor, cells: Tensor | None, n_cells: int, form: Format, shifts: bool
) -> Operands:
    batch, n, p = x.shape
    device, is_sorted = x.device, cells is not None
    partitions = len(cells) if cells is not None else 1
    count = batch * partitions * p
    capacity = _count_rows(count, n_cells, form.pad)
    if cells is None:
        capacity = batch * _count_rows(p, 1, form.pad)
    planes = triton.cdiv(n, form.width)
    reach = torch.empty(2, batch * p, device=device)
    energy = torch.empty(2, batch * p if form.mixed else 0, dtype=torch.float64, device=device)
    # Neighbouring threads read neighbouring values; more accumulators per thread would spill.
    block_n = 32 if x.stride(2) <= x.stride(1) else min(256, triton.next_power_of_2(n))
    block_p = max(1, (2048 if form.mixed else 4096) // block_n)
    _launch.launch(
        _reach_kernel,
        (batch * triton.cdiv(p, block_p),),
        *(x, reach, energy, n, p, batch * p, *x.stride()),
        ENERGY=form.mixed,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
    )
    if cells is not None:
        keys, order = cells.reshape(-1).sort(stable=True)
        numbers = torch.arange(n_cells + 1, dtype=keys.dtype, device=device)
        offsets = torch.searchsorted(keys, numbers)
    else:
        cells = order = reach  # not used
        offsets = torch.arange(0, count + 1, p, device=device)

    hi = torch.empty(planes, capacity, form.width, dtype=form.dtype, device=device)
    lo = torch.empty_like(hi) if form.split else hi
    most = min(count, n_cells)
    slots = torch.empty(n_cells + 1, dtype=torch.int64, device=device)
    items = torch.empty(capacity // form.chunk + most, 3, dtype=torch.int64, device=device)
    places = torch.empty(count if is_sorted else 0, dtype=torch.int64, device=device)
    maxima = torch.empty(2, n_cells, _SPLITS, device=device)
    sums = torch.empty(3, n_cells, _SPLITS, dtype=torch.float64, device=device)
    _launch.launch(
        _plan_kernel,
        (n_cells * _SPLITS,),
        *(reach, energy, order, offsets, places, hi, lo, items, slots),
        *(maxima, sums, n_cells, p, batch * p, capacity, planes, form.chunk),
        SORTED=is_sorted,
        SPLIT=form.split,
        ENERGY=form.mixed,
        WIDTH=form.width,
        PAD=form.pad,
        SPLITS=_SPLITS,
        BLOCK=1024,
    )
    maxima, sums = maxima.amax(2), sums.sum(2)
    block = min(64, form.width)
    _launch.launch(
        _write_kernel,
        (planes * (form.width // block) * triton.cdiv(p, block) * batch,),
        *(x, cells, places, maxima, sums, hi, lo),
        *(n, p, n_cells, partitions, capacity, planes, *x.stride()),
        SORTED=is_sorted,
        SPLIT=form.split,
        MIXED=form.mixed,
        SHIFTS=shifts,
        WIDTH=form.width,
        PAD=form.pad,
        BLOCK_P=block,
        BLOCK_N=block,
    )
    return Operands(form, n, p, hi, lo, items, slots, maxima, sums, shifts)
