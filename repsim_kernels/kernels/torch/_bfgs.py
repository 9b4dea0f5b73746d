"""Limited-memory BFGS that starts from the factor of an exact Hessian, for a batch of problems.

Source: Byrd, Nocedal & Schnabel, Representations of quasi-Newton matrices and their use in limited
memory methods, Mathematical Programming 63 (1994), theorem 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 10  # of BFGS from one Hessian; 8 and 12 take more time, on three kinds of activations


class Inverse:
    """The inverse Hessian of B problems: a factor's, and what BFGS has learnt since.

    H = H₀ + P M Pᵀ with P = (S, Z), steps S, Z = H₀Y and changes of the gradient Y. With R the
    upper triangle of SᵀY, D its diagonal and E = D + YᵀZ,

        Hg = H₀g + S R⁻ᵀ(E R⁻¹Sᵀg - Zᵀg) - Z R⁻¹Sᵀg.
    """

    def __init__(self, factor: Tensor) -> None:
        b, m = factor.shape[:2]
        self.factor = factor
        self.pairs = factor.new_zeros(b, 2 * STEPS, m)  # P, row by row
        self.inverse = factor.new_zeros(b, STEPS, STEPS)  # R⁻¹
        self.e = factor.new_zeros(b, STEPS, STEPS)
        self.last = self.pairs[:, 0]

    def start(self, gradient: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor.mT, gradient[:, :, None], upper=False)
        self.last = torch.linalg.solve_triangular(self.factor, half, upper=True)[:, :, 0]
        return self.last

    def update(self, k: int, moved: Tensor, turned: Tensor, gradient: Tensor) -> Tensor:
        """Take step k in, and give H times the gradient after it."""
        before = self.last
        now = self.start(gradient)
        curvature = (moved * turned).sum(1)
        fine = (curvature > 0)[:, None]
        self.pairs[:, k] = moved.where(fine, 0)
        self.pairs[:, STEPS + k] = (now - before).where(fine, 0)
        both = torch.stack([turned.where(fine, 0), gradient], 1)
        (sy, zy), (sg, zg) = (
            a.unbind(1) for a in torch.bmm(both, self.pairs.mT).unflatten(2, (2, -1)).unbind(1)
        )
        self.e[:, k] = self.e[:, :, k] = zy
        self.e[:, k, k] += sy[:, k]
        rho = curvature.where(fine[:, 0], 1)[:, None]
        column = _times(self.inverse, sy) / -rho
        column[:, k] = 1 / rho[:, 0]
        self.inverse[:, :, k] = column
        t = _times(self.inverse, sg)
        u = _times(self.inverse.mT, _times(self.e, t) - zg)
        return torch.baddbmm(now[:, None], torch.cat([u, -t], 1)[:, None], self.pairs)[:, 0]


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(b[:, None], a.mT)[:, 0]
