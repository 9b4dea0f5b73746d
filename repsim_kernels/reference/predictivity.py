"""Linear predictivity, each held-out fit made."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Real, centered
from repsim_kernels.reference.probe import best_ridge, held_out


def linear_predictivity(x: Real, y: Real, *, ridge: float | str, folds: Real) -> np.float64:
    """R² of y (n, q) predicted from x (n, p) by ridge regression without each of the folds (n,).

    The squared residuals of all stimuli and neurons, over the squared deviations of y from its
    mean. ``ridge`` is relative, κ = ridge · ‖A‖²/n of the centred x, or "gcv".
    """
    x, y = (centered(a) for a in (x, y))
    relative = best_ridge(x, y) if isinstance(ridge, str) else ridge
    residuals = y - held_out(x, x, y, relative, folds)
    return np.float64(1 - np.sum(residuals**2) / np.sum(y**2))
