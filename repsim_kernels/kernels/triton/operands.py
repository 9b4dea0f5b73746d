"""Operands of products: activations converted once, for every product that reads them.

The kernels of gram.py and cca.py multiply what this module writes, so that their loops only load
and multiply. Neurons become rows, sorted by cell. A row holds the stimuli relative to the first
one, multiplied by a power of two and split in two halves of float16, which together keep 22 bits.

* The power of two belongs to a cell, whose largest difference it moves to 2^13 … 2^14: with one for
  the whole matrix, a cell of tiny neurons would vanish in float16.
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

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._operand_kernels import (
    _plan_kernel,
    _reach_kernel,
    _write_kernel,
)

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
    items: Tensor  # (I, 3) first row, row after the last, and cell
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

    ``cells`` (T, p) and ``n_cells`` come from `number_cells`. Without them, each matrix of a batch
    x (B, n, p) is a cell; `count_matrices` limits B.
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
            own = cells[:, span].contiguous()
            yield _make_operands(x[None, :, span], own, n_cells, form, shifts)


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
    reach = torch.empty(4, batch * p, device=device)
    # Neighbouring threads read neighbouring values, four each where rows are aligned.
    by_neuron = x.stride(1) < x.stride(2)
    row = (n, x.stride(2)) if by_neuron else (p, x.stride(1))
    align = math.gcd(*row, x.stride(0) if batch > 1 else 0, 4)
    layout = {"BY_NEURON": by_neuron, "ALIGN": align if 1 in x.stride()[1:] else 1}
    block_n = min(256, triton.next_power_of_2(n)) if by_neuron else 32
    block_p = 4096 // block_n
    if form.mixed:  # the sums take registers too; larger blocks spill on sm_100
        block_p = min(block_p // 2, 16 if by_neuron else 64)
    _launch.launch(
        _reach_kernel,
        (batch * triton.cdiv(p, block_p),),
        *(x, reach, n, p, batch * p, *x.stride()),
        ENERGY=form.mixed,
        **layout,
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
        *(reach, order, offsets, places, hi, lo, items, slots),
        *(maxima, sums, n, n_cells, p, batch * p, capacity, planes, form.chunk),
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
        **layout,
        WIDTH=form.width,
        PAD=form.pad,
        BLOCK_P=block,
        BLOCK_N=block,
    )
    return Operands(form, n, p, hi, lo, items, slots, maxima, sums, shifts)


def _make_case(n: int, p: int, dtype: torch.dtype, by_neuron: bool) -> _launch.CompileCase:
    mixed = dtype != torch.float32
    width = 64 if n <= 64 else 128
    form = Format(width, 128, 8192, torch.float16, split=True, mixed=mixed)

    def call(device: torch.device) -> None:
        x = torch.empty((p, n) if by_neuron else (n, p), dtype=dtype, device=device)
        labels, n_cells = number_cells(np.arange(p) % 16, 16, device)
        for _ in iter_operands(x.mT if by_neuron else x, labels, n_cells, form):
            pass

    order = "neurons" if by_neuron else "stimuli"
    return _launch.CompileCase(
        f"16 cells, n = {n}, p = {p:,}, {str(dtype)[6:]}, by {order}",
        call,
        floor(n, p, dtype.itemsize, not mixed),
    )


AOT_CASES = tuple(
    _make_case(n, p, dtype, by_neuron)
    for n, p in ((50, 193_600), (500, 100_352))
    for dtype in (torch.float32, torch.bfloat16)
    for by_neuron in (True, False)
)
