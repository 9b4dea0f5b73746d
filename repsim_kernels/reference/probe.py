"""Linear decodability before and after every ablation, each held-out fit made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centered, contrasts, membership
from repsim_kernels.reference.logistic import newton


def ablation_decodability(
    x: Real,
    cells: Real,
    labels: Real,
    *,
    n_cells: int | None = None,
    target: int | Sequence[int] | None = None,
    ridge: float | str = 1.0,
    folds: Real | None = None,
    score: Sequence[str] | None = None,
    probe: str = "ridge",
) -> dict[str, Any]:
    """Held-out scores of a linear probe, {"refit": (C,), "frozen": (C,), "intact": ()}.

    Ridge regression on one-hot targets, or logistic regression of each class against the rest,
    with an unpenalised intercept, κ = ridge · ‖A‖²/n of all stimuli of the side that is fitted, one
    stimulus left out at a time or one of the folds (n,); the class is the largest of the outputs.
    ``refit`` is fitted and read on x with a cell's columns set to zero, ``frozen`` fitted on x and
    read on the stimuli with the cell's columns set to zero. With a target the columns are target
    and rest; with T of them every result has an axis (T,) in front. The score is the accuracy, with
    a target the balanced one; with a sequence of scores there is a dict of results for each.

    Refit is NaN for a cell of all columns that vary.
    """
    x = np.asarray(x, dtype=np.float64)
    one = target is None or np.asarray(target).ndim == 0
    several = [target] if one else list(np.asarray(target))
    tasks = [
        np.unique(labels if t is None else labels != t, return_inverse=True)[1] for t in several
    ]
    names = score or ("accuracy" if target is None else "balanced_accuracy",)
    found: dict[str, Any] = {}
    if isinstance(ridge, str):
        ridge = found["ridge"] = best_ridge(x, np.hstack([one_hot(task) for task in tasks]))
    fit = held_out if probe == "ridge" else held_out_logistic
    varies = (x != x[0]).any(axis=0)

    def outputs(task: Real) -> dict[str, list[Array]]:
        y, refit, frozen = one_hot(task), [], []
        for cell in membership(cells, n_cells):
            ablated = np.where(cell, 0, x)
            gone = varies.any() and cell[varies].all()
            nothing = np.full(y.shape, np.nan)
            refit.append(nothing if gone else fit(ablated, ablated, y, ridge, folds))
            frozen.append(fit(x, ablated, y, ridge, folds))
        return {"refit": refit, "frozen": frozen, "intact": [fit(x, x, y, ridge, folds)]}

    each = [(outputs(task), task) for task in tasks]
    for name in names:
        found[name] = {
            kind: np.array(
                [[scored(name, o, t, target is not None) for o in out[kind]] for out, t in each]
            )
            for kind in ("refit", "frozen", "intact")
        }
        found[name]["intact"] = found[name]["intact"][:, 0]
        if one:
            found[name] = {kind: values[0] for kind, values in found[name].items()}
    return found if score else found.pop(names[0]) | found


def one_hot(classes: Real) -> Array:
    """1 where a stimulus is of a class, (n, k)."""
    return np.eye(classes.max() + 1)[classes]


def scored(name: str, outputs: Array, classes: Real, one_class: bool) -> np.float64:
    """One score of outputs (n, k); NaN where they are."""
    if np.isnan(outputs).any():
        return np.float64(np.nan)
    y = one_hot(classes)
    if name == "r2":
        return np.float64(1 - np.sum((y - outputs) ** 2) / np.sum(centered(y) ** 2))
    if name == "margin":
        others = np.where(y == 1, -np.inf, outputs).max(axis=1)
        value = outputs[y == 1] - others
    else:
        value = outputs.argmax(axis=1) == classes
    if name == "balanced_accuracy" or (name == "margin" and one_class):
        return np.float64(np.mean([value[classes == k].mean() for k in range(y.shape[1])]))
    return np.float64(value.mean())


def best_ridge(x: Array, y: Array) -> np.float64:
    """The ridge of the least n ‖(I - H)Y‖² / tr(I - H)², H the hat matrix of x: 1e-6 … 1e6."""
    # The vector of ones, where I - H is 0, is left out: the criterion of a small ridge is 0 / 0.
    n, q = len(x), contrasts(len(x))
    a, y = q.T @ x, q.T @ y

    def criterion(exponent: float) -> float:
        kappa = 10**exponent * np.sum(a**2) / n
        left = kappa * np.linalg.inv(a @ a.T + kappa * np.eye(n - 1))
        return float(n * np.sum((left @ y) ** 2) / np.trace(left) ** 2)

    exponents = np.linspace(-6, 6, 121)
    for _ in range(7):
        best = int(np.argmin([criterion(e) for e in exponents]))
        answer = exponents[best]
        low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
        exponents = np.linspace(low, high, 21)
    return np.float64(10**answer)


def _parts(n: int, folds: Real | None) -> list[Real]:
    """Which stimuli are held out, of each fold."""
    fold = np.arange(n) if folds is None else folds
    return [fold == k for k in np.unique(fold)]


def held_out(x: Array, read: Array, y: Array, ridge: float, folds: Real | None = None) -> Array:
    """Prediction of y (n, k) for each row of ``read`` (n, p) by the fit without the row's fold."""
    n = len(x)
    kappa = ridge * np.sum(centered(x) ** 2) / n
    scores = np.empty_like(y)
    for held in _parts(n, folds):
        a, mean = centered(x[~held]), x[~held].mean(axis=0)
        weights = a.T @ np.linalg.solve(a @ a.T + kappa * np.eye(len(a)), centered(y[~held]))
        scores[held] = y[~held].mean(axis=0) + (read[held] - mean) @ weights
    return scores


def held_out_logistic(
    x: Array, read: Array, y: Array, ridge: float, folds: Real | None = None
) -> Array:
    """Decision values of one-hot y (n, k) for ``read`` (n, p), fitted without the row's fold."""
    n = len(x)
    kappa = ridge * np.sum(centered(x) ** 2) / n
    scores = np.empty_like(y)
    for held in _parts(n, folds):
        a, mean = centered(x[~held]), x[~held].mean(axis=0)
        # The weights are a combination of the stimuli: of min(n, p) directions.
        basis = np.linalg.qr(a.T).Q
        for k, t in enumerate(y[~held].T):
            if t.min() == t.max():
                scores[held, k] = np.inf if t[0] else -np.inf
            else:
                v, _, _ = newton(a @ basis, t, 1 / kappa, 1e-12, 100)
                scores[held, k] = (read[held] - mean) @ basis @ v[:-1] + v[-1]
    return scores
