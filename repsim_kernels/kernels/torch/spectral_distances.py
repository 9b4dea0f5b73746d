"""CCA, PWCCA, SVCCA and Procrustes from Gram matrices, for batches of ablations of one original.

Notation as in docs/metrics.md, "One original, many ablations": L = V diag(v) Vᵀ is the Gram of the
original, G_c that of a cell, and K_c = L - G_c the ablated Gram. All matrices are in the basis V,
where K_c is nearly diagonal. Each distance is returned with the route that computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._routes import Distances, Route
from repsim_kernels.kernels.torch import cholesky, cka, riccati
from repsim_kernels.kernels.torch.cca import count_leading
from repsim_kernels.kernels.torch.representation import from_complement, is_positive

_EPS = torch.finfo(torch.float64).eps
# With a smaller relative ridge, solves with L + κI lose more than about 1e-6 of a correlation.
_MIN_RIDGE = 1e-10
# Largest estimated relative error of a distance that is computed from eigenvalues or singular
# values. In layers of the demo's networks the actual errors were about a hundredth of the estimate.
_MAX_DIRECT_ERROR = 1e-9
# Smallest distance that can be so accurate: rounding 2 - 2 Σσ alone makes an error of 2 eps.
_MIN_DIRECT = 2 * _EPS / _MAX_DIRECT_ERROR
# Least pivot / √v of a Cholesky factor of K_c that is accepted.
_MIN_RATIO = 0.25


@dataclass(frozen=True)
class Solvers:
    """The linear algebra that this stage uses; each backend may bring faster routines."""

    advance: riccati.Advance = riccati.advance
    traces: riccati.TraceSolvers = riccati.TRACE_SOLVERS
    eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh
    svdvals: Callable[[Tensor], Tensor] = torch.linalg.svdvals
    cosine_distance: Callable[..., Tensor] = cka.cosine_distance


SOLVERS = Solvers()


@dataclass
class Original:
    """The spectrum of the original, with its ridge applied."""

    spectrum: tuple[Tensor, Tensor]
    n: int
    neurons: int
    ridge: float
    penalty: float
    solvers: Solvers = SOLVERS

    def __post_init__(self) -> None:
        basis, v = self.spectrum
        self.values = v.cpu()  # the one copy to the host; what is one number is computed there
        rank = int((self.values > 0).sum())
        self.values = self.values[:rank]
        self.v, self.basis = v[:rank], from_complement(basis[:, :rank])
        self.total = float(self.values.sum())
        self.kappa = self.penalty + (0.0 if self.penalty else self.ridge) * self.total / self.n
        self.shrunk = self.v / (self.v + self.kappa)
        self.correlations = min(self.n - 1, self.neurons)

    def shrinkage(self, trace: Tensor) -> Tensor:
        """Return κ for sides whose Grams have these traces."""
        if self.penalty:
            return torch.full_like(trace, self.penalty)
        return trace * (self.ridge / self.n)

    def check_ridge(self) -> None:
        """Raise LinAlgError for a positive ridge that rounding hides."""
        if 0 < self.kappa < _MIN_RIDGE * self.total / self.n:
            message = "singular to rounding"
            raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]

    def self_distance(self, metric: str) -> float:
        """Return the distance of the original from itself, which a ridge makes positive."""
        if metric not in ("cca", "cca_squared"):
            return 0.0
        shrunk = self.values / (self.values + self.kappa)
        power = 2 if metric == "cca_squared" else 1
        return 1 - float(shrunk.pow(power).sum()) / self.correlations

    @cached_property
    def unit(self) -> tuple[Tensor, Tensor]:
        """v scaled to a largest value of 1, and its square root."""
        v = self.v / float(self.values[0])
        return v, v.sqrt()

    @cached_property
    def root(self) -> Tensor:
        return self.v.sqrt()

    @cached_property
    def shrunk_root(self) -> Tensor:
        return self.shrunk.sqrt()

    @cached_property
    def half_balance(self) -> Tensor:
        """√(v / (v + κ)) / (v + κ), halved."""
        return self.shrunk_root / (self.v + self.kappa) / 2

    @cached_property
    def variates(self) -> Tensor:
        """The canonical variates of the original with itself, as rows (m, n)."""
        return (self.shrunk_root * self.basis).mT


class AblationBatch:
    """A batch of B ablations of one original.

    If it has `features`, fewer neurons remain than the original has directions.
    """

    variates_route = Route.EIGENVECTORS

    def __init__(
        self,
        original: Original,
        *,
        cell: Tensor | None = None,
        rest: Tensor | None = None,
        features: Tensor | None = None,
        factors: Sequence[Callable[[], Tensor | None]] = (),
    ) -> None:
        """Take the Grams (B, n, n) of the cells, or of the remaining neurons as ``rest``.

        A single ablation may pass ``features`` instead: the remaining features (m, r) in the
        original's basis. Each of ``factors`` computes such features for one ablation, or returns
        None.
        """
        self.original, self.features, self.factors = original, features, factors
        self.v, self.solvers = original.v, original.solvers
        self.has_cell = cell is not None  # then the cell is smaller than the rest
        if cell is not None:
            self.cell = self._in_basis(cell)
            self.rest = self._complement(self.cell)
        else:
            if rest is not None:
                self.rest = self._in_basis(rest)
            elif features is not None:
                self.rest = (features @ features.mT)[None]
            self.cell = self._complement(self.rest)
        self.rest_trace = self.rest.diagonal(dim1=1, dim2=2).sum(-1)

    def _in_basis(self, grams: Tensor) -> Tensor:
        return self.original.basis.mT @ (grams @ self.original.basis)

    def _complement(self, grams: Tensor) -> Tensor:
        """Return diag(v) - G for Grams G (B, m, m) in the basis."""
        return _subtract_from_diagonal(self.v, grams)

    def __len__(self) -> int:
        return len(self.cell)

    def _same_route(self, route: Route) -> tuple[np.ndarray, np.ndarray]:
        """Return one route for all ablations, and no steps."""
        return np.full(len(self), route), np.zeros(len(self), dtype=np.int64)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (B, m), ascending, zero beyond the rank, and all eigenvectors of K_c."""
        w, u = self.solvers.eigh(self.rest)
        return w * is_positive(w, w[..., -1:], self.original.n), u

    def procrustes(self) -> Distances:
        """Return squared distances (B,), with both representations scaled to unit norm.

        With y = tr G / tr L, x = tr D / tr L and r = √(1 - y), the distance is
        2 (x - y/(1 + r)) / r.
        """
        out, route = self._procrustes_directly()
        steps = np.zeros(len(self), dtype=np.int64)
        missing = list(range(len(self))) if out is None else _find_nan(out)
        if self.features is None and missing:
            iterated, steps[missing] = self._procrustes_by_iterations(missing)
            route[missing] = Route.ITERATIONS
            if out is None:
                out = iterated
            else:
                out[missing] = iterated
            missing = _find_nan(out)
        if out is None:
            out = torch.empty_like(self.rest_trace)
        for i in missing:
            factor = self.features if self.features is not None else self.factors[i]()
            route[i] = Route.FACTORS
            if factor is None:
                w, u = (t[i] for t in self.spectrum)
                factor, route[i] = u * w.sqrt(), Route.EIGENVECTORS
            nuclear = self.solvers.svdvals(self.original.root[:, None] * factor).sum()
            out[i] = 2 - 2 * nuclear / (self.original.total * factor.square().sum()).sqrt()
        return Distances(out, route, steps)

    def _procrustes_by_iterations(self, ablations: list[int]) -> tuple[Tensor, np.ndarray]:
        """Return the squared distances of some of the ablations, and the number of steps."""
        cell, rest_trace = self.cell, self.rest_trace
        if len(ablations) < len(self):
            cell, rest_trace = cell[ablations], rest_trace[ablations]
        v, root = self.original.unit
        top, total = float(self.original.values[0]), self.original.total
        # With v scaled by 1 / v₁, so is F by 1 / v₁², of which the cell brings one factor.
        f = (root[:, None] * cell).mul_(root / top)
        deficit, steps = riccati.solve_unit_deficit(v, f, self.solvers.advance, self.solvers.traces)
        r = (rest_trace / total).sqrt_()
        y = cell.diagonal(dim1=1, dim2=2).sum(-1)
        distances = deficit.mul_(2 * top / total).addcdiv_(y, r + 1, value=-2 / total).div_(r)
        return distances, steps.numpy()

    def _procrustes_directly(self) -> tuple[Tensor | None, np.ndarray]:
        """Return squared distances (B,), NaN where they would lose their digits, and routes.

        On a CPU, eigenvalues take half the time of iterations. Those of L^½ K_c L^½ are squares,
        of which small ones may be inaccurate; singular values of L^½ with a factor of K_c are not,
        but they take twice as long. There are no distances if another way is always better.
        """
        route, _ = self._same_route(Route.EIGENVALUES)
        if self.features is not None or self.solvers is not SOLVERS or self.v.is_cuda:
            return None, route
        root, scale = self.original.root, (self.original.total * self.rest_trace).sqrt()
        values = torch.linalg.eigvalsh(root[:, None] * self.rest * root).clamp_(min=0).sqrt_()
        # An error of eps v₁² in each square.
        errors = self.v[0].square() / (2 * values)
        distances, error = _estimate_distances(values, errors, scale)
        out = _accept_distances(distances, error)
        # No way is accurate enough for smaller distances.
        missing = (out.isnan() & (distances + error >= _MIN_DIRECT)).nonzero()[:, 0]
        if len(missing):
            factor, failed = torch.linalg.cholesky_ex(self.rest[missing])
            values = torch.linalg.svdvals(root[:, None] * factor)
            # Pivots show how much of each direction remains: hardly any if K_c is nearly singular.
            ratios = factor.diagonal(dim1=1, dim2=2) / root
            singular = (failed > 0) | (ratios.amin(-1) < _MIN_RATIO)
            errors = (self.v[0] / ratios).masked_fill(singular[:, None], torch.inf)
            out[missing] = _accept_distances(*_estimate_distances(values, errors, scale[missing]))
            route[missing.numpy()] = Route.FACTORS
        return out, route

    def svcca(self, variance: float = 0.99) -> Distances:
        """Return 1 - mean cosine between the leading k and m directions of L and K_c.

        The eigenvectors of K_c are an orthogonal matrix. Its block of these directions and the
        opposite block have the same singular values, apart from ones; the smaller is decomposed.
        """
        w, u = self.spectrum
        total = u.shape[-1]
        both = torch.cat([self.original.values[None], w.cpu().flip(-1)])
        k, *m = count_leading(both, variance).tolist()
        low, high = min(m), max(m)
        opposite = k + low > total
        block = u[:, k:, : total - low] if opposite else u[:, :k, total - high :]
        sizes = [total - max(k, each) if opposite else min(k, each) for each in m]
        if low == high:
            size, mean_over = float(sizes[0]), float(min(k, low))
        else:
            # The block suits the ablation with the most directions; the others have some of them.
            numbers = [sizes, [min(k, each) for each in m], m]
            size, mean_over, leading = torch.tensor(numbers, dtype=w.dtype).to(w.device)
            column, leading = torch.arange(block.shape[-1], device=w.device), leading[:, None]
            inside = column < total - leading if opposite else column >= high - leading
            block = block * inside[:, None]
        lost = size - self.solvers.svdvals(block).sum(-1)
        return Distances(lost / mean_over, *self._same_route(Route.EIGENVECTORS))

    @cached_property
    def kappa(self) -> Tensor:
        """κ of each ablated side, (B, 1)."""
        return self.original.shrinkage(self.rest_trace[:, None])

    @cached_property
    def balanced_loss(self) -> Tensor:
        """F = P_L^½ ΔP P_L^½ (B, m, m), where ΔP = P_L - P_K and P_L = L(L + κI)⁻¹."""
        original = self.original
        original.check_ridge()
        regular = self.rest.clone()
        regular.diagonal(dim1=1, dim2=2).add_(self.kappa)
        factor, info = torch.linalg.cholesky_ex(regular)
        # κ′L - κK_c, from the Gram that was computed directly; the other Gram is a difference.
        right = self.cell * original.kappa if self.has_cell else self.rest * -original.kappa
        shift = self.kappa - original.kappa if self.has_cell else self.kappa
        right.diagonal(dim1=1, dim2=2).add_(shift * self.v)
        solved = cholesky.solve(factor, right)  # (K_c + κ′I)⁻¹ (κ′L - κK_c), ΔP (L + κI)
        cholesky.raise_if_singular(info)
        # Half of F, which is symmetric up to rounding.
        solved.mul_(original.half_balance).mul_(original.shrunk_root[:, None])
        return solved + solved.mT

    @cached_property
    def canonical(self) -> tuple[Tensor, Tensor, list[int]]:
        """The correlations ρ (B, m), 0 beyond the rank, U of P_L² - F = U diag(ρ²) Uᵀ, and ranks.

        If K_c is singular, ρ are singular values instead, since the square roots of eigenvalues
        near 0 would keep only half of their digits.
        """
        shrunk = self.original.shrunk
        if self.features is None:
            squares, u = self.solvers.eigh(
                _subtract_from_diagonal(shrunk.square(), self.balanced_loss)
            )
            known = squares.cpu()
            # Rounding grows by v / κ, which could hide that K_c is singular.
            noise = max(100 * _EPS * float(self.original.values[0]) / self.original.kappa, 1e-10)
            singular = (known[:, 0] <= noise * known[:, -1]).tolist()
            ranks = (known > 0).sum(-1).tolist()
            rho = squares.clamp(min=0).sqrt_()
        else:
            u, rho = torch.empty_like(self.cell), torch.empty_like(self.cell[:, 0])
            singular, ranks = [True] * len(self), [0] * len(self)
        for i in [i for i, is_singular in enumerate(singular) if is_singular]:
            w, vectors = (t[i] for t in self.spectrum)
            scale = (w / (w + self.kappa[i])).sqrt()
            u[i], rho[i], _ = torch.linalg.svd(self.original.shrunk_root[:, None] * vectors * scale)
            rho[i] *= torch.arange(rho.shape[1], device=rho.device) < (w > 0).sum()
            ranks[i] = int((rho[i] > 0).sum())
        return rho, u, ranks

    def cca(self, vectors: bool) -> Distances:
        """Return 1 - mean correlation: the self-distance plus what the ablation adds to it.

        D = P_L - (P_L² - F)^½ solves P_L D + D P_L = F + D². Its trace is the loss of the sum of
        the correlations, without a difference of sums. If the eigenvectors of P_L² - F are computed
        in any case (``vectors``), D solves a Sylvester equation in them: P_L D + D (P_L - D) = F.
        """
        route, steps = self._same_route(Route.EIGENVECTORS)
        if vectors or self.features is not None:
            return Distances(self._excess("cca", self._lost_by_eigenvectors()), route, steps)
        lost, counts = riccati.solve_deficit(
            self.original.shrunk, self.balanced_loss, self.solvers.advance, self.solvers.traces
        )
        steps = counts.numpy()
        route[:] = Route.ITERATIONS
        if missing := _find_nan(lost):
            route[missing] = Route.EIGENVECTORS
            lost = torch.where(lost.isnan(), self._lost_by_eigenvectors(), lost)
        return Distances(self._excess("cca", lost), route, steps)

    def _lost_by_eigenvectors(self) -> Tensor:
        """Return tr D (B,) from the eigenvectors of P_L² - F."""
        rho, u, _ = self.canonical
        solved = self.balanced_loss @ u
        return solved.div_(self.original.shrunk[:, None] + rho[:, None]).mul_(u).sum((-2, -1))

    def cca_squared(self) -> Distances:
        lost = self.balanced_loss.diagonal(dim1=1, dim2=2).sum(-1)
        return Distances(self._excess("cca_squared", lost), *self._same_route(Route.SUMS))

    def _excess(self, metric: str, lost: Tensor) -> Tensor:
        return self.original.self_distance(metric) + lost / self.original.correlations

    def variates(self) -> tuple[Tensor, Tensor]:
        """Return the original's canonical variates as rows (B, k, n), and correlations (B, k).

        Both are 0 beyond the rank of K_c, and k is the largest rank in the batch.
        """
        rho, u, ranks = self.canonical
        count = max(ranks)  # if K_c is singular, they are in descending order
        if min(ranks) < rho.shape[-1]:
            u = u * (rho > 0)[:, None]
        return u[..., :count].mT @ self.original.variates, rho[:, :count]


def _subtract_from_diagonal(v: Tensor, a: Tensor) -> Tensor:
    """Return diag(v) - A for v (m,) and A (B, m, m)."""
    out = a.neg()
    out.diagonal(dim1=1, dim2=2).add_(v)
    return out


def _find_nan(a: Tensor) -> list[int]:
    """Return the positions of NaN in a (B,)."""
    return [i for i, value in enumerate(a.tolist()) if value != value]


def _estimate_distances(values: Tensor, errors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 - 2 Σσ / scale for singular values σ (B, m), and its estimated error.

    ``errors`` (B, m) are those of σ in units of the rounding error; they are independent.
    """
    error = 2 * _EPS * (1 + errors.norm(dim=-1) / scale)
    return 2 - 2 * values.sum(-1) / scale, error


def _accept_distances(distances: Tensor, errors: Tensor) -> Tensor:
    """Replace distances that are not accurate by NaN."""
    return torch.where(errors <= _MAX_DIRECT_ERROR * distances, distances, torch.nan)
