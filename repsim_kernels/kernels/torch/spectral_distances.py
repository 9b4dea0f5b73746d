"""CCA, PWCCA, SVCCA and Procrustes from Gram matrices, for batches of ablations of one original.

Notation as in docs/metrics.md, "One original, many ablations": L = V diag(v) Vᵀ is the Gram of the
original, G_c that of a cell, and K_c = L - G_c the ablated Gram. All matrices are in the basis V,
where K_c is nearly diagonal. Each distance is returned with the route that computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from repsim_kernels._routes import Distances, Route
from repsim_kernels.kernels.torch import riccati
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
    eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh
    svdvals: Callable[[Tensor], Tensor] = torch.linalg.svdvals


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
        rank = int((v > 0).sum())
        self.v, self.basis = v[:rank], from_complement(basis[:, :rank])
        self.kappa = self.shrinkage(self.v.sum())
        self.shrunk = self.v / (self.v + self.kappa)
        self.correlations = min(self.n - 1, self.neurons)

    def shrinkage(self, trace: Tensor) -> Tensor:
        """Return κ for a side whose Gram has this trace."""
        return self.penalty + (0.0 if self.penalty else self.ridge) * trace / self.n

    def check_ridge(self) -> None:
        """Raise LinAlgError for a positive ridge that rounding hides."""
        if bool((self.kappa > 0) & (self.kappa < _MIN_RIDGE * self.v.sum() / self.n)):
            message = "singular to rounding"
            raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]

    def self_distance(self, metric: str) -> float:
        """Return the distance of the original from itself, which a ridge makes positive."""
        if metric not in ("cca", "cca_squared"):
            return 0.0
        power = 2 if metric == "cca_squared" else 1
        return 1 - float(self.shrunk.pow(power).sum()) / self.correlations

    @property
    def variates(self) -> Tensor:
        """The canonical variates of the original with itself, as rows (m, n)."""
        return (self.shrunk.sqrt() * self.basis).mT


class AblationBatch:
    """A batch of B ablations of one original.

    If it has `features`, fewer neurons remain than the original has directions.
    """

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
            self.rest = torch.diag(self.v) - self.cell
        else:
            if rest is not None:
                self.rest = self._in_basis(rest)
            elif features is not None:
                self.rest = (features @ features.mT)[None]
            self.cell = torch.diag(self.v) - self.rest
        self.rest_trace = self.rest.diagonal(dim1=1, dim2=2).sum(-1)

    def _in_basis(self, grams: Tensor) -> Tensor:
        return self.original.basis.mT @ grams @ self.original.basis

    def __len__(self) -> int:
        return len(self.cell)

    def _same_route(self, route: Route) -> tuple[Tensor, Tensor]:
        """Return one route for all ablations, and no steps."""
        steps = torch.zeros(len(self), dtype=torch.int64, device=self.v.device)
        return steps + route, steps

    def _all_nan(self) -> Tensor:
        return torch.full_like(self.rest_trace, torch.nan)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (B, m), descending, zero beyond the rank, and all eigenvectors of K_c."""
        w, u = (t.flip(-1) for t in self.solvers.eigh(self.rest))
        return w * is_positive(w, self.original.n), u

    def procrustes(self) -> Distances:
        """Return squared distances (B,), with both representations scaled to unit norm.

        With y = tr G / tr L, x = tr D / tr L and r = √(1 - y), the distance is
        2 (x - y/(1 + r)) / r.
        """
        root, total = self.v.sqrt(), self.v.sum()
        out, route = self._procrustes_directly()
        steps = torch.zeros_like(route)
        iterated = out.isnan().nonzero()[:, 0]
        if self.features is None and len(iterated):
            cell, rest_trace = self.cell[iterated], self.rest_trace[iterated]
            f = root[:, None] * cell * root
            deficit, steps[iterated] = riccati.solve_deficit(self.v, f, self.solvers.advance)
            x, y = deficit / total, cell.diagonal(dim1=1, dim2=2).sum(-1) / total
            r = (rest_trace / total).sqrt()
            out[iterated], route[iterated] = 2 * (x - y / (1 + r)) / r, Route.ITERATIONS
        for i in out.isnan().nonzero()[:, 0].tolist():
            factor = self.features if self.features is not None else self.factors[i]()
            route[i] = Route.FACTORS
            if factor is None:
                w, u = (t[i] for t in self.spectrum)
                factor, route[i] = u * w.sqrt(), Route.EIGENVECTORS
            nuclear = self.solvers.svdvals(root[:, None] * factor).sum()
            out[i] = 2 - 2 * nuclear / (total * factor.square().sum()).sqrt()
        return Distances(out, route, steps)

    def _procrustes_directly(self) -> tuple[Tensor, Tensor]:
        """Return squared distances (B,) where they keep their digits, otherwise NaN, and routes.

        On a CPU, eigenvalues take half the time of iterations. Those of L^½ K_c L^½ are squares,
        of which small ones may be inaccurate; singular values of L^½ with a factor of K_c are not,
        but they take twice as long.
        """
        out, (route, _) = self._all_nan(), self._same_route(Route.EIGENVALUES)
        if self.features is not None or self.solvers is not SOLVERS or self.v.is_cuda:
            return out, route
        root, scale = self.v.sqrt(), (self.v.sum() * self.rest_trace).sqrt()
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
            route[missing] = Route.FACTORS
        return out, route

    def svcca(self, variance: float = 0.99) -> Distances:
        """Return 1 - mean cosine between the leading k and m directions of L and K_c.

        The eigenvectors of K_c are an orthogonal matrix. Its block of these directions and the
        opposite block have the same singular values, apart from ones; the smaller is decomposed.
        """
        w, u = self.spectrum
        total = u.shape[-1]
        k, m = count_leading(self.v, variance), count_leading(w, variance)
        in_lead = torch.arange(total, device=u.device) < m[:, None]  # (B, total)
        if int(k + m.min()) > total:
            rest = u[:, int(k) :, int(m.min()) :] * ~in_lead[:, None, int(m.min()) :]
            lost = total - torch.maximum(k, m) - self.solvers.svdvals(rest).sum(-1)
        else:
            lead = u[:, : int(k), : int(m.max())] * in_lead[:, None, : int(m.max())]
            lost = torch.minimum(k, m) - self.solvers.svdvals(lead).sum(-1)
        return Distances(lost / torch.minimum(k, m), *self._same_route(Route.EIGENVECTORS))

    @property
    def kappa(self) -> Tensor:
        return self.original.shrinkage(self.rest_trace)

    @cached_property
    def loss(self) -> Tensor:
        """ΔP = P_L - P_K, where P_L = L(L + κI)⁻¹ = diag(shrunk); (B, m, m)."""
        self.original.check_ridge()
        kappa, rest_kappa = self.original.kappa, self.kappa[:, None]
        regular = self.rest.clone()
        regular.diagonal(dim1=1, dim2=2).add_(rest_kappa)
        # κ′L - κK_c, from the Gram that was computed directly; the other Gram is a difference.
        right = kappa * self.cell if self.has_cell else -kappa * self.rest
        shift = rest_kappa - kappa if self.has_cell else rest_kappa
        right.diagonal(dim1=1, dim2=2).add_(shift * self.v)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(regular)).div_(self.v + kappa)
        return (solved + solved.mT).div_(2)

    @cached_property
    def balanced_loss(self) -> Tensor:
        """F = P_L^½ ΔP P_L^½."""
        root = self.original.shrunk.sqrt()
        return root[:, None] * self.loss * root

    @cached_property
    def canonical(self) -> tuple[Tensor, Tensor]:
        """The correlations ρ (B, m), 0 beyond the rank, and U of P_L² - F = U diag(ρ²) Uᵀ.

        If K_c is singular, ρ are singular values instead, since the square roots of eigenvalues
        near 0 would keep only half of their digits.
        """
        shrunk = self.original.shrunk
        if self.features is None:
            squares, u = self.solvers.eigh(torch.diag(shrunk.square()) - self.balanced_loss)
            # Rounding grows by v / κ, which could hide that K_c is singular.
            noise = torch.clamp(100 * _EPS * self.v[0] / self.original.kappa, min=1e-10)
            singular = squares[:, 0] <= noise * squares[:, -1]
            rho = squares.clamp(min=0).sqrt()
        else:
            u, rho = torch.empty_like(self.cell), torch.empty_like(self.cell[:, 0])
            singular = torch.ones(len(self), dtype=torch.bool)
        for i in singular.nonzero()[:, 0].tolist():
            w, vectors = (t[i] for t in self.spectrum)
            scale = (w / (w + self.kappa[i])).sqrt()
            u[i], rho[i], _ = torch.linalg.svd(shrunk.sqrt()[:, None] * vectors * scale)
            rho[i] *= torch.arange(rho.shape[1], device=rho.device) < (w > 0).sum()
        return rho, u

    def cca(self, vectors: bool) -> Distances:
        """Return 1 - mean correlation: the self-distance plus what the ablation adds to it.

        D = P_L - (P_L² - F)^½ solves P_L D + D P_L = F + D². Its trace is the loss of the sum of
        the correlations, without a difference of sums. If the eigenvectors of P_L² - F are computed
        in any case (``vectors``), D solves a Sylvester equation in them: P_L D + D (P_L - D) = F.
        """
        lost, (route, steps) = self._all_nan(), self._same_route(Route.ITERATIONS)
        if self.features is None and not vectors:
            lost, steps = riccati.solve_deficit(
                self.original.shrunk, self.balanced_loss, self.solvers.advance
            )
        missing = lost.isnan()
        if bool(missing.any()):
            route[missing] = Route.EIGENVECTORS
            rho, u = self.canonical
            solved = self.balanced_loss @ u
            solved.div_(self.original.shrunk[:, None] + rho[:, None, :]).mul_(u)
            lost = torch.where(missing, solved.sum((-2, -1)), lost)
        return Distances(self._excess("cca", lost), route, steps)

    def cca_squared(self) -> Distances:
        lost = (self.original.shrunk * self.loss.diagonal(dim1=1, dim2=2)).sum(-1)
        return Distances(self._excess("cca_squared", lost), *self._same_route(Route.SUMS))

    def _excess(self, metric: str, lost: Tensor) -> Tensor:
        return self.original.self_distance(metric) + lost / self.original.correlations

    def variates(self) -> tuple[Tensor, Tensor]:
        """Return the original's canonical variates as rows (B, k, n), and correlations (B, k).

        Both are 0 beyond the rank of K_c, and k is the largest rank in the batch.
        """
        rho, u = self.canonical
        in_rank = rho > 0
        count = int(in_rank.sum(-1).max())  # if K_c is singular, they are in descending order
        h = (u * in_rank[:, None, :])[..., :count].mT @ self.original.variates
        return h, rho[:, :count]


def _estimate_distances(values: Tensor, errors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 - 2 Σσ / scale for singular values σ (B, m), and its estimated error.

    ``errors`` (B, m) are those of σ in units of the rounding error; they are independent.
    """
    error = 2 * _EPS * (1 + errors.norm(dim=-1) / scale)
    return 2 - 2 * values.sum(-1) / scale, error


def _accept_distances(distances: Tensor, errors: Tensor) -> Tensor:
    """Replace distances that are not accurate by NaN."""
    return torch.where(errors <= _MAX_DIRECT_ERROR * distances, distances, torch.nan)
