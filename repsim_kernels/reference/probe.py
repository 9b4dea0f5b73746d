"""Linear decodability before and after each ablation, from an explicit fit for each fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repsim_kernels._cell_sets import Cells
from repsim_kernels.reference.gram import Array, Real, centre, contrasts, membership
from repsim_kernels.reference.logistic import newton


def ablation_decodability(
    x: Real,
    cells: Cells,
    labels: Real,
    *,
    n_cells: int | None = None,
    target: int | Sequence[int] | None = None,
    ridge: float | str = 1.0,
    folds: Real | None = None,
    score: Sequence[str] | None = None,
    probe: str = "ridge",
    memory: int | None = None,
    grams: Real | None = None,
) -> dict[str, Any]:
    """Return held-out scores of a linear probe, {"refit": (C,), "frozen": (C,), "intact": ()}.

    The probe is ridge regression on one-hot targets, or logistic regression of each class against
    the rest, with an unpenalised intercept and κ = ridge · ‖A‖²/n for all stimuli of the centred A
    that it is fitted on. Stimuli are held out one by one, or by ``folds`` (n,). The predicted class
    has the largest output. ``refit`` fits and tests on x with a cell's columns set to zero;
    ``frozen`` fits on x and tests on stimuli with the cell's columns set to zero. With a target the
    classes are target and rest; with T targets every result has a leading axis (T,), as with T
    partitions of neurons into cells (T, p), each of which has its own target if there are several.
    The score is accuracy, or balanced accuracy with a target; with a sequence of scores the result
    is a dict for each.

    ``refit`` is NaN for a cell with all varying columns. ``memory`` and ``grams`` are ignored.
    """
    x = np.asarray(x, dtype=np.float64)
    is_single = target is None or np.asarray(target).ndim == 0
    targets = [target] if is_single else list(np.asarray(target))
    tasks = [
        np.unique(labels if t is None else labels != t, return_inverse=True)[1] for t in targets
    ]
    names = score or ("accuracy" if target is None else "balanced_accuracy",)
    results: dict[str, Any] = {}
    if isinstance(ridge, str):
        ridge = results["ridge"] = find_best_ridge(
            x, np.hstack([encode_one_hot(task) for task in tasks])
        )
    predict = predict_held_out if probe == "ridge" else predict_held_out_logistic
    varies = (x != x[0]).any(axis=0)

    def outputs(task: Real, members: Real) -> dict[str, list[Array]]:
        y, refit, frozen = encode_one_hot(task), [], []
        for cell in members:
            ablated = np.where(cell, 0, x)
            removes_all = varies.any() and cell[varies].all()
            undefined = np.full(y.shape, np.nan)
            refit.append(undefined if removes_all else predict(ablated, ablated, y, ridge, folds))
            frozen.append(predict(x, ablated, y, ridge, folds))
        return {"refit": refit, "frozen": frozen, "intact": [predict(x, x, y, ridge, folds)]}

    members = membership(cells, n_cells)
    if members.ndim == 3:  # partitions
        tasks = tasks * len(members) if len(tasks) == 1 else tasks
        by_task = [(outputs(*pair), pair[0]) for pair in zip(tasks, members, strict=True)]
    else:
        by_task = [(outputs(task, members), task) for task in tasks]
    for name in names:
        results[name] = {
            kind: np.array(
                [
                    [score_outputs(name, o, t, target is not None) for o in out[kind]]
                    for out, t in by_task
                ]
            )
            for kind in ("refit", "frozen", "intact")
        }
        results[name]["intact"] = results[name]["intact"][:, 0]
        if is_single and members.ndim == 2:
            results[name] = {kind: values[0] for kind, values in results[name].items()}
    return results if score else results.pop(names[0]) | results


def encode_one_hot(classes: Real) -> Array:
    """Return the one-hot encoding of class indices, (n, k)."""
    return np.eye(classes.max() + 1)[classes]


def score_outputs(name: str, outputs: Array, classes: Real, binary: bool) -> np.float64:
    """Return one score of outputs (n, k), or NaN if they contain NaN."""
    if np.isnan(outputs).any():
        return np.float64(np.nan)
    y = encode_one_hot(classes)
    if name == "r2":
        return np.float64(1 - np.sum((y - outputs) ** 2) / np.sum(centre(y) ** 2))
    if name == "margin":
        others = np.where(y == 1, -np.inf, outputs).max(axis=1)
        value = outputs[y == 1] - others
    else:
        value = outputs.argmax(axis=1) == classes
    if name == "balanced_accuracy" or (name == "margin" and binary):
        return np.float64(np.mean([value[classes == k].mean() for k in range(y.shape[1])]))
    return np.float64(value.mean())


def find_best_ridge(x: Array, y: Array) -> np.float64:
    """Return the ridge in 1e-6 … 1e6 that minimises n ‖(I - H)Y‖² / tr(I - H)².

    H is the hat matrix of x.
    """
    # The vector of ones is removed: I - H is 0 on it, and small ridges would lead to 0 / 0.
    n, q = len(x), contrasts(len(x))
    a, y = q.T @ x, q.T @ y

    def criterion(exponent: float) -> float:
        kappa = 10**exponent * np.sum(a**2) / n
        residual = kappa * np.linalg.inv(a @ a.T + kappa * np.eye(n - 1))
        return float(n * np.sum((residual @ y) ** 2) / np.trace(residual) ** 2)

    exponents = np.linspace(-6, 6, 121)
    for _ in range(7):
        best = int(np.argmin([criterion(e) for e in exponents]))
        exponent = exponents[best]
        low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
        exponents = np.linspace(low, high, 21)
    return np.float64(10**exponent)


def _make_fold_masks(n: int, folds: Real | None) -> list[Real]:
    """Return a mask of the stimuli that each fold holds out; without ``folds``, one each."""
    fold = np.arange(n) if folds is None else folds
    return [fold == k for k in np.unique(fold)]


def predict_held_out(
    x: Array, x_test: Array, y: Array, ridge: float, folds: Real | None = None
) -> Array:
    """Predict y (n, k) for each row of ``x_test`` (n, p), by a fit to x without the row's fold."""
    n = len(x)
    kappa = ridge * np.sum(centre(x) ** 2) / n
    outputs = np.empty_like(y)
    for test in _make_fold_masks(n, folds):
        a, mean = centre(x[~test]), x[~test].mean(axis=0)
        weights = a.T @ np.linalg.solve(a @ a.T + kappa * np.eye(len(a)), centre(y[~test]))
        outputs[test] = y[~test].mean(axis=0) + (x_test[test] - mean) @ weights
    return outputs


def predict_held_out_logistic(
    x: Array, x_test: Array, y: Array, ridge: float, folds: Real | None = None
) -> Array:
    """Return decision values for one-hot y (n, k), held out as in `predict_held_out`."""
    n = len(x)
    kappa = ridge * np.sum(centre(x) ** 2) / n
    outputs = np.empty_like(y)
    for test in _make_fold_masks(n, folds):
        a, mean = centre(x[~test]), x[~test].mean(axis=0)
        # The weights are combinations of the stimuli, which span min(n, p) directions.
        basis = np.linalg.qr(a.T).Q
        for k, t in enumerate(y[~test].T):
            if t.min() == t.max():
                outputs[test, k] = np.inf if t[0] else -np.inf
            else:
                v, _, _ = newton(a @ basis, t, 1 / kappa, 1e-12, 100)
                outputs[test, k] = (x_test[test] - mean) @ basis @ v[:-1] + v[-1]
    return outputs
