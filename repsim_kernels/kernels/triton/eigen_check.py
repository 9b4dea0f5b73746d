"""The check of eigenvectors in kernels/cusolver.py, as two products and one kernel.

PyTorch needs 20 operations for it, each of which is expected to take longer to start than to run
for a batch of small matrices. One program reads a matrix's two products and its eigenvectors once,
6 MB for 500 rows. Not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.triton import _launch

_ROWS, _COLUMNS = 16, 64


@triton.jit
def _eigen_check_kernel(
    product_ptr,  # (B, n, n) the matrices times their eigenvectors
    gram_ptr,  # (B, n, n) products of the eigenvectors with each other
    v_ptr,  # (B, n, n) eigenvectors as columns
    w_ptr,  # (B, n)
    status_ptr,  # (B,) of the solver, or None
    wrong_ptr,  # (B,)
    n, stride_b, stride_row, stride_column, tolerance, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    size = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, n, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        size = tl.maximum(size, tl.abs(tl.load(w_ptr + b * n + j, mask=j < n, other=0)))
    size = tl.max(size, 0)

    # Counts of entries that fail a comparison, as NaN does. Without an infinite value no residual
    # can be as large as it.
    wrong = tl.where(size < float("inf"), 0, 1) + tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, n, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        w = tl.load(w_ptr + b * n + j, mask=j < n, other=0)
        following = tl.load(w_ptr + b * n + j + 1, mask=j + 1 < n, other=float("inf"))
        wrong += tl.where((w <= following) | (j >= n), 0, 1)[None, :]
        for row in range(0, n, ROWS):
            i = row + tl.arange(0, ROWS)
            inside = (i < n)[:, None] & (j < n)[None, :]
            at = b * n * n + i[:, None] * n + j[None, :]
            v_at = b * stride_b + i[:, None] * stride_row + j[None, :] * stride_column
            v = tl.load(v_ptr + v_at, mask=inside, other=0)
            residual = tl.abs(tl.load(product_ptr + at, mask=inside, other=0) - v * w[None, :])
            wrong += tl.where((residual <= tolerance * size) | ~inside, 0, 1)
            unit = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
            deviation = tl.abs(tl.load(gram_ptr + at, mask=inside, other=0) - unit)
            wrong += tl.where((deviation <= tolerance) | ~inside, 0, 1)
    count = tl.sum(tl.sum(wrong, 1), 0)
    if status_ptr is not None:
        count += tl.load(status_ptr + b) != 0
    tl.store(wrong_ptr + b, count > 0)


def find_wrong(a: Tensor, result: dict[str, Tensor], status: Tensor | None = None) -> Tensor:
    """Return for each matrix of a (…, n, n), float64, whether its values and vectors are wrong.

    So are those with a solver's ``status`` (…) other than 0.
    """
    n = a.shape[-1]
    v = result["vectors"].reshape(-1, n, n)
    product, gram = a.reshape(-1, n, n) @ v, v.mT @ v
    wrong = torch.empty(len(v), dtype=torch.bool, device=a.device)
    _launch.launch(
        _eigen_check_kernel,
        (len(v),),
        *(product, gram, v, result["values"].contiguous(), status, wrong),
        *(n, *v.stride(), cusolver.find_tolerance(n, a.dtype)),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return wrong.view(a.shape[:-2])


def _make_case(batch: int, n: int) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        a = torch.empty(batch, n, n, dtype=torch.float64, device=device)
        status = torch.empty(batch, dtype=torch.int32, device=device)
        find_wrong(a, {"values": a[..., 0], "vectors": a.mT}, status)

    floor = _launch.Floor(24 * batch * n * n, 4 * batch * n * n)
    return _launch.CompileCase(f"{batch} matrices of {n} x {n}", call, floor)


AOT_CASES = (_make_case(16, 499),)
