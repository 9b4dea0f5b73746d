"""Distances of ablations from Gram matrices alone, and spectra."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from repsim_kernels._routes import Distances
from repsim_kernels.reference.ablation import RIDGE_METRICS, make_distance_functions, to_distances
from repsim_kernels.reference.cca import EPS
from repsim_kernels.reference.gram import Array, Real, contrasts


def make_features(gram: Real) -> Array:
    """Return a centred x (n, n - 1) whose Gram matrix is the centred ``gram``."""
    q = contrasts(len(gram))
    w, u = np.linalg.eigh(q.T @ gram @ q)
    return np.asarray(q @ (u * np.sqrt(np.maximum(w, 0))))


def gram_ablation_distances(
    gram: Real,
    parts: Real,
    *,
    metrics: Sequence[str],
    ridge: float = 0.1,
    penalty: float = 0.0,
    neurons: int | None = None,
    compare: str = "spearman",
    sigma: float = 1.0,
) -> dict[str, Distances]:
    """Return the distances between a Gram (n, n) and the Gram without each part (C, n, n).

    By metric, as from ``ablation_distances`` for representations of n - 1 neurons with these Grams.
    Ridge CCA averages over min(n - 1, neurons) directions.
    """
    gram, parts = (np.asarray(a, dtype=np.float64) for a in (gram, parts))
    n, x = len(gram), make_features(gram)
    ridge = 0.0 if penalty else ridge
    share = (n - 1) / min(n - 1, neurons or n)
    distance = make_distance_functions(x, ridge, penalty, compare, sigma)

    def ablate(name: str, part: Array) -> np.float64:
        ridged = name in RIDGE_METRICS and (ridge or penalty)
        if not part.any() and not ridged:
            return np.float64(0)
        rest = make_features(gram - part) if part.any() else x
        if np.sum(rest**2) <= n * EPS * np.sum(x**2):
            return np.float64(np.nan)
        value = distance[name](rest)
        return max(1 - share * (1 - value), np.float64(0)) if ridged else value

    return {
        name: to_distances([ablate(name, part) for part in parts], (len(parts),))
        for name in metrics
    }


def eigh(a: Real, *, vectors: bool) -> dict[str, Array]:
    """Return ascending eigenvalues (…, n) and eigenvectors (…, n, n) of symmetric a, by LAPACK."""
    if not vectors:
        return {"values": np.linalg.eigvalsh(a)}
    w, v = np.linalg.eigh(a)
    return {"values": w, "vectors": v}


def svd(a: Real, *, vectors: bool) -> dict[str, Array]:
    """Return descending singular values (…, k) and vectors of a (…, m, n), by LAPACK."""
    if not vectors:
        return {"values": np.linalg.svd(a, compute_uv=False)}
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return {"left": u, "values": s, "right": vh}
