"""Linear decodability of a representation and of its ablations, from their Grams."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.ablation import PASSES, CellParts, Passes
from repsim_kernels.kernels.torch.representation import to_complement

# A Newton step of this size is the last: what is left is of the order of its square. Ten steps are
# many; only rounding, with a ridge near 0, keeps steps from becoming as small as this.
_LAST, _STEPS = 1e-8, 100


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
    task = _Task(labels, target, x.device, rest=1 if probe == "ridge" else 0)
    relative = (
        best_ridges(parts.whole, [to_complement(task.y)])[0] if isinstance(ridge, str) else ridge
    )
    held = fold_groups(np.arange(len(x)) if folds is None else folds, x.device)

    def fitted(k: Tensor) -> _Ridge | _Logistic:
        kappa = relative * k.trace() / len(k)
        return (_Ridge if probe == "ridge" else _Logistic)(k, task.y, kappa, held)

    nan = torch.full((len(task.truth), n_cells), torch.nan, dtype=torch.float64, device=x.device)
    found = {name: {"refit": nan.clone(), "frozen": nan.clone()} for name in score}
    whole = fitted(parts.whole)
    for c in range(n_cells):
        rest = parts.rest(c)
        outputs = {"frozen": whole.read(rest, parts.shift[c])}
        if parts.n_remaining[c]:
            outputs["refit"] = fitted(rest).held_out
        for kind, values in outputs.items():
            for name, scored in task.scores(values, score).items():
                found[name][kind][:, c] = scored
    for name, scored in task.scores(whole.held_out, score).items():
        found[name]["intact"] = scored
    if target is None or isinstance(target, int):
        found = {name: {k: v[0] for k, v in kinds.items()} for name, kinds in found.items()}
    return found | ({"ridge": relative} if ridge == "gcv" else {})


class _Task:
    """Telling all classes apart, or each of T classes from the rest."""

    def __init__(self, labels: np.ndarray, target: Any, device: torch.device, rest: int) -> None:
        """rest: the sum of the outputs of a class and of the rest, of which one is fitted."""
        if target is None:
            truth = np.unique(labels, return_inverse=True)[1][None]
        else:
            truth = (labels == np.reshape(target, (-1, 1))).astype(np.int64)
        self.one, self.rest = target is not None, rest
        self.truth = torch.from_numpy(truth).to(device)  # (T, n)
        self.onehot = torch.nn.functional.one_hot(self.truth).to(torch.float64)  # (T, n, classes)
        self.y = self.onehot[..., 1].mT if self.one else self.onehot[0]  # (n, columns)

    def scores(self, fitted: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Each score (T,) of the outputs (n, columns)."""
        outputs = torch.stack([self.rest - fitted.mT, fitted.mT], -1) if self.one else fitted[None]
        return {name: self._score(name, outputs) for name in names}

    def _score(self, name: str, outputs: Tensor) -> Tensor:
        is_true = self.onehot > 0
        if name == "r2":
            apart = (self.onehot - self.onehot.mean(1, keepdim=True)).square().sum((1, 2))
            return 1 - (self.onehot - outputs).square().sum((1, 2)) / apart
        if name == "margin":
            own = outputs.gather(2, self.truth[..., None])[..., 0]
            value = own - outputs.masked_fill(is_true, -torch.inf).amax(2)
        else:
            value = (outputs.argmax(2) == self.truth).to(torch.float64)
        sums = torch.where(is_true, value[..., None], 0.0).sum(1)  # a margin may be infinite
        if name == "balanced_accuracy" or (name == "margin" and self.one):
            return (sums / self.onehot.sum(1)).mean(1)
        return sums.sum(1) / value.shape[1]


def fold_groups(folds: np.ndarray, device: torch.device) -> list[Tensor]:
    """The stimuli of each fold (n,), of one size of fold at a time: (folds, size) each."""
    sizes = np.bincount(folds)
    members = np.split(np.argsort(folds, kind="stable"), sizes.cumsum()[:-1])
    return [
        torch.from_numpy(np.stack([m for m in members if len(m) == size])).to(device)
        for size in np.unique(sizes)
    ]


def best_ridges(k: Tensor, ys: list[Tensor]) -> list[Tensor]:
    """The relative ridge of the least n ‖(I - H)Y‖² / tr(I - H)² for each Y, given as QᵀY.

    Q is the basis of `to_complement`; any factor of QᵀYYᵀQ gives the same.
    """
    w, u = torch.linalg.eigh(to_complement(to_complement(k).mT))
    return [_best_ridge(k, w.clamp(min=0), (u.mT @ y).square().sum(1)) for y in ys]


def _best_ridge(k: Tensor, w: Tensor, energy: Tensor) -> Tensor:
    """Search along w (n - 1,), the eigenvalues of K, and the energy of Y in each eigenvector."""
    exponents = torch.linspace(-6, 6, 121, dtype=k.dtype, device=k.device)
    for _ in range(7):  # to 1e-7, where the criterion no longer changes
        kappa = 10 ** exponents[:, None] * k.trace() / len(k)
        left = kappa / (w + kappa)
        best = int(((left.square() @ energy) / left.sum(1).square()).argmin())
        low, high = (exponents[i] for i in (max(best - 1, 0), min(best + 1, len(exponents) - 1)))
        answer = 10 ** exponents[best]
        exponents = low + (high - low) * torch.linspace(0, 1, 21, dtype=k.dtype, device=k.device)
    return answer


def hold_out(residual: Tensor, missed: Tensor, held: list[Tensor]) -> Tensor:
    """Turn residuals of the fit to all stimuli into those of the fits without each one's fold.

    In place: missed (n, m) holds them, residual (n, n) is the matrix that makes them from targets.
    """
    for i in held:
        block = residual[i[:, :, None], i[:, None, :]]
        missed[i] = torch.linalg.solve(block, missed[i])
    return missed


class _Ridge:
    """Ridge regressions on a Gram K (n, n), each without one fold."""

    def __init__(self, k: Tensor, y: Tensor, kappa: Tensor, held: list[Tensor]) -> None:
        n = len(k)
        regular = k + kappa * torch.eye(n, dtype=k.dtype, device=k.device)
        self.weights = torch.cholesky_inverse(torch.linalg.cholesky(regular))
        self.y, self.held = y, held
        residual = kappa * self.weights - 1 / n
        self.missed = hold_out(residual, residual @ y, held)
        self.held_out = y - self.missed

    def read(self, rest: Tensor, shift: Tensor) -> Tensor:
        """Outputs (n, columns) for the ablated stimuli of each fold."""
        # The reader that was fitted without a fold has its own dual weights: those of all stimuli
        # with the held-out predictions in the place of the fold's targets.
        dual, moved = self.weights @ self.y, self.weights @ shift
        out = self.y.mean(0) + rest @ dual - shift @ dual
        for i in self.held:
            own = rest[i] @ self.weights[i].mT - moved[i][:, None, :] + 1 / len(rest)
            out[i] -= own @ self.missed[i]
        return out


class _Logistic:
    """Logistic regressions on a Gram K (n, n), of each class against the rest without one fold."""

    def __init__(self, k: Tensor, y: Tensor, kappa: Tensor, held: list[Tensor]) -> None:
        self.held, self.sizes = held, [len(i) for i in held]
        ones = torch.ones_like(k)
        kept = torch.cat([ones[: len(i)].scatter(1, i, 0.0) for i in held])  # (folds, n)
        share = (kept @ y) / kept.sum(1, keepdim=True)  # (folds, columns)
        # Without a fold that has all of a class, or all but it, nothing is to be learnt.
        self.offset = share.logit()
        self.dual = k.new_zeros(*share.shape, len(k))
        fits = ((share > 0) & (share < 1)).nonzero()
        for batch in gram.iter_batches(list(range(len(fits))), k):
            f, j = fits[batch].T
            self.dual[f, j], self.offset[f, j] = _newton(
                k, y.T[j], kept[f], kappa, self.offset[f, j]
            )
        self.held_out = self.read(k, k.new_zeros(len(k)))

    def read(self, rest: Tensor, shift: Tensor) -> Tensor:
        """Decision values (n, columns) for the ablated stimuli of each fold."""
        out = rest.new_empty(len(rest), self.dual.shape[1])
        offsets = (self.offset - self.dual @ shift).split(self.sizes)
        for i, dual, offset in zip(self.held, self.dual.split(self.sizes), offsets, strict=True):
            out[i] = rest[i] @ dual.mT + offset[:, None, :]
        return out


def _newton(
    k: Tensor, y: Tensor, kept: Tensor, kappa: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Dual weights α (m, n) and offsets b (m,) of m logistic regressions, f = Kα + b.

    They minimise Σ log(1 + exp(-s f)) + κ/2 αᵀKα, over the stimuli that are kept. Steps solve with
    B = κI + W½KW½, well conditioned however small W is (Rasmussen & Williams 2006, algorithm 3.1).
    """
    sign = 2 * y - 1
    alpha, b = torch.zeros_like(y), offset[:, None]
    f = b.expand_as(y)
    objective = _objective(f, alpha, sign, kept, kappa)
    eye = kappa * torch.eye(len(k), dtype=k.dtype, device=k.device)
    for _ in range(_STEPS):
        gradient = kept * sign * torch.sigmoid(-sign * f)
        w = kept * torch.sigmoid(f) * torch.sigmoid(-f)
        root = w.sqrt()[..., None]
        factor = torch.linalg.cholesky(eye + root * k * root.mT)
        sides = torch.stack([gradient - kappa * alpha, w], -1)
        solved = sides - root * torch.cholesky_solve(root * (k @ sides), factor)
        towards, along = (solved / kappa).unbind(-1)
        step_b = towards.sum(1, keepdim=True) / along.sum(1, keepdim=True)
        step = towards - step_b * along
        step_f = step @ k + step_b
        size = torch.ones_like(b)
        while True:
            new = f + size * step_f, alpha + size * step
            value = _objective(*new, sign, kept, kappa)
            risen = value > objective + 1e-12 * (1 + objective)  # by more than rounding
            if not risen.any():
                break
            size = torch.where(risen[:, None], size / 2, size)
        (f, alpha), b, objective = new, b + size * step_b, value
        if (step_f.abs().amax(1) <= _LAST * (1 + f.abs().amax(1))).all():
            break
    return alpha, b[:, 0]


def _objective(f: Tensor, alpha: Tensor, sign: Tensor, kept: Tensor, kappa: Tensor) -> Tensor:
    """What the regressions minimise, (m,); α sums to 0, so that αᵀKα = αᵀf."""
    loss = torch.nn.functional.softplus(-sign * f, threshold=40)
    return (kept * loss).sum(1) + kappa / 2 * (alpha * f).sum(1)
