"""Inner products of the Gram matrices of one side with permutations of the other's, in one launch.

A program takes a few permutations and some rows of the Grams of one side. It loads these once,
gathers the entries of the other side from where its permutations move them, all layers of an entry
together, and multiplies on float64's tensor cores. PyTorch adds the results of the programs, so
that runs are bit-identical.

Programs that differ in their permutations alone run concurrently: all but the first find h in the
L2 cache. What they gather is scattered over k, of which the cache holds a quarter at most.

Predictions for an H200, since this was not run on a GPU, for 200 permutations of float64 Grams:

    n       layers    gathered   operations   at least
    1,024   32 x 24   20 GB      161 Gop      4.7 ms
    1,024   1 x 1     0.84 GB    0.2 Gop      0.2 ms
    50      12 x 12   24 MB      73 Mop       6 µs

Steps end with a row, which adds 3 % to the products for n = 1,024. Memory is read in sectors of 32
bytes, four times what one layer alone needs: expected to take 0.8 ms. On sm_90, an iteration of 24
layers of k is issued in 0.80 of the cycles that its products occupy the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch

_ROWS = 32  # layers of h per program; unused ones cost less than what is gathered


@dataclass(frozen=True)
class Launch:
    cols: int  # layers of k per program
    permutations: int  # per program
    block: int  # entries of a step, all of one row
    parts: int  # programs among which the rows are divided
    num_warps: int
    num_stages: int


def choose(n: int, rows: int, cols: int, permutations: int, capability: tuple[int, int]) -> Launch:
    """Choose launch settings for the products of rows x cols layers of n stimuli."""
    # Few numbers of layers, each of which is compiled for all devices to see that nothing spills.
    block_cols = 2 if cols <= 2 else max(8, triton.next_power_of_2(min(cols, 32)))
    # The columns of a tile are layers of k, each under several permutations. On 10.0, Triton 3.6
    # multiplies without tensor cores, and more columns would spill.
    each = max(1, (64 if capability < (10, 0) else 16) // block_cols)
    programs = (
        triton.cdiv(permutations, each) * triton.cdiv(rows, _ROWS) * triton.cdiv(cols, block_cols)
    )
    return Launch(
        cols=block_cols,
        permutations=each,
        block=32,
        # Four waves on 132 multiprocessors, which hold two programs each.
        parts=min(triton.cdiv(8 * 132, programs), n),
        num_warps=8,
        num_stages=3 if capability < (9, 0) else 2,  # on 9.0, three would spill with Triton 3.6
    )


def floor(n: int, rows: int, cols: int, permutations: int) -> _launch.Floor:
    """Lower bound: read h once, gather k once for each permutation, two operations each."""
    entries = n * (n + 1) // 2
    return _launch.Floor(
        8 * (entries * (rows + permutations * cols) + permutations * rows * cols),
        2 * permutations * rows * cols * entries,
    )


def unsupported(*grams: Tensor) -> str | None:
    """Return why the kernel can't take h, k and indices, or None if it can; float64 is allowed."""
    wide = torch.float64, torch.int64
    tensors = (t.new_empty(0, dtype=torch.float32) if t.dtype in wide else t for t in grams)
    return _launch.unsupported(*tensors)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_permutations", "n", "stride_h"])
def _permuted_products_kernel(
    h_ptr,  # (L, n (n + 1) / 2)
    k_ptr,  # (n n, M)
    indices_ptr,  # (K, n)
    parts_ptr,  # (parts, K, L, M) float64
    n_rows, n_cols, n_permutations, n, stride_h,
    ROWS: tl.constexpr, COLS: tl.constexpr, PERMUTATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(n_permutations, PERMUTATIONS)
    part = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * PERMUTATIONS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    h_ptr += rows.to(tl.int64)[:, None] * stride_h
    used = first + tl.arange(0, PERMUTATIONS) < n_permutations
    indices_ptr += (first + tl.arange(0, PERMUTATIONS)).to(tl.int64) * n
    n_cols = n_cols // 2 * 2  # shows the compiler that it is even: it loads two layers at once
    total = tl.zeros((ROWS, PERMUTATIONS * COLS), dtype=tl.float64)
    for i in range(part, n, tl.num_programs(0) // groups):
        row_ptr = h_ptr + (tl.zeros((), tl.int64) + i) * (i + 1) // 2
        k_row = tl.load(indices_ptr + i, mask=used, other=0) * n
        for start in range(0, i + 1, BLOCK):
            j = start + tl.arange(0, BLOCK)
            h_mask = (rows < n_rows)[:, None] & (j <= i)[None, :]
            h = tl.load(row_ptr + j[None, :], mask=h_mask, other=0)
            mask = (j <= i)[:, None] & used[None, :]
            place = k_row[None, :] + tl.load(indices_ptr[None, :] + j[:, None], mask=mask, other=0)
            place = (place * n_cols)[:, :, None] + cols[None, None, :]
            k_mask = mask[:, :, None] & (cols < n_cols)[None, None, :]
            k = tl.load(k_ptr + place, mask=k_mask, other=0).reshape(BLOCK, PERMUTATIONS * COLS)
            total = tl.dot(h, k, total, input_precision="ieee", out_dtype=tl.float64)

    column = tl.arange(0, PERMUTATIONS * COLS)
    permutation = first + column // COLS
    col = tl.program_id(2) * COLS + column % COLS
    place = part.to(tl.int64) * n_permutations + permutation[None, :]
    place = (place * n_rows + rows[:, None]) * n_cols + col[None, :]
    is_col = (permutation < n_permutations) & (col < n_cols)
    tl.store(parts_ptr + place, total, mask=(rows < n_rows)[:, None] & is_col[None, :])


def permuted_products(
    h: Tensor, k: Tensor, indices: Tensor, *, launch: Launch | None = None
) -> Tensor:
    """Return the inner products of matrices with permuted ones, (K, L, M) float64.

    h (L, T) are lower triangles, row by row, with doubled entries below the diagonal; k (n², M) are
    whole symmetric matrices, layers last. A row of indices (K, n) permutes rows and columns of k.
    """
    (permutations, n), rows, cols = indices.shape, len(h), k.shape[1]
    launch = launch or choose(n, rows, cols, permutations, _launch.capability(h.device))
    h, k = h.double(), F.pad(k.double(), (0, cols % 2))
    if h.stride(1) != 1:  # neighbouring threads read neighbouring entries
        h = h.contiguous()
    out = h.new_empty(launch.parts, permutations, rows, k.shape[1])
    _launch.launch(
        _permuted_products_kernel,
        (
            triton.cdiv(permutations, launch.permutations) * launch.parts,
            triton.cdiv(rows, _ROWS),
            triton.cdiv(cols, launch.cols),
        ),
        *(
            h,
            k.contiguous(),
            indices.contiguous(),
            out,
            rows,
            k.shape[1],
            permutations,
            n,
            h.stride(0),
        ),
        ROWS=_ROWS,
        COLS=launch.cols,
        PERMUTATIONS=launch.permutations,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out.sum(0)[..., :cols]


def _make_case(n: int, rows: int, cols: int) -> _launch.CompileCase:
    permutations = 200

    def call(device: torch.device) -> None:
        h = torch.empty(rows, n * (n + 1) // 2, dtype=torch.float64, device=device)
        k = torch.empty(n * n, cols, dtype=torch.float64, device=device)
        indices = torch.empty(permutations, n, dtype=torch.int64, device=device)
        permuted_products(h, k, indices)

    return _launch.CompileCase(
        f"{permutations} permutations, {rows} x {cols} layers, n = {n:,}",
        call,
        floor(n, rows, cols, permutations),
    )


AOT_CASES = (
    _make_case(1024, 32, 24),
    _make_case(1024, 1, 1),
    _make_case(50, 6, 6),
    _make_case(50, 12, 12),
)
