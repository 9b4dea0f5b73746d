"""Every metric between a representation and each of its ablations, from one pass over it.

Symbols as in METRICS, "One original, many ablations": L = V diag(v) Vᵀ the original's Gram, G_c
that of a cell, K_c = L - G_c the ablated one. What needs a spectrum lives in the basis V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import cka, gram
from repsim_kernels.kernels.torch.cca import leading, variate_weights
from repsim_kernels.kernels.torch.spectrum import Representation, from_complement, positive

# Elements of a batch of Grams that passes through the cache together.
_BATCH = 2**17
_MEMORY = 2**30


@dataclass(frozen=True)
class Passes:
    """What reads all of x: the Grams of its cells, and the weights of directions."""

    cell_sums: Callable[[Tensor, np.ndarray, int, bool], tuple[Tensor, Tensor, Tensor]]
    variate_weights: Callable[[Tensor, Tensor], Tensor]


PASSES = Passes(gram.cell_sums, variate_weights)


@dataclass
class Cells:
    """The Grams of the cells of x (n, p), and of what is left without each."""

    x: Tensor
    cells: np.ndarray
    n_cells: int
    shifts: bool = False  # whether `shift` is wanted, B_c μ_c for each cell (C, n)
    passes: Passes = PASSES

    def __post_init__(self) -> None:
        x, c, sums = self.x, self.n_cells, self.passes.cell_sums
        if self.cells.ndim == 1:
            # The neurons in no cell make one more, so that one pass gives the whole as well.
            labels = np.where(self.cells < 0, c, self.cells)
            g, live, shift = sums(x, labels, c + 1, self.shifts)
            self.whole, alive = g.sum(0), live.sum()
        else:
            g, live, shift = sums(x, self.cells, c, self.shifts)
            whole, total, _ = sums(x, np.zeros(x.shape[1], dtype=np.int64), 1, False)
            self.whole, alive = whole[0], total[0]
        self.grams, self.shift = g[:c], shift[:c]
        self.left = (alive - live[:c]).tolist()
        self.dead = (live[:c] == 0).tolist()
        share = self.grams.diagonal(dim1=1, dim2=2).sum(1) / self.whole.diagonal().sum()
        self.heavy = (share > 0.5).tolist()

    @property
    def active(self) -> list[int]:
        """The cells that change the representation and leave something of it."""
        return [c for c in range(self.n_cells) if self.left[c] and not self.dead[c]]

    def outside(self, c: int) -> Tensor:
        """The columns of x that are not in a cell."""
        inside = self.cells == c if self.cells.ndim == 1 else self.cells[c]
        return gram.take(self.x, torch.from_numpy(np.flatnonzero(~inside)).to(self.x.device))

    def rest(self, c: int) -> Tensor:
        """K_c; where a cell holds most of the energy, by a pass: the difference would cancel."""
        return gram.linear(self.outside(c)) if self.heavy[c] else self.whole - self.grams[c]


def ablation_distances(
    x: Tensor,
    *,
    cells: np.ndarray,
    n_cells: int,
    metrics: tuple[str, ...],
    ridge: float,
    penalty: float,
    memory: int | None,
    passes: Passes = PASSES,
) -> dict[str, Tensor]:
    parts = Cells(x, cells, n_cells, passes=passes)
    out = {m: torch.zeros(n_cells, dtype=torch.float64, device=x.device) for m in metrics}
    for name in ("cka", "cka_debiased"):
        if name in metrics:
            _cka_distances(parts, name == "cka_debiased", out[name])
    if set(metrics) - {"cka", "cka_debiased"}:
        _spectral_distances(_Original(parts, ridge, penalty), out, memory or _MEMORY)
    nothing = [c for c in range(n_cells) if not parts.left[c]]
    for values in out.values():
        values[nothing] = torch.nan
    return out


def _cka_distances(parts: Cells, debiased: bool, out: Tensor) -> None:
    def prepared(k: Tensor) -> Tensor:
        return gram.u_centre(k) if debiased else k

    whole, floor = prepared(parts.whole), cka.rounding(parts.whole)
    light = [c for c in parts.active if not parts.heavy[c]]
    size = max(1, _BATCH // whole.numel())
    for start in range(0, len(light), size):
        batch = light[start : start + size]
        out[batch] = cka.cosine_distance(prepared(parts.grams[batch]), whole, False, floor)
    for c in parts.active:
        if parts.heavy[c]:
            rest = parts.rest(c)
            out[c] = cka.cosine_distance(prepared(rest)[None], whole, True, cka.rounding(rest))[0]


@dataclass
class _Original:
    """The original in its eigenbasis, with what a ridge makes of it."""

    parts: Cells
    ridge: float
    penalty: float

    def __post_init__(self) -> None:
        original = Representation(self.parts.x)
        original.gram = self.parts.whole
        basis, v = original.spectrum
        rank = int(original.rank)
        self.n, self.v = original.n, v[:rank]
        self.basis = from_complement(basis[:, :rank])
        self.kappa = self.shrinkage(self.v.sum())
        self.shrunk = self.v / (self.v + self.kappa)
        self.correlations = min(original.n - 1, original.p)

    def shrinkage(self, trace: Tensor) -> Tensor:
        """κ of a side whose Gram has this trace."""
        return self.penalty + (0.0 if self.penalty else self.ridge) * trace / self.n

    def self_distance(self, metric: str) -> float:
        if metric not in ("cca", "cca_squared"):
            return 0.0
        power = 2 if metric == "cca_squared" else 1
        return 1 - float(self.shrunk.pow(power).sum()) / self.correlations


class _Ablated:
    """One ablation in the original's eigenbasis."""

    def __init__(self, original: _Original, c: int) -> None:
        self.original, self.v = original, original.v
        parts, basis = original.parts, original.basis
        self.light = not parts.heavy[c]
        self.few = parts.left[c] < len(self.v)
        if self.few:
            self.features = basis.mT @ gram.centre(parts.outside(c))
            self.rest = self.features @ self.features.mT
        elif not self.light:
            self.rest = basis.mT @ parts.rest(c) @ basis
        else:
            self.cell = basis.mT @ parts.grams[c] @ basis
            self.rest = torch.diag(self.v) - self.cell
            return
        self.cell = torch.diag(self.v) - self.rest

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues of K_c, descending, without those beyond its rank."""
        w, u = torch.linalg.eigh(self.rest)
        keep = positive(w, self.original.n)
        return u[:, keep].flip(1), w[keep].flip(0)

    def procrustes(self) -> Tensor:
        """The squared distance of both scaled to unit norm."""
        root = self.v.sqrt()
        total = self.v.sum()
        if self.light and not self.few:
            deficit = riccati_trace(self.v, root[:, None] * self.cell * root)
            if deficit is not None:
                x, y = deficit / total, self.cell.trace() / total
                r = (1 - y).sqrt()
                return 2 * (x - y / (1 + r)) / r
        if self.few:
            factor = self.features
        else:
            u, w = self.spectrum
            factor = u * w.sqrt()
        nuclear = torch.linalg.svdvals(root[:, None] * factor).sum()
        return 2 - 2 * nuclear / (total * self.rest.trace()).sqrt()

    def svcca(self, variance: float = 0.99) -> Tensor:
        u, w = self.spectrum
        k, m = int(leading(self.v, variance)), int(leading(w, variance))
        return (1 - torch.linalg.svdvals(u[:k, :m]).sum() / min(k, m)).clamp(min=0)

    @property
    def kappa(self) -> Tensor:
        return self.original.shrinkage(self.rest.trace())

    @cached_property
    def loss(self) -> Tensor:
        """ΔP = P_L - P_K, P_L = L(L + κI)⁻¹ = diag(shrunk)."""
        kappa, other = self.original.kappa, self.kappa
        regular = self.rest.clone()
        regular.diagonal().add_(other)
        right = kappa * self.cell
        right.diagonal().add_((other - kappa) * self.v)
        loss = torch.cholesky_solve(right, torch.linalg.cholesky(regular)) / (self.v + kappa)
        return (loss + loss.mT) / 2

    @cached_property
    def canonical(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """F = P_L^½ ΔP P_L^½, and of P_L² - F = U diag(ρ²) Uᵀ the correlations ρ and U.

        Last, how many directions count. Where K_c is singular, roots of eigenvalues near 0 would
        have half of the digits: singular values then.
        """
        shrunk = self.original.shrunk
        root = shrunk.sqrt()[:, None]
        f = root * self.loss * root.mT
        if not self.few:
            squares, u = torch.linalg.eigh(torch.diag(shrunk.square()) - f)
            if squares[0] > 1e-10 * squares[-1]:
                return f, squares.sqrt(), u, len(squares)
        v, w = self.spectrum
        u, kept, _ = torch.linalg.svd(root * v * (w / (w + self.kappa)).sqrt())
        rho = torch.zeros_like(self.v)
        rho[: len(kept)] = kept
        return f, rho, u, len(kept)

    def cca(self) -> Tensor:
        """1 - mean correlation: the self-distance and what the ablation adds to it.

        D = P_L - (P_L² - F)^½ solves P_L D + D (P_L - D) = F, a Sylvester equation in the
        eigenvectors of P_L - D; its trace is what the sum of the correlations loses, without
        a difference of sums.
        """
        f, rho, u, _ = self.canonical
        lost = ((f @ u) / (self.original.shrunk[:, None] + rho) * u).sum()
        return self.original.self_distance("cca") + lost / self.original.correlations

    def cca_squared(self) -> Tensor:
        lost = (self.original.shrunk * self.loss.diagonal()).sum()
        return self.original.self_distance("cca_squared") + lost / self.original.correlations

    def variates(self) -> tuple[Tensor, Tensor]:
        """The original's canonical variates as rows (k, n), and the correlations (k,)."""
        _, rho, u, count = self.canonical
        u, rho = u[:, :count], rho[:count]
        return u.mT @ (self.original.shrunk.sqrt() * self.original.basis).mT, rho


def riccati_trace(v: Tensor, f: Tensor, steps: int = 16) -> Tensor | None:
    """tr D for the minimal D with diag(v) D + D diag(v) = F + D²; None if it takes more steps.

    Small ablations need few steps, and keep all their digits. Source: METRICS.
    """
    sums = v[:, None] + v
    d = f / sums
    trace, change = d.trace(), float("inf")
    for step in range(steps):
        d = torch.addmm(f, d, d).div_(sums)
        previous, change = change, float(d.trace() - trace)
        trace = d.trace()
        if change <= 1e-13 * float(trace):
            return trace
        ratio = change / previous
        if step > 1 and change * ratio ** (steps - 1 - step) > 1e-13 * float(trace):
            break
    return None


def _spectral_distances(original: _Original, out: dict[str, Tensor], memory: int) -> None:
    parts = original.parts
    names = set(out) & {"procrustes", "svcca"}
    if original.kappa > 0:
        # Without a ridge the rest of the neurons is a part of the original's span: distance 0.
        names |= set(out) & {"cca", "cca_squared", "pwcca"}
    dead = [c for c in range(parts.n_cells) if parts.dead[c]]
    for name in names - {"pwcca"}:
        out[name][dead] = original.self_distance(name)
    waiting: list[tuple[list[int], Tensor, Tensor]] = []
    if dead and "pwcca" in names:
        waiting.append((dead, (original.shrunk.sqrt() * original.basis).mT, original.shrunk))
    for c in parts.active:
        ablated = _Ablated(original, c)
        for name in names - {"pwcca"}:
            out[name][c] = getattr(ablated, name)()
        if "pwcca" in names:
            waiting.append(([c], *ablated.variates()))
            if sum(h.numel() for _, h, _ in waiting) * 16 > memory:
                _weigh(parts, waiting, out["pwcca"])
    _weigh(parts, waiting, out.get("pwcca"))


def _weigh(
    parts: Cells, waiting: list[tuple[list[int], Tensor, Tensor]], out: Tensor | None
) -> None:
    """PWCCA distances of the waiting cells, by one pass over x."""
    if out is None or not waiting:
        return
    weights = parts.passes.variate_weights(torch.cat([h for _, h, _ in waiting]), parts.x)
    sizes = [len(h) for _, h, _ in waiting]
    for (cells, _, rho), alpha in zip(waiting, torch.split(weights, sizes), strict=True):
        out[cells] = 1 - (alpha * rho).sum() / alpha.sum()
    waiting.clear()
