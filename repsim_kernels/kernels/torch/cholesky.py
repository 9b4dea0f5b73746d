"""Inverses and solutions from Cholesky factors, in the form that suits the device.

Batched solves with a Cholesky factor go to MAGMA on a GPU, which takes milliseconds to start, and
triangular solves to cuBLAS. The batched factorisation itself remains MAGMA's. Its status is checked
by the caller, together with other numbers, since reading it makes the host wait.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve(factor: Tensor, b: Tensor) -> Tensor:
    """Return A⁻¹ b from the lower Cholesky factor of A (…, m, m), for b (…, m, k)."""
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def invert(factor: Tensor) -> Tensor:
    """Return A⁻¹ from the lower Cholesky factor of A (…, m, m)."""
    if not factor.is_cuda:
        return torch.cholesky_inverse(factor)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return half.mT @ half


def raise_if_singular(info: Tensor) -> None:
    """Raise LinAlgError if a factorisation failed, given the ``info`` of `cholesky_ex`."""
    if any(info.reshape(-1).tolist()):
        message = "singular to rounding"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]
