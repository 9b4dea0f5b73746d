"""A metric over all pairs of representations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repsim_kernels.reference.cca import cca, pwcca, svcca
from repsim_kernels.reference.cka import cka
from repsim_kernels.reference.gram import Array, Real
from repsim_kernels.reference.neighbours import cknna, jaccard_knn, mutual_knn
from repsim_kernels.reference.predictivity import linear_predictivity
from repsim_kernels.reference.procrustes import procrustes, procrustes_distance
from repsim_kernels.reference.rsa import rsa

METRICS: dict[str, Callable[..., Any]] = {
    "cka": cka,
    "cka_debiased": lambda x, y, **options: cka(x, y, debiased=True, **options),
    "cca": cca,
    "svcca": svcca,
    "pwcca": pwcca,
    "procrustes": procrustes,
    "procrustes_distance": procrustes_distance,
    "rsa": rsa,
    "linear_predictivity": linear_predictivity,
    "mutual_knn": mutual_knn,
    "cknna": cknna,
    "jaccard_knn": jaccard_knn,
}


def pairwise(
    xs: Sequence[Real], ys: Sequence[Real] | None = None, *, metrics: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return metrics of every x (n, p_i) with every y (n, q_j), (L, M); ys default to xs.

    ``metrics`` maps their names to their options.
    """
    ys = xs if ys is None else ys
    return {name: _compare(METRICS[name], xs, ys, options) for name, options in metrics.items()}


def _compare(
    function: Callable[..., Any], xs: Sequence[Real], ys: Sequence[Real], options: dict[str, Any]
) -> Array | dict[str, Array]:
    values = [[function(x, y, **options) for y in ys] for x in xs]
    if not isinstance(values[0][0], dict):
        return np.array(values)
    return {key: np.array([[v[key] for v in row] for row in values]) for key in values[0][0]}
