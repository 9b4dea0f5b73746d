"""Candidates for the nearest neighbours of all stimuli, from tiles of their distances.

A program takes a block of stimuli and some tiles of the others. It multiplies two halves of float16
in three products, as gram.py does, and keeps the nearest others of each stimulus on a list in
registers. From a tile it takes the nearest of each row, which replaces the farthest on the list,
until the lists hold nothing farther than what is left. PyTorch sorts the lists of all programs.
There is no n x n matrix, and n x p operands are as large as float32 features.

Bounds of distances allow for the tensor cores' truncation. The torch backend decides which
candidates are the neighbours, from these bounds and in float64.

Predictions for an H200, since this was not run on a GPU, for 17 candidates:

    n        p       products      at least   with the lists
    20,000   512     3 · 0.41 Top  1.5 ms     2.2 ms
    1,024    4,096   3 · 8.6 Gop   32 µs      80 µs

On sm_90, a step is issued in 0.27 of the cycles that its products occupy the tensor cores: 12,288
for a tile of 128 x 128 with 512 neurons. Taking the nearest of each row from it needs another 1,120
to be issued (560 instructions of 8 warps). In random order, a tile of 20,000 stimuli needs five
such rounds on average, the most of its 128 rows; the first tile of a program needs 17. 1,024
stimuli are 64 programs for 132 multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch import nearest
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._operand_kernels import load_tile

MAX_COUNT = 32  # candidates; other lists would spill next to tiles of 128 x 128
_SCALE = 2.0**15  # moves rows of unit length into the range of float16
_INNER = 256  # neurons summed in one accumulator of the tensor cores


@dataclass(frozen=True)
class Launch:
    rows: int  # stimuli per program
    cols: int  # stimuli per tile
    block_p: int  # neurons per step
    parts: int  # programs among which the tiles are divided
    num_warps: int
    num_stages: int


def choose(n: int, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for n stimuli."""
    if capability < (9, 0):  # operands are in registers too
        rows, cols, block_p = 64, 64, 32
    else:  # on 10.0, tiles of 128 x 128 spill
        rows, cols, block_p = 128, 128 if capability < (10, 0) else 64, 64
    # Four waves of programs on 132 multiprocessors, which hold one each. Each starts its own lists,
    # and the first tiles change these most.
    parts = min(triton.cdiv(4 * 132, triton.cdiv(n, rows)), triton.cdiv(n, cols))
    return Launch(rows, cols, block_p, parts, num_warps=8, num_stages=3)


def floor(n: int, p: int, count: int) -> _launch.Floor:
    """Lower bound: read the rows, write the candidates; each list needs all products of its row."""
    return _launch.Floor(4 * n * p + 16 * n * count, 2 * n * n * p, "float16x3")


@triton.jit(do_not_specialize=["n", "count"])
def _candidates_kernel(
    hi_ptr, lo_ptr,  # (p / BLOCK_P, capacity, BLOCK_P)
    low_ptr,  # (capacity,)
    keys_ptr,  # (n, parts, COUNT) int64
    n, p, capacity, count, unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, COUNT: tl.constexpr, BLOCK_P: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, ROWS)
    parts = tl.num_programs(0) // blocks
    part = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ROWS
    row = first + tl.arange(0, ROWS)
    slot = tl.arange(0, COUNT)[None, :]
    # The nearest so far, in no order. Numbers from n on are free places, and the farthest; slots
    # from `count` on seem the nearest, so that nothing replaces them.
    best = tl.zeros((ROWS, COUNT), tl.float32) + tl.where(slot < count, float("inf"), -1.0)
    index = tl.zeros((ROWS, COUNT), tl.int32) + (n + slot)
    farthest = tl.max(best, 1)
    for tile in range(part, tl.cdiv(n, COLS), parts):
        total = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for start in range(0, p, INNER):
            sums = tl.zeros((ROWS, COLS), dtype=tl.float32)
            for step in range(start, tl.minimum(start + INNER, p), BLOCK_P):
                plane = (tl.zeros((), tl.int64) + step) * capacity
                a_place = plane + first * BLOCK_P
                b_place = plane + tile * COLS * BLOCK_P
                a = load_tile(hi_ptr + a_place, ROWS, BLOCK_P, BLOCK_P)
                b = load_tile(hi_ptr + b_place, COLS, BLOCK_P, BLOCK_P)
                c = load_tile(lo_ptr + a_place, ROWS, BLOCK_P, BLOCK_P)
                d = load_tile(lo_ptr + b_place, COLS, BLOCK_P, BLOCK_P)
                sums = tl.dot(a, b.T, sums)
                sums = tl.dot(a, d.T, sums)
                sums = tl.dot(c, b.T, sums)
            total += sums
        col = tile * COLS + tl.arange(0, COLS)
        low = tl.load(low_ptr + row)[:, None] + tl.load(low_ptr + col)[None, :]
        d2 = low - unit * total
        is_pair = (row < n)[:, None] & (col < n)[None, :] & (row[:, None] != col[None, :])
        d2 = tl.where(is_pair, tl.maximum(d2, 0), float("inf"))
        closest = tl.min(d2, 1)
        while tl.max((closest < farthest).to(tl.int32), 0) > 0:
            # Tiles come in ascending order: of equal distances, those with lower numbers stay.
            at = tl.min(tl.where(d2 == closest[:, None], col[None, :], 2147483647), 1)
            last = tl.max(tl.where(best == farthest[:, None], index, -1), 1)
            place = (index == last[:, None]) & (closest < farthest)[:, None]
            best = tl.where(place, closest[:, None], best)
            index = tl.where(place, at[:, None], index)
            d2 = tl.where(col[None, :] == at[:, None], float("inf"), d2)
            closest = tl.min(d2, 1)
            farthest = tl.max(best, 1)
    # Sorted as integers, keys ascend with the distance, then with the number.
    best = tl.where(slot < count, best, float("inf"))
    key = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index
    place = (row.to(tl.int64) * parts + part) * COUNT
    tl.store(keys_ptr + place[:, None] + slot, key, mask=(row < n)[:, None])


def unsupported(z: Tensor, *_: object) -> str | None:
    """Return why the kernel can't take the rows, or None if it can."""
    return _launch.unsupported(z)


def find_candidates(
    z: Tensor, energy: Tensor, count: int, *, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return candidates for the nearest stimuli, as the torch backend's function does.

    The bounds are at least 0. More than `MAX_COUNT` candidates come from the torch backend.
    """
    if count > MAX_COUNT:
        return nearest.find_candidates(z, energy, count)
    margin = _bound_errors(energy, z.shape[1])
    keys = _list_nearest(z, (energy - margin).to(torch.float32), count, launch)
    keys = keys.flatten(1).sort(1).values[:, :count]
    indices = keys & 0xFFFFFFFF
    lower = (keys >> 32).to(torch.int32).view(torch.float32)
    widths = 2 * (margin[:, None] + margin[indices])
    return indices, lower, lower + widths.to(torch.float32)


def _list_nearest(z: Tensor, low: Tensor, count: int, launch: Launch | None = None) -> Tensor:
    """Return the lists of all programs, (n, parts, MAX_COUNT): bits of a bound, then a number."""
    n = len(z)
    launch = launch or choose(n, _launch.capability(z.device))
    capacity = triton.cdiv(n, max(launch.rows, launch.cols)) * max(launch.rows, launch.cols)
    hi, lo = _split(z, capacity, launch.block_p)
    keys = torch.empty(n, launch.parts, MAX_COUNT, dtype=torch.int64, device=z.device)
    _launch.launch(
        _candidates_kernel,
        (triton.cdiv(n, launch.rows) * launch.parts,),
        *(hi, lo, F.pad(low, (0, capacity - n)), keys),
        *(n, hi.shape[0] * launch.block_p, capacity, count, 2 / _SCALE**2),
        ROWS=launch.rows,
        COLS=launch.cols,
        COUNT=MAX_COUNT,
        BLOCK_P=launch.block_p,
        INNER=_INNER,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return keys


def _split(z: Tensor, capacity: int, block_p: int) -> tuple[Tensor, Tensor]:
    """Return two halves of z (n, p), which together keep 22 bits, in planes of neurons.

    Stimuli and neurons are padded with zeros, so that no product needs a mask and each tile is one
    run of memory.
    """
    n, p = z.shape
    planes = triton.cdiv(p, block_p)
    hi, lo = z.new_zeros(2, planes, capacity, block_p, dtype=torch.float16)
    scaled = F.pad(z * _SCALE, (0, planes * block_p - p)).view(n, planes, block_p).transpose(0, 1)
    hi[:, :n] = scaled
    lo[:, :n] = scaled - hi[:, :n]
    return hi, lo


def _bound_errors(energy: Tensor, p: int) -> Tensor:
    """Bound each stimulus's share in the errors of its squared distances, (n,).

    A step of the tensor cores adds 16 products to a sum; each of these 17 numbers may lose a unit
    in the 23rd bit of the largest. The halves, the product of both second halves, which is left
    out, and what remains round by less than 32 units in the 24th bit. float16 holds the smallest
    entries in steps of 2^-24, before scaling back.
    """
    relative = (3 * _INNER / 16 * 17 * 2 + p / _INNER + 32) * 2.0**-24
    absolute = 2.0**-24 / _SCALE * (p * energy).sqrt()
    return relative * energy + absolute + 2 * torch.finfo(torch.float32).tiny


def _make_case(n: int, p: int, count: int) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        _list_nearest(torch.empty(n, p, device=device), torch.empty(n, device=device), count)

    return _launch.CompileCase(
        f"{count} candidates, n = {n:,}, p = {p:,}", call, floor(n, p, count), products=True
    )


AOT_CASES = (
    _make_case(20_000, 512, 17),
    _make_case(1024, 4096, 17),
)
