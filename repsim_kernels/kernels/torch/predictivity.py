"""Linear predictivity from Grams: one factorisation of x serves every fold and neuron of y."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch.probe import best_ridges, group_folds, hold_out
from repsim_kernels.kernels.torch.representation import Representation


def linear_predictivity(x: Tensor, y: Tensor, *, ridge: float | str, folds: np.ndarray) -> Tensor:
    return all_pairs([Representation(x)], [Representation(y)], ridge, folds)[0, 0]


def all_pairs(
    xs: list[Representation], ys: list[Representation], ridge: float | str, folds: np.ndarray
) -> Tensor:
    """Return R² of every y (n, q_j) predicted from every x (n, p_i), (L, M)."""
    fold_members = group_folds(folds, xs[0].x.device)
    return torch.stack([_scores(x.gram, ys, ridge, fold_members) for x in xs])


def _scores(
    k: Tensor, ys: list[Representation], ridge: float | str, fold_members: list[Tensor]
) -> Tensor:
    """Return R² of each y, (M,), predicted from the representation with the Gram K (n, n)."""
    if not isinstance(ridge, str):
        residual = _held_out_residual_matrix(k, ridge, fold_members)
        return torch.stack([_score(y, residual) for y in ys])
    ridges = best_ridges(k, [y.factor for y in ys])
    return torch.stack(
        [
            _score(y, _held_out_residual_matrix(k, r, fold_members))
            for y, r in zip(ys, ridges, strict=True)
        ]
    )


def _held_out_residual_matrix(
    k: Tensor, ridge: Tensor | float, fold_members: list[Tensor]
) -> Tensor:
    """Return R (n, n) such that R y are the held-out residuals of any y (n, q)."""
    n = len(k)
    scale = k.trace() / n
    kappa = ridge * scale
    # K is 0 on the vector of ones, where the inverse 1 / κ would swamp the other directions with
    # rounding. So K's mean eigenvalue is added there, and removed again from the result.
    regular = k + scale / n + kappa * torch.eye(n, dtype=k.dtype, device=k.device)
    weights = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    residual = kappa * (weights - 1 / (n * (scale + kappa)))
    return hold_out(residual, residual.clone(), fold_members)


def _score(y: Representation, residual: Tensor) -> Tensor:
    """Return 1 - ‖R y‖² / ‖y‖² of the centred y, from the Gram of y if that is smaller."""
    if y.p < y.n:
        errors, energy = (residual @ y.centred).square().sum(), y.centred.square().sum()
    else:
        errors, energy = ((residual @ y.gram) * residual).sum(), y.gram.trace()
    return 1 - errors / energy
