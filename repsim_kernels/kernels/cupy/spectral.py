"""Spectra of many matrices at a time, by the CUDA C++ kernels of cuda/jacobi.cu and by cuSOLVER."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.cupy import module

#: Rows of the largest matrix that fits into the shared memory of a block, in float64.
LIMIT = 128
# 5 to 12 sweeps are usual; SVDs of 128 rows with values of 16 decades were seen to take 39.
_SWEEPS = 100
# Bytes of shared memory that a block may have where there is no GPU to ask: sm_80's.
_SHARED = 163 * 1024


@dataclass(frozen=True)
class Launch:
    threads: int
    kept: int  # where vectors are rotated: 0 nowhere, 1 in shared memory, 2 in global memory
    shared: int  # bytes


def choose(
    operation: str, rows: int, n: int, itemsize: int, vectors: bool, room: int
) -> Launch | None:
    """For "eigh" (rows = n) or "svd" of matrices (rows, n); None if they don't fit into `room`."""
    m = n + n % 2
    numbers = m * (m + 1) + m + 2 * n + 2
    if operation == "svd":
        numbers = n * (rows | 1) + 12 * m + m + m // 2
    least = numbers * itemsize + 4 * n
    if rows > LIMIT or least > room:
        return None
    kept = 0
    if vectors:
        kept = 1 if least + n * n * itemsize <= room else 2
    return Launch(
        # Eight threads for each of the m / 2 pairs of a step: at 50 rows 7 warps, which share 325
        # elements of 2 x 2; at 128 rows all that a block of 64 registers a thread may have.
        threads=min(512, max(32, -(-4 * m // 32) * 32)),
        kept=kept,
        shared=least + (n * n * itemsize if kept == 1 else 0),
    )


def _room(device: torch.device) -> int:
    return module.shared_memory(device) if device.type == "cuda" else _SHARED


def unsupported(a: Tensor) -> str | None:
    if a.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, not {str(a.dtype)[6:]}"
    return module.unsupported(a)


def eigh(a: Tensor, *, vectors: bool) -> dict[str, Tensor]:
    """Ascending ``values``, their ``vectors`` as columns, and which matrices ``failed``.

    A matrix that the batch fails on is solved again on its own by PyTorch.
    """
    result = solve_batch(a, vectors=vectors)
    _retry(a, result)
    return result


def solve_batch(a: Tensor, *, vectors: bool, sweeps: int = _SWEEPS) -> dict[str, Tensor]:
    """As `eigh`, without a second attempt: by Jacobi rotations, or cuSOLVER for larger matrices."""
    n = a.shape[-1]
    launch = choose("eigh", n, n, a.element_size(), vectors, _room(a.device))
    if launch is None:
        return _by_cusolver(a, vectors)
    flat = a.reshape(-1, n, n).contiguous()
    w, v, work = flat.new_empty(len(flat), n), *_two(flat, launch)
    info = torch.empty(len(flat), dtype=torch.int32, device=a.device)
    numbers = map(np.int32, (n, launch.kept, sweeps))
    _start("eigh", launch, flat, w, v, work, info, *numbers)
    found = {"values": w.view(a.shape[:-1]), "failed": info.view(a.shape[:-2]) < 0}
    return found | ({"vectors": v.view(a.shape)} if vectors else {})


def svd(a: Tensor, *, vectors: bool, sweeps: int = _SWEEPS) -> dict[str, Tensor]:
    """Descending ``values``, ``left`` and ``right`` vectors, and which matrices ``failed``."""
    rows, n = a.shape[-2:]
    if rows < n:
        found = svd(a.mT, vectors=vectors, sweeps=sweeps)
        if vectors:
            found["left"], found["right"] = found["right"].mT, found["left"].mT
        return found
    launch = choose("svd", rows, n, a.element_size(), vectors, _room(a.device))
    if launch is None:
        if not vectors:
            return {"values": torch.linalg.svdvals(a)}
        return dict(zip(("left", "values", "right"), torch.linalg.svd(a, False), strict=True))
    flat = a.reshape(-1, rows, n).contiguous()
    s, (vh, work), u = flat.new_empty(len(flat), n), _two(flat, launch), torch.empty_like(flat)
    info = torch.empty(len(flat), dtype=torch.int32, device=a.device)
    numbers = map(np.int32, (rows, n, launch.kept, sweeps))
    _start("svd", launch, flat, u, s, vh, work, info, *numbers)
    lead = a.shape[:-2]
    found = {"values": s.view(*lead, n), "failed": info.view(lead) < 0}
    if vectors:
        found |= {"left": _completed(u).view(a.shape), "right": vh.view(*lead, n, n)}
    return found


def _two(flat: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Memory for vectors (B, n, n), and for their rotations."""
    n = flat.shape[-1]
    return (
        flat.new_empty(len(flat) if launch.kept else 0, n, n),
        flat.new_empty(len(flat) if launch.kept == 2 else 0, n, n),
    )


def _start(operation: str, launch: Launch, flat: Tensor, *arguments: Tensor | np.generic) -> None:
    name = f"jacobi_{operation}_f{8 * flat.element_size()}"
    grid, block = (len(flat),), (launch.threads,)
    module.launch("jacobi", name, grid, block, flat, *arguments, shared=launch.shared)


def _completed(u: Tensor) -> Tensor:
    """u (B, rows, n) with orthonormal columns for those of zeros: the last ones."""
    known = (u != 0).any(dim=1, keepdim=True)
    if bool(known.all()):
        return u
    q, _ = torch.linalg.qr(u)
    return torch.where(known, u, q)


def _by_cusolver(a: Tensor, vectors: bool) -> dict[str, Tensor]:
    """As `eigh`, by one call of cuSOLVER for the batch, whose results are checked.

    CuPy ignores what cuSOLVER reports of each matrix, and cuSOLVER has returned wrong results
    without a report (CuPy's issue 4847). Matrices that fail the check count as failed.
    """
    # PyTorch takes one matrix after the other beyond 32 rows (its issues 174674 and 175585: 914 ms
    # for 500 matrices of 100 x 100, where CuPy's call of cuSOLVER for the batch takes 8.4 ms).
    import cupy  # type: ignore[import-not-found]

    # As PyTorch reads it, the lower triangle: a may be symmetric but for rounding.
    a = a.tril() + a.tril(-1).mT
    with (
        cupy.cuda.Device(a.device.index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream(a.device)),
    ):
        matrices = cupy.from_dlpack(a)
        solved = cupy.linalg.eigh(matrices) if vectors else [cupy.linalg.eigvalsh(matrices)]
        result = _named(list(map(torch.utils.dlpack.from_dlpack, solved)))
    result["failed"] = _is_wrong(a, result)
    return result


def _retry(a: Tensor, result: dict[str, Tensor]) -> None:
    """Solve the matrices that failed again, each on its own by PyTorch; update `result` in place.

    Those that PyTorch fails on, or solves wrongly, stay marked as failed.
    """
    for at in map(tuple, result["failed"].nonzero().tolist()):
        one = a[at]
        try:
            solved = torch.linalg.eigh(one) if "vectors" in result else [torch.linalg.eigvalsh(one)]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        again = _named(solved)
        for name, value in again.items():
            result[name][at] = value
        result["failed"][at] = _is_wrong(one, again)


def _named(solved: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("values", "vectors"), solved, strict=False))


def _is_wrong(a: Tensor, result: dict[str, Tensor]) -> Tensor:
    """Whether values (…, n) and vectors, if there are any, are wrong for each matrix of a: (…).

    With vectors the check is complete: a V = V diag(w), and the columns of V are orthonormal.
    Without, it is necessary only: the values have the trace and the Frobenius norm of a. Either
    way they ascend.
    """
    n, w = a.shape[-1], result["values"].to(torch.float64)
    # LAPACK leaves 0.1 n eps ‖a‖ in the first and 0.8 n eps in the second, of 129 to 700 rows. In
    # float64, since float32 products may be TF32's; with a of magnitude 1, so no square overflows.
    tolerance = 10 * n * torch.finfo(a.dtype).eps
    unit = a.abs().amax((-2, -1)).to(torch.float64)
    unit = torch.where(unit > 0, unit, 1)
    a, w = a.to(torch.float64) / unit[..., None, None], w / unit[..., None]
    size = torch.linalg.matrix_norm(a)
    if "vectors" in result:
        v = result["vectors"].to(torch.float64)
        left = torch.linalg.matrix_norm((a @ v).addcmul_(v, w[..., None, :], value=-1))
        gram = v.mT @ v
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        right = (left <= tolerance * size) & (torch.linalg.matrix_norm(gram) <= tolerance)
    else:
        # Hoffman and Wielandt: the values of a + E differ from those of a by at most ‖E‖ in all.
        sums = w.sum(-1) - a.diagonal(dim1=-2, dim2=-1).sum(-1)
        norms = torch.linalg.vector_norm(w, dim=-1) - size
        right = (sums.abs() <= n**0.5 * tolerance * size) & (norms.abs() <= tolerance * size)
    return ~(right & (w.diff(dim=-1) >= 0).all(-1))  # NaN passes no comparison
