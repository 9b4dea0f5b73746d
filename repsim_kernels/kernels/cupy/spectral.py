"""Batched eigenproblems and SVDs, by the CUDA C++ kernels of cuda/jacobi.cu and by cuSOLVER."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.cupy import module

#: Rows of the largest matrix that fits into a block's shared memory in float64.
MAX_ROWS = 128
# 5 to 12 sweeps are typical; SVDs of 128 rows with values over 16 decades have taken 39.
_SWEEPS = 100
# Bytes of shared memory per block, assumed without a GPU: sm_80's.
_SHARED = 163 * 1024


@dataclass(frozen=True)
class Launch:
    threads: int
    placement: int  # where vectors are rotated: 0 nowhere, 1 in shared memory, 2 in global memory
    shared: int  # bytes


def choose(
    operation: str, rows: int, n: int, itemsize: int, vectors: bool, limit: int
) -> Launch | None:
    """Choose launch settings for "eigh" (rows = n) or "svd" of matrices (rows, n).

    None if they don't fit into `limit` bytes of shared memory.
    """
    m = n + n % 2
    numbers = m * (m + 1) + m + 2 * n + 2
    if operation == "svd":
        numbers = n * (rows | 1) + 12 * m + m + m // 2
    required = numbers * itemsize + 4 * n
    if rows > MAX_ROWS or required > limit:
        return None
    placement = 0
    if vectors:
        placement = 1 if required + n * n * itemsize <= limit else 2
    return Launch(
        # Eight threads for each of the m / 2 pairs of a step: 7 warps at 50 rows, which share 325
        # blocks of 2 x 2; at 128 rows the most that 64 registers per thread allow.
        threads=min(512, max(32, -(-4 * m // 32) * 32)),
        placement=placement,
        shared=required + (n * n * itemsize if placement == 1 else 0),
    )


def _shared_memory_limit(device: torch.device) -> int:
    return module.shared_memory_limit(device) if device.type == "cuda" else _SHARED


def unsupported(a: Tensor) -> str | None:
    """Return why the kernels can't take a, or None if they can."""
    if a.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, not {str(a.dtype)[6:]}"
    return module.unsupported(a)


def eigh(a: Tensor, *, vectors: bool) -> dict[str, Tensor]:
    """Return ascending ``values``, their ``vectors`` as columns, and which matrices ``failed``.

    LAPACK solves each matrix that the batched solver fails on.
    """
    a = cusolver.mirror_lower_triangle(a)
    result = solve_batch(a, vectors=vectors)
    cusolver.retry(a, result)
    return result


def solve_batch(
    a: Tensor, *, vectors: bool, sweeps: int = _SWEEPS, check: cusolver.Check | None = None
) -> dict[str, Tensor]:
    """Solve as `eigh` does, without a second attempt: Jacobi rotations, or cuSOLVER above 128."""
    n = a.shape[-1]
    launch = choose("eigh", n, n, a.element_size(), vectors, _shared_memory_limit(a.device))
    if launch is None:
        return cusolver.solve_batch(a, vectors=vectors, otherwise=_solve_by_cupy, check=check)
    matrices = a.reshape(-1, n, n).contiguous()
    w, v, work = matrices.new_empty(len(matrices), n), *_empty_vectors(matrices, launch)
    info = torch.empty(len(matrices), dtype=torch.int32, device=a.device)
    numbers = map(np.int32, (n, launch.placement, sweeps))
    _launch_jacobi("eigh", launch, matrices, w, v, work, info, *numbers)
    result = {"values": w.view(a.shape[:-1]), "failed": info.view(a.shape[:-2]) < 0}
    return result | ({"vectors": v.view(a.shape)} if vectors else {})


def svd(a: Tensor, *, vectors: bool, sweeps: int = _SWEEPS) -> dict[str, Tensor]:
    """Return descending ``values``, ``left`` and ``right`` vectors, and which matrices ``failed``.

    There is no ``failed`` for matrices above 128 rows, which PyTorch solves.
    """
    rows, n = a.shape[-2:]
    if rows < n:
        result = svd(a.mT, vectors=vectors, sweeps=sweeps)
        if vectors:
            result["left"], result["right"] = result["right"].mT, result["left"].mT
        return result
    launch = choose("svd", rows, n, a.element_size(), vectors, _shared_memory_limit(a.device))
    if launch is None:
        if not vectors:
            return {"values": torch.linalg.svdvals(a)}
        return dict(zip(("left", "values", "right"), torch.linalg.svd(a, False), strict=True))
    matrices = a.reshape(-1, rows, n).contiguous()
    s, u = matrices.new_empty(len(matrices), n), torch.empty_like(matrices)
    vh, work = _empty_vectors(matrices, launch)
    info = torch.empty(len(matrices), dtype=torch.int32, device=a.device)
    numbers = map(np.int32, (rows, n, launch.placement, sweeps))
    _launch_jacobi("svd", launch, matrices, u, s, vh, work, info, *numbers)
    lead = a.shape[:-2]
    result = {"values": s.view(*lead, n), "failed": info.view(lead) < 0}
    if vectors:
        result |= {"left": _complete_basis(u).view(a.shape), "right": vh.view(*lead, n, n)}
    return result


def _empty_vectors(matrices: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Allocate the vectors (B, n, n), and global memory to rotate them in; empty if not needed."""
    n = matrices.shape[-1]
    return (
        matrices.new_empty(len(matrices) if launch.placement else 0, n, n),
        matrices.new_empty(len(matrices) if launch.placement == 2 else 0, n, n),
    )


def _launch_jacobi(
    operation: str, launch: Launch, matrices: Tensor, *arguments: Tensor | np.generic
) -> None:
    """Start one block of a kernel of cuda/jacobi.cu for each matrix."""
    name = f"jacobi_{operation}_f{8 * matrices.element_size()}"
    grid, block = (len(matrices),), (launch.threads,)
    module.launch("jacobi", name, grid, block, matrices, *arguments, shared=launch.shared)


def _complete_basis(u: Tensor) -> Tensor:
    """Replace the columns of zeros of u (B, rows, n), its last ones, by orthonormal ones."""
    known = (u != 0).any(dim=1, keepdim=True)
    if bool(known.all()):
        return u
    q, _ = torch.linalg.qr(u)
    return torch.where(known, u, q)


def _solve_by_cupy(a: Tensor, vectors: bool) -> list[Tensor]:
    """Solve symmetric matrices by one call of an older cuSOLVER for the batch.

    CuPy ignores the status that cuSOLVER reports for each matrix, and cuSOLVER has returned wrong
    results without reporting them (CuPy's issue 4847).
    """
    import cupy  # type: ignore[import-not-found]

    with (
        cupy.cuda.Device(a.device.index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream(a.device)),
    ):
        matrices = cupy.from_dlpack(a)
        solved = cupy.linalg.eigh(matrices) if vectors else [cupy.linalg.eigvalsh(matrices)]
        return list(map(torch.utils.dlpack.from_dlpack, solved))
