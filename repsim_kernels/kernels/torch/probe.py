"""Linear decodability of a representation and of its ablations, from their Gram matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.ablation import PASSES, CellParts, Passes
from repsim_kernels.kernels.torch.representation import to_complement

# Relative size below which a Newton step is the last: the remaining error is of the order of its
# square. Ten steps are many; only rounding, with a ridge near 0, keeps steps from becoming that
# small.
_LAST_STEP, _MAX_STEPS = 1e-8, 100


def ablation_decodability(
    x: Tensor,
    *,
    cells: np.ndarray,
    n_cells: int,
    labels: np.ndarray,
    target: int | tuple[int, ...] | None,
    ridge: float | str,
    folds: np.ndarray | None,
    score: tuple[str, ...],
    probe: str,
    passes: Passes = PASSES,
) -> dict[str, Any]:
    parts = CellParts(x, cells, n_cells, shifts=True, passes=passes)
    task = _Task(labels, target, x.device, output_sum=1 if probe == "ridge" else 0)
    relative = (
        best_ridges(parts.whole, [to_complement(task.y)])[0] if isinstance(ridge, str) else ridge
    )
    fold_members = group_folds(np.arange(len(x)) if folds is None else folds, x.device)

    def fit(k: Tensor) -> _Ridge | _Logistic:
        kappa = relative * k.trace() / len(k)
        return (_Ridge if probe == "ridge" else _Logistic)(k, task.y, kappa, fold_members)

    nan = torch.full((len(task.truth), n_cells), torch.nan, dtype=torch.float64, device=x.device)
    results = {name: {"refit": nan.clone(), "frozen": nan.clone()} for name in score}
    whole = fit(parts.whole)
    for c in range(n_cells):
        rest = parts.rest(c)
        outputs = {"frozen": whole.predict(rest, parts.shift[c])}
        if parts.n_remaining[c]:
            outputs["refit"] = fit(rest).held_out
        for kind, values in outputs.items():
            for name, scores in task.score(values, score).items():
                results[name][kind][:, c] = scores
    for name, scores in task.score(whole.held_out, score).items():
        results[name]["intact"] = scores
    if target is None or isinstance(target, int):
        results = {name: {k: v[0] for k, v in kinds.items()} for name, kinds in results.items()}
    return results | ({"ridge": relative} if ridge == "gcv" else {})


class _Task:
    """A classification of all classes, or T binary ones of one class against the rest."""

    def __init__(
        self, labels: np.ndarray, target: Any, device: torch.device, output_sum: int
    ) -> None:
        """``output_sum``: of a class and the rest; only the output of the class is fitted."""
        if target is None:
            truth = np.unique(labels, return_inverse=True)[1][None]
        else:
            truth = (labels == np.reshape(target, (-1, 1))).astype(np.int64)
        self.binary, self.output_sum = target is not None, output_sum
        self.truth = torch.from_numpy(truth).to(device)  # (T, n)
        self.onehot = torch.nn.functional.one_hot(self.truth).to(torch.float64)  # (T, n, classes)
        self.y = self.onehot[..., 1].mT if self.binary else self.onehot[0]  # (n, columns)

    def score(self, outputs: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return each score (T,) of outputs (n, columns)."""
        if self.binary:
            outputs = torch.stack([self.output_sum - outputs.mT, outputs.mT], -1)
        else:
            outputs = outputs[None]
        return {name: self._score(name, outputs) for name in names}

    def _score(self, name: str, outputs: Tensor) -> Tensor:
        is_true = self.onehot > 0
        if name == "r2":
            total = (self.onehot - self.onehot.mean(1, keepdim=True)).square().sum((1, 2))
            return 1 - (self.onehot - outputs).square().sum((1, 2)) / total
        if name == "margin":
            true_output = outputs.gather(2, self.truth[..., None])[..., 0]
            value = true_output - outputs.masked_fill(is_true, -torch.inf).amax(2)
        else:
            value = (outputs.argmax(2) == self.truth).to(torch.float64)
        # Not a product with the mask, since margins may be infinite.
        sums = torch.where(is_true, value[..., None], 0.0).sum(1)
        if name == "balanced_accuracy" or (name == "margin" and self.binary):
            return (sums / self.onehot.sum(1)).mean(1)
        return sums.sum(1) / value.shape[1]


def group_folds(folds: np.ndarray, device: torch.device) -> list[Tensor]:
    """Group folds (n,) of equal size, and return the stimuli of each group: (folds, size)."""
    sizes = np.bincount(folds)
    members = np.split(np.argsort(folds, kind="stable"), sizes.cumsum()[:-1])
    return [
        torch.from_numpy(np.stack([m for m in members if len(m) == size])).to(device)
        for size in np.unique(sizes)
    ]


def best_ridges(k: Tensor, ys: list[Tensor]) -> list[Tensor]:
    """Return the relative ridge that minimises n ‖(I - H)Y‖² / tr(I - H)² for each Y.

    Each Y is passed as QᵀY, with Q the basis of `to_complement`, or as any factor of QᵀYYᵀQ.
    """
    w, u = torch.linalg.eigh(to_complement(to_complement(k).mT))
    return [_best_ridge(k, w.clamp(min=0), (u.mT @ y).square().sum(1)) for y in ys]


def _best_ridge(k: Tensor, w: Tensor, energy: Tensor) -> Tensor:
    """Search the ridge, given the eigenvalues w (n - 1,) of K and the energy of Y along each."""
    exponents = torch.linspace(-6, 6, 121, dtype=k.dtype, device=k.device)
    for _ in range(7):  # to 1e-7, where the criterion no longer changes
        kappa = 10 ** exponents[:, None] * k.trace() / len(k)
        residual = kappa / (w + kappa)
        best = int(((residual.square() @ energy) / residual.sum(1).square()).argmin())
        low, high = (exponents[i] for i in (max(best - 1, 0), min(best + 1, len(exponents) - 1)))
        answer = 10 ** exponents[best]
        exponents = low + (high - low) * torch.linspace(0, 1, 21, dtype=k.dtype, device=k.device)
    return answer


def hold_out(matrix: Tensor, residuals: Tensor, fold_members: list[Tensor]) -> Tensor:
    """Turn residuals (n, m) of the fit to all stimuli into held-out residuals, in place.

    ``matrix`` (n, n) maps targets to the residuals of the fit to all stimuli.
    """
    for i in fold_members:
        block = matrix[i[:, :, None], i[:, None, :]]
        residuals[i] = torch.linalg.solve(block, residuals[i])
    return residuals


class _Ridge:
    """Ridge regressions on a Gram K (n, n), one for each held-out fold."""

    def __init__(self, k: Tensor, y: Tensor, kappa: Tensor, fold_members: list[Tensor]) -> None:
        n = len(k)
        regular = k + kappa * torch.eye(n, dtype=k.dtype, device=k.device)
        self.weights = torch.cholesky_inverse(torch.linalg.cholesky(regular))
        self.y, self.fold_members = y, fold_members
        matrix = kappa * self.weights - 1 / n
        self.residuals = hold_out(matrix, matrix @ y, fold_members)
        self.held_out = y - self.residuals

    def predict(self, rest: Tensor, shift: Tensor) -> Tensor:
        """Return the outputs (n, columns) for ablated stimuli, each held out with its fold."""
        # The fit without a fold has the dual weights of a fit to all stimuli in which the held-out
        # predictions replace the targets of the fold.
        dual, dual_shift = self.weights @ self.y, self.weights @ shift
        out = self.y.mean(0) + rest @ dual - shift @ dual
        for i in self.fold_members:
            response = rest[i] @ self.weights[i].mT - dual_shift[i][:, None, :] + 1 / len(rest)
            out[i] -= response @ self.residuals[i]
        return out


class _Logistic:
    """Logistic regressions on a Gram K (n, n) of each class against the rest, for each fold."""

    def __init__(self, k: Tensor, y: Tensor, kappa: Tensor, fold_members: list[Tensor]) -> None:
        self.fold_members, self.sizes = fold_members, [len(i) for i in fold_members]
        ones = torch.ones_like(k)
        in_fit = torch.cat([ones[: len(i)].scatter(1, i, 0.0) for i in fold_members])  # (folds, n)
        share = (in_fit @ y) / in_fit.sum(1, keepdim=True)  # (folds, columns)
        # If all stimuli outside a fold are of one kind, nothing is fitted: the offset is infinite.
        self.offset = share.logit()
        self.dual = k.new_zeros(*share.shape, len(k))
        fits = ((share > 0) & (share < 1)).nonzero()
        for batch in gram.iter_batches(list(range(len(fits))), k):
            f, j = fits[batch].T
            self.dual[f, j], self.offset[f, j] = _fit_by_newton(
                k, y.T[j], in_fit[f], kappa, self.offset[f, j]
            )
        self.held_out = self.predict(k, k.new_zeros(len(k)))

    def predict(self, rest: Tensor, shift: Tensor) -> Tensor:
        """Return decision values (n, columns) for ablated stimuli, held out with their folds."""
        out = rest.new_empty(len(rest), self.dual.shape[1])
        offsets = (self.offset - self.dual @ shift).split(self.sizes)
        duals = self.dual.split(self.sizes)
        for i, dual, offset in zip(self.fold_members, duals, offsets, strict=True):
            out[i] = rest[i] @ dual.mT + offset[:, None, :]
        return out


def _fit_by_newton(
    k: Tensor, y: Tensor, in_fit: Tensor, kappa: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit m logistic regressions f = Kα + b: dual weights α (m, n) and offsets b (m,).

    They minimise Σ log(1 + exp(-s f)) + κ/2 αᵀKα over the stimuli of ``in_fit`` (m, n). Steps solve
    with B = κI + W½KW½, which is well conditioned even where W is tiny.
    Source: Rasmussen & Williams 2006, algorithm 3.1.
    """
    sign = 2 * y - 1
    alpha, b = torch.zeros_like(y), offset[:, None]
    f = b.expand_as(y)
    objective = _objective(f, alpha, sign, in_fit, kappa)
    eye = kappa * torch.eye(len(k), dtype=k.dtype, device=k.device)
    for _ in range(_MAX_STEPS):
        gradient = in_fit * sign * torch.sigmoid(-sign * f)
        w = in_fit * torch.sigmoid(f) * torch.sigmoid(-f)
        root = w.sqrt()[..., None]
        factor = torch.linalg.cholesky(eye + root * k * root.mT)
        sides = torch.stack([gradient - kappa * alpha, w], -1)
        solutions = sides - root * torch.cholesky_solve(root * (k @ sides), factor)
        step_at_fixed_b, response_to_b = (solutions / kappa).unbind(-1)
        step_b = step_at_fixed_b.sum(1, keepdim=True) / response_to_b.sum(1, keepdim=True)
        step = step_at_fixed_b - step_b * response_to_b
        step_f = step @ k + step_b
        size = torch.ones_like(b)
        while True:
            new = f + size * step_f, alpha + size * step
            value = _objective(*new, sign, in_fit, kappa)
            rises = value > objective + 1e-12 * (1 + objective)  # by more than rounding
            if not rises.any():
                break
            size = torch.where(rises[:, None], size / 2, size)
        (f, alpha), b, objective = new, b + size * step_b, value
        if (step_f.abs().amax(1) <= _LAST_STEP * (1 + f.abs().amax(1))).all():
            break
    return alpha, b[:, 0]


def _objective(f: Tensor, alpha: Tensor, sign: Tensor, in_fit: Tensor, kappa: Tensor) -> Tensor:
    """Return the objective of each regression, (m,); α sums to 0, so that αᵀKα = αᵀf."""
    loss = torch.nn.functional.softplus(-sign * f, threshold=40)
    return (in_fit * loss).sum(1) + kappa / 2 * (alpha * f).sum(1)
