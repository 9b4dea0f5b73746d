"""Linear predictivity, from an explicit fit for each fold."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Real, centre
from repsim_kernels.reference.probe import find_best_ridge, predict_held_out


def linear_predictivity(x: Real, y: Real, *, ridge: float | str, folds: Real) -> np.float64:
    """Return the R² of y (n, q) predicted from x (n, p) by ridge regression, held out by ``folds``.

    R² is 1 minus the squared residuals of all stimuli and neurons over the squared deviations of y
    from its mean. ``ridge`` is relative, κ = ridge · ‖A‖²/n for the centred x A, or "gcv".
    """
    x, y = (centre(a) for a in (x, y))
    relative = find_best_ridge(x, y) if isinstance(ridge, str) else ridge
    residuals = y - predict_held_out(x, x, y, relative, folds)
    return np.float64(1 - np.sum(residuals**2) / np.sum(y**2))
