"""Linear decodability of a representation and of its ablations, from their Grams."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch.ablation import PASSES, Cells, Passes


def ablation_decodability(
    x: Tensor,
    *,
    cells: np.ndarray,
    n_cells: int,
    labels: np.ndarray,
    target: int | None,
    ridge: float,
    passes: Passes = PASSES,
) -> dict[str, Tensor]:
    parts = Cells(x, cells, n_cells, shifts=True, passes=passes)
    truth = torch.from_numpy(
        np.unique(labels, return_inverse=True)[1]
        if target is None
        else (labels == target).astype(int)
    ).to(x.device)
    onehot = torch.nn.functional.one_hot(truth).to(torch.float64)

    def accuracy(predicted: Tensor) -> Tensor:
        right = (predicted.argmax(1) == truth).to(torch.float64)
        if target is None:
            return right.mean()
        return torch.stack([right[truth == k].mean() for k in (0, 1)]).mean()

    whole, weights = _leave_one_out(parts.whole, onehot, ridge)
    dual = weights @ onehot
    held_out = whole - onehot
    refit = torch.full((n_cells,), torch.nan, dtype=torch.float64, device=x.device)
    frozen = torch.empty_like(refit)
    for c in range(n_cells):
        rest = parts.rest(c)
        if parts.left[c]:
            refit[c] = accuracy(_leave_one_out(rest, onehot, ridge)[0])
        # The reader that was fitted without stimulus i has its own dual weights: those of all
        # stimuli with the held-out prediction in the place of stimulus i's target.
        shift = parts.shift[c]
        own = (rest * weights).sum(1) - weights @ shift + 1 / len(x)
        frozen[c] = accuracy(onehot.mean(0) + rest @ dual - shift @ dual + own[:, None] * held_out)
    return {"refit": refit, "frozen": frozen, "intact": accuracy(whole)}


def _leave_one_out(k: Tensor, onehot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Leave-one-out predictions (n, classes) of ridge regression on a Gram, and (K + κI)⁻¹."""
    n = len(k)
    kappa = ridge * k.trace() / n
    regular = k + kappa * torch.eye(n, dtype=k.dtype, device=k.device)
    weights = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    residual = kappa * weights - 1 / n
    left = residual.diagonal()[:, None]
    return onehot - (residual @ onehot) / left, weights
