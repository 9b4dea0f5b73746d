"""Linear predictivity, from Grams: one factorisation of x serves every fold and neuron of y."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch.probe import best_ridges, fold_groups, hold_out
from repsim_kernels.kernels.torch.representation import Representation


def linear_predictivity(x: Tensor, y: Tensor, *, ridge: float | str, folds: np.ndarray) -> Tensor:
    return all_pairs([x], [y], ridge=ridge, folds=folds)[0, 0]


def all_pairs(
    xs: list[Tensor], ys: list[Tensor] | None, *, ridge: float | str, folds: np.ndarray
) -> Tensor:
    """R² of every y (n, q_j), the xs unless given, from every x (n, p_i), (L, M)."""
    left = [Representation(x) for x in xs]
    right = left if ys is None else [Representation(y) for y in ys]
    held = fold_groups(folds, xs[0].device)
    return torch.stack([_scores(x.gram, right, ridge, held) for x in left])


def _scores(k: Tensor, ys: list[Representation], ridge: float | str, held: list[Tensor]) -> Tensor:
    """R² of each y, (M,), from the representation that has the Gram K (n, n)."""
    if not isinstance(ridge, str):
        missed = _held_out_residuals(k, ridge, held)
        return torch.stack([_score(y, missed) for y in ys])
    ridges = best_ridges(k, [y.factor for y in ys])
    return torch.stack(
        [_score(y, _held_out_residuals(k, r, held)) for y, r in zip(ys, ridges, strict=True)]
    )


def _held_out_residuals(k: Tensor, ridge: Tensor | float, held: list[Tensor]) -> Tensor:
    """R (n, n) such that R y are the held-out residuals of any y (n, q)."""
    n = len(k)
    scale = k.trace() / n
    kappa = ridge * scale
    # On the vector of ones K is 0, and its inverse 1 / κ would swamp the others by rounding:
    # there it is given K's mean eigenvalue, which is taken out again.
    regular = k + scale / n + kappa * torch.eye(n, dtype=k.dtype, device=k.device)
    weights = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    residual = kappa * (weights - 1 / (n * (scale + kappa)))
    return hold_out(residual, residual.clone(), held)


def _score(y: Representation, missed: Tensor) -> Tensor:
    """1 - ‖R y‖² / ‖y‖² of the centred y; from the Gram of y where that is smaller."""
    if y.p < y.n:
        errors, energy = (missed @ y.centred).square().sum(), y.centred.square().sum()
    else:
        errors, energy = ((missed @ y.gram) * missed).sum(), y.gram.trace()
    return 1 - errors / energy
