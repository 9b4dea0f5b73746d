"""Distances of ablations from Gram matrices on a GPU, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repsim_kernels._routes import Distances
from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.cupy import spectral as native
from repsim_kernels.kernels.torch import spectral
from repsim_kernels.kernels.torch.spectral_distances import Solvers
from repsim_kernels.kernels.triton import _launch, cka, eigen_check, riccati, riccati_trace


def unsupported(*tensors: Tensor) -> str | None:
    """Return why these tensors can't be used, or None; unlike other kernels, float64 is allowed."""
    doubles = (t.new_empty(0, dtype=torch.float32) for t in tensors if t.dtype == torch.float64)
    return _launch.unsupported(*doubles, *(t for t in tensors if t.dtype != torch.float64))


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `torch.linalg.eigh` for all matrices at once, by native kernels, cuSOLVER or,
    without either, PyTorch.

    Raises torch.linalg.LinAlgError if LAPACK can't solve a matrix that they failed on.
    """
    is_double = a.dtype == torch.float64  # products of float32 may be rounded to TF32
    check = eigen_check.find_wrong if is_double and unsupported(a) is None else None
    if native.unsupported(a) is None:
        result = native.solve_batch(a, vectors=True, check=check)
    elif cusolver.unsupported(a) is None:
        result = cusolver.solve_batch(a, vectors=True, check=check)
    else:
        return torch.linalg.eigh(a)
    if failed := cusolver.retry(a, result):
        message = f"eigh: {failed} matrices did not converge"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]
    return result["values"], result["vectors"]


def svdvals(a: Tensor) -> Tensor:
    """Compute `torch.linalg.svdvals`, by native kernels where possible."""
    if not a.numel() or native.unsupported(a) is not None:
        return torch.linalg.svdvals(a)
    result = native.svd(a, vectors=False)
    s = result["values"]
    if "failed" in result and bool((failed := result["failed"]).any()):
        s[failed] = torch.linalg.svdvals(a[failed])
    return s


SOLVERS = Solvers(riccati.advance, riccati_trace.TRACE_SOLVERS, eigh, svdvals, cka.cosine_distance)


def gram_ablation_distances(k: Tensor, parts: Tensor, **options: Any) -> dict[str, Distances]:
    """Compute the torch backend's result with solvers for the GPU."""
    return spectral.gram_ablation_distances(k, parts, solvers=SOLVERS, **options)
