"""The objective of many small logistic regressions, with its derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Bytes of activations that are weighted together: on a CPU within the cache of a core.
_CPU_PART, _GPU_PART = 2**20, 2**30


@dataclass(frozen=True)
class Objective:
    """Σᵢ log(1 + exp(-sᵢ zᵢ)) + λ/2 w·w, where z = xᵀw + c, for each of B problems.

    The variables are v = (w, c), (B, d + 1), so the last row of x is 1. Margins m = -s z, (B, n),
    are positive for stimuli on the wrong side, and p = sigmoid(m) are their residuals.
    """

    x: Tensor  # (B, d + 1, n)
    flip: Tensor  # (n,): -s, with which neither loss nor residual cancels
    penalty: Tensor  # (B, d + 1): λ, and 0 for c

    def select(self, at: Tensor) -> Objective:
        """Return the problems at the indices ``at``."""
        return Objective(self.x[at], self.flip, self.penalty[at])

    def margins(self, v: Tensor) -> Tensor:
        """Return m; multiplying a row is several times as fast as multiplying a column."""
        return torch.bmm(v[:, None], self.x)[:, 0].mul_(self.flip)

    def value(self, m: Tensor, v: Tensor) -> Tensor:
        """Return the values (B,) at v, whose margins are m."""
        return softplus(m).sum(1).add_((self.penalty * v * v).sum(1), alpha=0.5)

    def gradient(self, p: Tensor, v: Tensor) -> Tensor:
        """Return the gradients (B, d + 1) at v, whose residuals are p."""
        out = torch.bmm((p * self.flip)[:, None], self.x.mT)[:, 0]
        return out.addcmul_(self.penalty, v)

    def hessian(self, m: Tensor) -> Tensor:
        """Return the upper triangles of the Hessians (B, d + 1, d + 1).

        A quarter, below the diagonal, is not computed, so its values are undefined.
        """
        weight = torch.sigmoid(m) * torch.sigmoid(-m)
        b, d, _ = self.x.shape
        out, half = self.x.new_empty(b, d, d), d // 2
        for part, weighted in self.iter_weighted(weight):
            x = self.x[part, :-1].mT
            out[part, :half, :-1] = torch.bmm(weighted[:, :half], x)
            out[part, half:-1, half:-1] = torch.bmm(weighted[:, half:], x[:, :, half:])
        out[:, :, -1] = torch.bmm(weight[:, None], self.x.mT)[:, 0]
        out.diagonal(dim1=1, dim2=2).add_(self.penalty)
        return out

    def flat_diagonal(self, m: Tensor) -> Tensor:
        """Return the Hessians' diagonals (B, d + 1) where all stimuli have the same weight."""
        weight = (torch.sigmoid(m) * torch.sigmoid(-m)).sum(1, keepdim=True)
        diagonal = weight / self.x.shape[2] * self.x.norm(dim=2).square() + self.penalty
        # Not 0, even if a neuron is constant and the penalty underflows.
        return diagonal.maximum(torch.finfo(m.dtype).eps * diagonal.amax(1, keepdim=True))

    def search(self, m: Tensor, p: Tensor, change: Tensor, step: Tensor, slope: Tensor) -> Tensor:
        """Return how far (B,) to go along a step that changes margins by ``change``.

        Two iterations of Newton's method in one dimension, from the ``slope`` (B,) at the start.
        """
        penalty_bend = (self.penalty * step * step).sum(1)
        rise = p * change
        bend = (rise * (change - rise)).sum(1) + penalty_bend
        t = (-slope / bend).clamp(0, 10)
        new_rise = torch.sigmoid(torch.addcmul(m, t[:, None], change)).mul_(change)
        slope = slope + (new_rise - rise).sum(1) + t * penalty_bend
        bend = (new_rise * (change - new_rise)).sum(1) + penalty_bend
        # Weights p (1 - p) change at most by the factor exp(|change|). Where a large penalty leaves
        # only rounding of the slope, this keeps whole Newton steps whole.
        factor = (t * change.abs().amax(1)).exp().clamp(max=10)
        # No bend is left if all residuals are saturated and there is no penalty.
        return (t - slope / bend).clamp(t / factor, t * factor).nan_to_num(1.0)

    def iter_weighted(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Multiply neurons (d of them) by weights (B, n), for as many problems as fit the cache."""
        limit = _CPU_PART if self.x.device.type == "cpu" else _GPU_PART
        count = max(1, limit // self.x[0].nbytes)
        for start in range(0, len(self.x), count):
            part = slice(start, start + count)
            yield part, self.x[part, :-1] * weight[part, None]
