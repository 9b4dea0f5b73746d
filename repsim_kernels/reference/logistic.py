"""Logistic regressions, fitted one after the other by Newton's method."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Array, Real


def logistic_fits(
    x: Real,
    *,
    targets: Real,
    columns: Real,
    C: float = 1.0,
    tol: float = 1e-10,
    max_iter: int = 100,
    start: tuple[Array, Array] | None = None,
) -> dict[str, Array]:
    """Fit targets (t, n) on columns (b, d) of x (n, p); coef is (b, t, d), the others (b, t)."""
    x = np.asarray(x, dtype=np.float64)
    (b, d), t = columns.shape, len(targets)
    out = {
        "coef": np.empty((b, t, d)),
        "intercept": np.empty((b, t)),
        "n_iter": np.empty((b, t), dtype=np.int64),
        "converged": np.empty((b, t), dtype=bool),
        "errors": np.empty((b, t), dtype=np.int64),
    }
    for i, j in np.ndindex(b, t):
        initial = None if start is None else np.append(start[0][i, j], start[1][i, j])
        v, steps, converged = newton(x[:, columns[i]], targets[j], C, tol, max_iter, initial)
        out["coef"][i, j], out["intercept"][i, j] = v[:-1], v[-1]
        out["n_iter"][i, j], out["converged"][i, j] = steps, converged
        out["errors"][i, j] = np.sum((x[:, columns[i]] @ v[:-1] + v[-1] > 0) != targets[j])
    return out


def newton(
    x: Array, y: Array, C: float, tol: float, max_iter: int, v: Array | None = None
) -> tuple[Array, int, bool]:
    """Minimise w·w / 2 + C Σᵢ log(1 + exp(-sᵢ (xᵢ·w + c))), where sᵢ is 1 if yᵢ and -1 otherwise.

    Returns (w, c), the number of steps, and whether the last step was at most tol of the largest
    coefficient. It stops without convergence if the Hessian is singular. Steps are halved until
    the objective no longer rises by more than rounding.
    """
    # Centred columns keep the Hessian well scaled even far from the optimum, where weights vanish.
    origin = x.mean(axis=0)
    a = np.column_stack([x - origin, np.ones(len(x))])
    penalised, flip = np.append(np.ones(x.shape[1]), 0), np.where(y, -1, 1)

    def value(v: Array) -> float:
        return float(C * np.sum(np.logaddexp(0, flip * (a @ v))) + np.sum(penalised * v**2) / 2)

    cold = np.append(np.zeros(x.shape[1]), np.log(y.mean() / (1 - y.mean())))
    v = cold if v is None else np.append(v[:-1], v[-1] + origin @ v[:-1])
    # At a start where all weights vanish the Hessian is singular, and a step may have any size.
    v = v if value(v) < value(cold) else cold
    converged, steps = False, 0
    while steps < max_iter and not converged:
        p_wrong = 1 / (1 + np.exp(np.clip(-flip * (a @ v), -500, 500)))
        gradient = C * a.T @ (flip * p_wrong) + penalised * v
        hessian = C * (a.T * (p_wrong * (1 - p_wrong))) @ a + np.diag(penalised)
        try:
            step = -np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:  # C is so large that rounding hides the penalty
            break
        before, size = value(v), 1.0
        while value(v + size * step) > before + 1e-12 * abs(before) and size > 1e-12:
            size /= 2
        v = v + size * step
        length, largest = np.abs(step), np.abs(v[:-1]).max()
        converged = bool(
            length[:-1].max() <= tol * largest and length[-1] <= tol * max(1, abs(v[-1]))
        )
        steps += 1
    return np.append(v[:-1], v[-1] - origin @ v[:-1]), steps, converged
