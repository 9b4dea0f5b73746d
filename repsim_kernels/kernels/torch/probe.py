"""Linear decodability of a representation and of its ablations, from their Gram matrices."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, are_partitions
from repsim_kernels.kernels.torch import cholesky, gram, panels
from repsim_kernels.kernels.torch.ablation_parts import (
    PASSES,
    CellParts,
    Passes,
    make_parts,
)
from repsim_kernels.kernels.torch.representation import to_complement

# Relative size below which a Newton step is the last: the remaining error is of the order of its
# square. Ten steps are many; only rounding, with a ridge near 0, keeps steps from becoming that
# small.
_LAST_STEP, _MAX_STEPS = 1e-8, 100
_ABLATED = "frozen", "refit"  # scores after an ablation
# Most outputs of the fits of several partitions that exist together: 512 MiB.
_OUTPUTS = 2**26


def ablation_decodability(
    x: Tensor,
    *,
    cells: Cells,
    n_cells: int,
    labels: np.ndarray,
    target: int | tuple[int, ...] | None,
    ridge: float | str,
    folds: np.ndarray | None,
    score: tuple[str, ...],
    probe: str,
    memory: int | None = None,
    grams: Tensor | None = None,
    passes: Passes = PASSES,
) -> dict[str, Any]:
    partitions = are_partitions(cells)
    paired = partitions and isinstance(target, tuple)  # each partition has its own target
    task = _Task(labels, target, x.device, output_sum=1 if probe == "ridge" else 0)
    fold_members = group_folds(np.arange(len(x)) if folds is None else folds, x.device)
    kind = _Ridge if probe == "ridge" else _Logistic
    relative: float | Tensor | str = ridge
    tables: list[tuple[dict[str, dict[str, Tensor]], int]] = []  # and their partitions
    for parts in make_parts(x, cells, n_cells, grams, passes, shifts=True, memory=memory):
        if isinstance(relative, str):  # "gcv"; one ridge for all partitions
            (relative,) = best_ridges(parts.whole, [to_complement(task.y)])
        fit = functools.partial(kind, relative=relative, fold_members=fold_members)
        size = parts.n_cells
        n_sets = len(parts.n_remaining) // size if partitions and size else 1
        # Ridge regressions on other partitions' targets cost little; logistic ones would not.
        sets_per_call = 1 if paired and probe == "logistic" else n_sets
        if paired:  # the outputs of each set on the targets of all
            sets_per_call = min(sets_per_call, max(1, math.isqrt(_OUTPUTS // (size * len(x)))))
        for start in range(0, n_sets, sets_per_call):
            sets = min(sets_per_call, n_sets - start)
            ablated = list(range(start * size, (start + sets) * size))
            done = sum(table_sets for _, table_sets in tables)
            own = task.select(slice(done, done + sets)) if paired else task
            table = _score_ablations(parts, ablated, own, fit, score, sets if paired else 1)
            tables.append((table, sets))
        del parts  # before the Grams of the next set are made
    if partitions:
        results = {
            name: {
                "intact": torch.cat([t[name]["intact"].expand(sets) for t, sets in tables]),
                **{
                    key: torch.cat([t[name][key].view(sets, n_cells) for t, sets in tables])
                    for key in _ABLATED
                },
            }
            for name in score
        }
    elif len(tables) == 1:
        results = tables[0][0]
    else:  # sparse cells
        results = {
            name: {
                "intact": tables[0][0][name]["intact"],
                **{key: torch.cat([t[name][key] for t, _ in tables], 1) for key in _ABLATED},
            }
            for name in score
        }
    if not partitions and not isinstance(target, tuple):
        results = {
            name: {key: values[0] for key, values in scores.items()}
            for name, scores in results.items()
        }
    return results | ({"ridge": relative} if ridge == "gcv" else {})


def _score_ablations(
    parts: CellParts,
    cells: list[int],
    task: _Task,
    fit: Callable[[Tensor, Tensor], _Ridge | _Logistic],
    score: tuple[str, ...],
    n_sets: int,
) -> dict[str, dict[str, Tensor]]:
    """Return each score of the task's classifications: "intact" (T,), the others (T, C).

    ``fit`` takes Grams (B, n, n) and targets. With ``n_sets`` above 1 the cells are those of as
    many partitions, and each of T = n_sets classifications is scored after ablations of its own.
    """
    original = fit(parts.whole[None], task.y)
    frozen, refit, infos = [], [], [original.info]
    for batch in gram.iter_batches(cells, parts.whole):
        rests = parts.rests(batch)
        frozen.append(original.predict(rests, parts.shift[panels.to_index(batch)]))
        left = [i for i, c in enumerate(batch) if parts.n_remaining[c]]
        refit.append(torch.full_like(frozen[-1], torch.nan))
        if len(left) == len(batch):
            fits = fit(rests, task.y)
            refit[-1] = fits.held_out
            infos.append(fits.info)
        elif left:
            index = panels.to_index(left)
            fits = fit(rests[index], task.y)
            refit[-1][index] = fits.held_out
            infos.append(fits.info)
    cholesky.raise_if_singular(torch.cat(infos))

    def join(outputs: list[Tensor]) -> Tensor:
        if not outputs:
            return original.held_out[:0]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if n_sets == 1:
            return joined
        return joined.unflatten(0, (n_sets, -1)).diagonal(dim1=0, dim2=3)

    results = {}
    for name in score:
        (intact,) = task.score(name, original.held_out).mT
        scores = {"intact": intact, "frozen": task.score(name, join(frozen))}
        outputs = join(refit)
        missing = outputs.isnan().any(1)  # (B, columns)
        missing = missing.mT if task.binary else missing.any(1)
        scores["refit"] = task.score(name, outputs).masked_fill_(missing, torch.nan)
        results[name] = scores
    return results


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
        self.truth = torch.from_numpy(truth).to(device, non_blocking=True)  # (T, n)
        kinds = torch.arange(int(truth.max()) + 1, device=device)
        self.onehot = (self.truth[..., None] == kinds).to(torch.float64)  # (T, n, classes)
        self.y = self.onehot[..., 1].mT if self.binary else self.onehot[0]  # (n, columns)

    def select(self, index: slice) -> _Task:
        """Return some of several binary classifications."""
        some = copy.copy(self)
        some.truth, some.onehot, some.y = self.truth[index], self.onehot[index], self.y[:, index]
        return some

    def score(self, name: str, outputs: Tensor) -> Tensor:
        """Return a score (T, B) of the outputs (B, n, columns)."""
        if self.binary:
            outputs = torch.stack([self.output_sum - outputs.mT, outputs.mT], -1)
        else:
            outputs = outputs[:, None]  # (B, T, n, classes)
        truth, onehot = self.truth, self.onehot
        is_true = onehot > 0
        if name == "r2":
            total = (onehot - onehot.mean(1, keepdim=True)).square().sum((-2, -1))
            return (1 - (onehot - outputs).square().sum((-2, -1)) / total).mT
        if name == "margin":
            true_output = torch.where(is_true, outputs, 0.0).sum(-1)
            value = true_output - outputs.masked_fill(is_true, -torch.inf).amax(-1)
        else:
            value = (outputs.argmax(-1) == truth).to(torch.float64)
        # Not a product with the mask, since margins may be infinite.
        sums = torch.where(is_true, value[..., None], 0.0).sum(-2)
        if name == "balanced_accuracy" or (name == "margin" and self.binary):
            return (sums / onehot.sum(1)).mean(-1).mT
        return (sums.sum(-1) / value.shape[-1]).mT


def group_folds(folds: np.ndarray, device: torch.device) -> list[Tensor]:
    """Group folds (n,) of equal size, and return the stimuli of each group: (folds, size)."""
    sizes = np.bincount(folds)
    members = np.split(np.argsort(folds, kind="stable"), sizes.cumsum()[:-1])
    return [
        torch.from_numpy(np.stack([m for m in members if len(m) == size])).to(
            device, non_blocking=True
        )
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
    """Turn residuals (…, n, m) of the fit to all stimuli into held-out residuals, in place.

    ``matrix`` (…, n, n) maps targets to the residuals of the fit to all stimuli.
    """
    for i in fold_members:
        block, held = matrix[..., i[:, :, None], i[:, None, :]], residuals[..., i, :]
        alone = i.shape[1] == 1
        residuals[..., i, :] = held / block if alone else torch.linalg.solve(block, held)
    return residuals


def _penalties(k: Tensor, relative: float | Tensor) -> Tensor:
    """Return κ for each Gram K (B, n, n)."""
    return relative * k.diagonal(dim1=1, dim2=2).sum(1) / k.shape[1]


class _Ridge:
    """Ridge regressions on each of the Grams K (B, n, n), one for each held-out fold."""

    def __init__(
        self, k: Tensor, y: Tensor, relative: float | Tensor, fold_members: list[Tensor]
    ) -> None:
        """Fit; the status of the factorisations is in ``info`` (B,), for the caller to check."""
        self.y, self.fold_members = y, fold_members
        kappa, regular = _penalties(k, relative), k.clone()
        regular.diagonal(dim1=1, dim2=2).add_(kappa[:, None])
        factor, self.info = torch.linalg.cholesky_ex(regular)
        self.weights = cholesky.invert(factor)
        matrix = kappa[:, None, None] * self.weights - 1 / len(y)
        self.residuals = hold_out(matrix, matrix @ y, fold_members)
        self.held_out = y - self.residuals  # (B, n, columns)

    def predict(self, rests: Tensor, shifts: Tensor) -> Tensor:
        """Return outputs (B, n, columns) of one fit for ablated stimuli, held out with their folds.

        Takes the Grams (B, n, n) of what remains after each ablation, and the shifts (B, n).
        """
        # The fit without a fold has the dual weights of a fit to all stimuli in which the held-out
        # predictions replace the targets of the fold.
        (weights,), (residuals,) = self.weights, self.residuals
        dual, dual_shifts = weights @ self.y, shifts @ weights
        out = self.y.mean(0) + rests @ dual - (shifts @ dual)[:, None, :]
        for i in self.fold_members:
            response = torch.einsum("bfsn,ftn->bfst", rests[:, i], weights[i])
            response += 1 / len(self.y) - dual_shifts[:, i][:, :, None, :]
            out[:, i] -= response @ residuals[i]
        return out


class _Logistic:
    """Logistic regressions on each Gram K (B, n, n) of each class against the rest, by fold."""

    def __init__(
        self, k: Tensor, y: Tensor, relative: float | Tensor, fold_members: list[Tensor]
    ) -> None:
        self.y, self.fold_members = y, fold_members
        self.info = torch.zeros(0, dtype=torch.int32, device=k.device)
        self.dual, self.offset = self._fit(k, _penalties(k, relative))
        self.held_out = self._apply(k, self.dual, self.offset)

    def _fit(self, k: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dual weights (B, folds, columns, n) and the offsets (B, folds, columns)."""
        ones = torch.ones_like(k[0])
        in_fit = torch.cat([ones[: len(i)].scatter(1, i, 0.0) for i in self.fold_members])
        share = (in_fit @ self.y) / in_fit.sum(1, keepdim=True)  # (folds, columns)
        # If all stimuli outside a fold are of one kind, nothing is fitted: the offset is infinite.
        offset = share.logit().repeat(len(k), 1, 1)
        dual = k.new_zeros(*offset.shape, k.shape[1])
        f, j = ((share > 0) & (share < 1)).nonzero().T
        per_cell = k.new_empty(max(1, len(f)) * k[0].numel(), device="meta")
        for cells in gram.iter_batches(list(range(len(k))), per_cell):
            some = panels.to_index(cells)
            for fits in gram.iter_batches(list(range(len(f))), k[some]):
                at = panels.to_index(fits)
                dual[some, f[at], j[at]], offset[some, f[at], j[at]] = _fit_by_newton(
                    k[some], self.y.T[j[at]], in_fit[f[at]], kappa[some], offset[some, f[at], j[at]]
                )
        return dual, offset

    def predict(self, rests: Tensor, shifts: Tensor) -> Tensor:
        """Return decision values (B, n, columns) of one fit, with the arguments of a `_Ridge`."""
        offset = self.offset - torch.einsum("fmn,bn->bfm", self.dual[0], shifts)
        return self._apply(rests, self.dual, offset)

    def _apply(self, k: Tensor, dual: Tensor, offset: Tensor) -> Tensor:
        out = k.new_empty(*k.shape[:2], dual.shape[2])
        sizes = [len(i) for i in self.fold_members]
        parts = zip(self.fold_members, dual.split(sizes, 1), offset.split(sizes, 1), strict=True)
        for i, weights, constant in parts:
            out[:, i] = k[:, i] @ weights.mT + constant[:, :, None, :]
        return out


def _fit_by_newton(
    k: Tensor, y: Tensor, in_fit: Tensor, kappa: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit F logistic regressions f = Kα + b to each K (B, n, n): α (B, F, n) and b (B, F).

    They minimise Σ log(1 + exp(-s f)) + κ/2 αᵀKα over the stimuli of ``in_fit`` (F, n). Steps solve
    with B = κI + W½KW½, which is well conditioned even where W is tiny.
    Source: Rasmussen & Williams 2006, algorithm 3.1.
    """
    sign, kappa = 2 * y - 1, kappa[:, None, None]
    b = offset[..., None]
    alpha = y.new_zeros(*offset.shape, k.shape[1])
    f = b.expand_as(alpha)
    objective = _objective(f, alpha, sign, in_fit, kappa)
    k_each = k[:, None]
    for _ in range(_MAX_STEPS):
        gradient = in_fit * sign * torch.sigmoid(-sign * f)
        w = in_fit * torch.sigmoid(f) * torch.sigmoid(-f)
        root = w.sqrt()[..., None]
        regular = root * k_each * root.mT
        regular.diagonal(dim1=-2, dim2=-1).add_(kappa)
        factor, info = torch.linalg.cholesky_ex(regular)
        sides = torch.stack([gradient - kappa * alpha, w], -1)
        solutions = sides - root * cholesky.solve(factor, root * (k_each @ sides))
        step_at_fixed_b, response_to_b = (solutions / kappa[..., None]).unbind(-1)
        step_b = step_at_fixed_b.sum(-1, keepdim=True) / response_to_b.sum(-1, keepdim=True)
        step = step_at_fixed_b - step_b * response_to_b
        step_f = step @ k + step_b
        size = torch.ones_like(b)
        while True:
            new = f + size * step_f, alpha + size * step
            value = _objective(*new, sign, in_fit, kappa)
            rises = value > objective + 1e-12 * (1 + objective)  # by more than rounding
            small = step_f.abs().amax(-1) <= _LAST_STEP * (1 + new[0].abs().amax(-1))
            any_rises, failed, all_small = torch.stack(
                [rises.any(), info.any(), small.all()]
            ).tolist()
            if failed:
                cholesky.raise_if_singular(info)
            if not any_rises:
                break
            size = torch.where(rises[..., None], size / 2, size)
        (f, alpha), b, objective = new, b + size * step_b, value
        if all_small:
            break
    return alpha, b[..., 0]


def _objective(f: Tensor, alpha: Tensor, sign: Tensor, in_fit: Tensor, kappa: Tensor) -> Tensor:
    """Return the objective of each regression, (B, F); α sums to 0, so that αᵀKα = αᵀf."""
    loss = torch.nn.functional.softplus(-sign * f, threshold=40)
    return (in_fit * loss).sum(-1) + kappa[..., 0] / 2 * (alpha * f).sum(-1)
