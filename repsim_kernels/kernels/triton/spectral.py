"""Distances of ablations from Grams on a GPU, all of it in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repsim_kernels._routes import Distances
from repsim_kernels.kernels.cupy import spectral as native
from repsim_kernels.kernels.torch import spectral
from repsim_kernels.kernels.torch.spectral_distances import Solvers
from repsim_kernels.kernels.triton import _launch, riccati


def unsupported(*tensors: Tensor) -> str | None:
    """Why they can't be served here; float64, which other kernels don't take, is welcome."""
    doubles = (t.new_empty(0, dtype=torch.float32) for t in tensors if t.dtype == torch.float64)
    return _launch.unsupported(*doubles, *(t for t in tensors if t.dtype != torch.float64))


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.linalg.eigh`, by native kernels where they serve, for all matrices at once.

    Raises torch.linalg.LinAlgError where PyTorch can't solve what they failed on either.
    """
    if native.unsupported(a) is not None:
        return torch.linalg.eigh(a)
    found = native.eigh(a, vectors=True)
    if failed := int(found["failed"].sum()):
        message = f"eigh: {failed} matrices did not converge"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]
    return found["values"], found["vectors"]


def svdvals(a: Tensor) -> Tensor:
    """As `torch.linalg.svdvals`, by native kernels where they serve."""
    if native.unsupported(a) is not None:
        return torch.linalg.svdvals(a)
    found = native.svd(a, vectors=False)
    s = found["values"]
    if "failed" in found and bool((failed := found["failed"]).any()):
        s[failed] = torch.linalg.svdvals(a[failed])
    return s


SOLVERS = Solvers(riccati.advance, eigh, svdvals)


def gram_ablation_distances(k: Tensor, parts: Tensor, **options: Any) -> dict[str, Distances]:
    return spectral.gram_ablation_distances(k, parts, solvers=SOLVERS, **options)
