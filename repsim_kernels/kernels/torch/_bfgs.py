"""Limited-memory BFGS that starts from the factor of an exact Hessian, for a batch of problems.

Source: Byrd, Nocedal & Schnabel, Representations of quasi-Newton matrices and their use in limited
memory methods, Mathematical Programming 63 (1994), theorem 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 10  # BFGS steps per Hessian; 8 and 12 are slower on three kinds of activations


class InverseHessian:
    """The inverse Hessians of B problems: an exact one, with limited-memory BFGS updates.

    H = H₀ + P M Pᵀ with P = (S, Z), where S are the steps, Y the changes of the gradient and
    Z = H₀Y. With R the upper triangle of SᵀY, D its diagonal and E = D + YᵀZ,

        Hg = H₀g + S R⁻ᵀ(E R⁻¹Sᵀg - Zᵀg) - Z R⁻¹Sᵀg.
    """

    def __init__(self, factor: Tensor) -> None:
        b, m = factor.shape[:2]
        self.factor = factor
        self.pairs = factor.new_zeros(b, 2 * STEPS, m)  # Pᵀ
        self.r_inverse = factor.new_zeros(b, STEPS, STEPS)  # R⁻¹
        self.e = factor.new_zeros(b, STEPS, STEPS)
        self.h0_gradient = self.pairs[:, 0]

    def start(self, gradient: Tensor) -> Tensor:
        """Return H₀ times the gradient (B, m), without any update."""
        half = torch.linalg.solve_triangular(self.factor.mT, gradient[:, :, None], upper=False)
        self.h0_gradient = torch.linalg.solve_triangular(self.factor, half, upper=True)[:, :, 0]
        return self.h0_gradient

    def update(self, k: int, step: Tensor, gradient_change: Tensor, gradient: Tensor) -> Tensor:
        """Add step k, and return H times the gradient after it."""
        before = self.h0_gradient
        now = self.start(gradient)
        curvature = (step * gradient_change).sum(1)
        valid = (curvature > 0)[:, None]
        self.pairs[:, k] = step.where(valid, 0)
        self.pairs[:, STEPS + k] = (now - before).where(valid, 0)
        gradients = torch.stack([gradient_change.where(valid, 0), gradient], 1)
        (sy, zy), (sg, zg) = (
            a.unbind(1) for a in torch.bmm(gradients, self.pairs.mT).unflatten(2, (2, -1)).unbind(1)
        )
        self.e[:, k] = self.e[:, :, k] = zy
        self.e[:, k, k] += sy[:, k]
        rho = curvature.where(valid[:, 0], 1)[:, None]
        column = _matvec(self.r_inverse, sy) / -rho
        column[:, k] = 1 / rho[:, 0]
        self.r_inverse[:, :, k] = column
        t = _matvec(self.r_inverse, sg)
        u = _matvec(self.r_inverse.mT, _matvec(self.e, t) - zg)
        return torch.baddbmm(now[:, None], torch.cat([u, -t], 1)[:, None], self.pairs)[:, 0]


def _matvec(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(b[:, None], a.mT)[:, 0]
