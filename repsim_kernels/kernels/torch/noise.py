"""Whitening: rows whose inner products are those of the inverse covariance of the noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repsim_kernels._noise import Noise

_EPS = torch.finfo(torch.float64).eps


def make_whitener(noise: Noise) -> Callable[[Tensor], Tensor]:
    """Return a linear function of rows z (…, r, p), float64, whose products become z Σ⁻¹ zᵀ.

    It returns NaN for the sets of neurons whose covariance is singular to rounding.
    """
    if noise.variances is not None:
        deviations = noise.variances.sqrt()[..., None, :]
        return lambda z: z / deviations
    if noise.covariance is not None:
        return _whiten_by_covariance(noise.covariance)
    r = noise.residuals
    m, p = r.shape[-2:]
    gram = r.mT @ r if p <= m else r @ r.mT
    share, variance = shrink(r, gram)
    diagonal = (noise.scale * share * variance)[..., None, None]
    product = (noise.scale * (1 - share) / m)[..., None, None]  # Σ = diagonal I + product rᵀr
    if p <= m:
        covariance = product * gram
        covariance.diagonal(dim1=-2, dim2=-1).add_(diagonal[..., 0])
        return _whiten_by_covariance(covariance)
    return _whiten_by_residuals(r, gram, diagonal, product)


def shrink(r: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of the identity, and its factor, in the covariance of Ledoit & Wolf 2004.

    For centred residuals r (…, m, p), whose covariance S = rᵀr / m becomes (1 - share) S +
    share · variance · I. ``gram`` is rᵀr or rrᵀ, which have the same norm.
    """
    m, p = r.shape[-2:]
    energy = r.square().sum(-1)
    variance = energy.sum(-1) / (m * p)
    fourth = energy.square().sum(-1) / m
    norm = (gram / m).square().sum((-2, -1))
    excess = (fourth - norm) / (m * p)
    excess = torch.where(fourth - norm > 64 * _EPS * fourth, excess, 0)
    spread = norm / p - variance.square()  # of S around variance · I
    share = torch.where(excess < spread, excess / spread, 1)
    return torch.where(excess > 0, share, 0) if p > 1 else torch.zeros_like(share), variance


def _whiten_by_covariance(covariance: Tensor) -> Callable[[Tensor], Tensor]:
    """Whiten by the Cholesky factor of Σ (…, p, p)."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    limit = covariance.shape[-1] * _EPS * covariance.diagonal(dim1=-2, dim2=-1)
    singular = ((info > 0) | ~(pivots > limit).all(-1))[..., None, None]

    def apply(z: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(factor.mT, z, upper=True, left=False)
        return white.masked_fill_(singular, torch.nan)

    return apply


def _whiten_by_residuals(
    r: Tensor, gram: Tensor, diagonal: Tensor, product: Tensor
) -> Callable[[Tensor], Tensor]:
    """Whiten by Σ = diagonal I + product rᵀr through matrices (m, m), for r (…, m, p).

    With c = product / diagonal and the Cholesky factor C of I + c rrᵀ, the matrix
    W = I - c rᵀ C⁻ᵀ (C + I)⁻¹ r satisfies W Wᵀ = diagonal · Σ⁻¹.
    """
    c = product / diagonal
    shifted = c * gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    singular = (info > 0)[..., None, None] | ~(diagonal > 0)
    plus_one = factor.clone()
    plus_one.diagonal(dim1=-2, dim2=-1).add_(1)

    def apply(z: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor.mT, z @ r.mT, upper=True, left=False)
        half = torch.linalg.solve_triangular(plus_one, half, upper=False, left=False)
        white = (z - (c * half) @ r) / diagonal.sqrt()
        return white.masked_fill_(singular, torch.nan)

    return apply
