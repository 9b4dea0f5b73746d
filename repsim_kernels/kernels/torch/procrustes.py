"""Orthogonal Procrustes."""

from __future__ import annotations

import torch
from torch import Tensor

from repsim_kernels.kernels.torch.representation import Representation


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    return similarity(Representation(x), Representation(y))


def procrustes_distance(x: Tensor, y: Tensor, *, form: str) -> Tensor:
    return distance(Representation(x), Representation(y), form)


def _nuclear_norm(a: Representation, b: Representation) -> Tensor:
    return torch.linalg.svdvals(a.factor.mT @ b.factor).sum(-1)


def _energy(a: Representation) -> Tensor:
    return a.factor.square().sum((-2, -1))


def similarity(a: Representation, b: Representation) -> Tensor:
    return (_nuclear_norm(a, b) / (_energy(a) * _energy(b)).sqrt()).clamp(max=1)


def distance(a: Representation, b: Representation, form: str) -> Tensor:
    """Return the distance from the residual of the best rotation.

    2 - 2s, with s the similarity, would lose half of a small distance's digits.
    """
    f, g = a.factor, b.factor
    if form != "size-and-shape":
        f, g = (t / torch.linalg.matrix_norm(t, keepdim=True) for t in (f, g))
    squared = squared_residual(f, g)
    if form == "squared":
        return squared
    root = squared.sqrt()
    return root if form == "size-and-shape" else 2 * torch.arcsin(root / 2)


def squared_residual(f: Tensor, g: Tensor) -> Tensor:
    """Return the least ‖f - g r‖² over rotations r, (…); the narrower side is padded with zeros."""
    u, _, wh = torch.linalg.svd(f.mT @ g, full_matrices=False)
    rotated = (f @ u, g @ wh.mT)
    orthogonal = (f - rotated[0] @ u.mT, g - rotated[1] @ wh)
    parts = (rotated[0] - rotated[1], *orthogonal)
    return torch.stack([part.square().sum((-2, -1)) for part in parts]).sum(0)
