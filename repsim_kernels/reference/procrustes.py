"""Procrustes similarity and distances."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.cca import decompose
from repsim_kernels.reference.gram import Array, Real


def procrustes(x: Real, y: Real) -> np.float64:
    """Return ‖AᵀB‖_* / (‖A‖ ‖B‖) of the centred x (n, p) and y (n, q), in [0, 1]."""
    a, b = _centre_rotated(x), _centre_rotated(y)
    nuclear = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    return np.float64(min(nuclear / (np.linalg.norm(a) * np.linalg.norm(b)), 1.0))


def procrustes_distance(x: Real, y: Real, *, form: str = "squared") -> np.float64:
    """Return the distance between the centred x (n, p) and y (n, q) after the best rotation.

    ``"squared"``: ‖A - BR‖² with A and B scaled to unit norm (Ding et al. 2021), in [0, 2].
    ``"angular"``: the angle between these A and BR (Williams et al. 2021), in radians.
    ``"size-and-shape"``: ‖A - BR‖ without scaling.
    """
    a, b = _centre_rotated(x), _centre_rotated(y)
    if form == "size-and-shape":
        return _measure_residual(a, b)
    distance = _measure_residual(a / np.linalg.norm(a), b / np.linalg.norm(b))
    if form == "squared":
        return np.float64(distance**2)
    return np.float64(2 * np.arcsin(distance / 2))


def _centre_rotated(x: Real) -> Array:
    """Return the centred x up to a rotation of its features, which changes no distance."""
    u, s, _ = decompose(x)
    return u * s


def _measure_residual(a: Array, b: Array) -> np.float64:
    """Return the minimum of ‖a - b r‖ over orthogonal r, with the narrower side zero-padded."""
    width = max(a.shape[1], b.shape[1])
    a, b = (np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (a, b))
    left, _, right = np.linalg.svd(a.T @ b)
    return np.float64(np.linalg.norm(a @ left - b @ right.T))
