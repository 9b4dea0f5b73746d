"""Linear decodability before and after every ablation, each held-out fit made."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centered, membership


def ablation_decodability(
    x: Real,
    cells: Real,
    labels: Real,
    *,
    n_cells: int | None = None,
    target: int | None = None,
    ridge: float = 1.0,
) -> dict[str, Array | np.float64]:
    """Leave-one-out accuracy of a linear probe, {"refit": (C,), "frozen": (C,), "intact": ()}.

    Ridge regression on one-hot targets with an unpenalised intercept, κ = ridge · ‖A‖²/n of all
    stimuli of the side that is fitted, one stimulus left out at a time; the class is the largest
    of its predictions. ``refit`` is fitted and read on x with a cell's columns set to zero,
    ``frozen`` fitted on x and read on the stimulus with the cell's columns set to zero. With a
    target the columns are target and rest, and the accuracy is the mean of the two recalls.

    Refit is NaN for a cell of all columns that vary.
    """
    x = np.asarray(x, dtype=np.float64)
    classes = np.asarray(labels if target is None else labels != target, dtype=np.int64)
    varies = (x != x[0]).any(axis=0)

    def accuracy(scores: Array) -> np.float64:
        right = scores.argmax(axis=1) == classes
        if target is None:
            return np.float64(right.mean())
        return np.float64((right[classes == 0].mean() + right[classes == 1].mean()) / 2)

    refit, frozen = [], []
    for cell in membership(cells, n_cells):
        ablated = np.where(cell, 0, x)
        gone = varies.any() and cell[varies].all()
        refit.append(np.nan if gone else accuracy(held_out(ablated, ablated, classes, ridge)))
        frozen.append(accuracy(held_out(x, ablated, classes, ridge)))
    intact = accuracy(held_out(x, x, classes, ridge))
    return {"refit": np.array(refit), "frozen": np.array(frozen), "intact": intact}


def held_out(x: Array, read: Array, classes: Real, ridge: float) -> Array:
    """Prediction for each row of ``read`` (n, p) by the fit to all other rows of x, (n, k)."""
    n = len(x)
    kappa = ridge * np.sum(centered(x) ** 2) / n
    y = np.eye(classes.max() + 1)[classes]
    scores = np.empty_like(y)
    for i in range(n):
        rest = np.arange(n) != i
        a, mean = centered(x[rest]), x[rest].mean(axis=0)
        weights = a.T @ np.linalg.solve(a @ a.T + kappa * np.eye(n - 1), centered(y[rest]))
        scores[i] = y[rest].mean(axis=0) + (read[i] - mean) @ weights
    return scores
