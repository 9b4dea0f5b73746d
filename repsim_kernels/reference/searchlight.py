"""RDMs of searchlights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels._cell_sets import SparseCells
from repsim_kernels._noise import Noise
from repsim_kernels.reference.gram import Array, Real
from repsim_kernels.reference.rdm import rdm
from repsim_kernels.reference.rdm_comparison import compare_rdms


def searchlight(
    x: Real,
    *,
    neighbours: SparseCells,
    distance: str,
    groups: Any,
    noise: Noise | None,
    scale: float,
    models: Array | None,
    method: str,
) -> Array:
    """Return the RDM of each sphere, float32 (C, N), or its similarities to models, (C, M).

    x is multiplied by ``scale`` first.
    NaN where a distance or a comparison is undefined, and for a sphere without neurons.
    """
    n = len(x) if groups is None else groups.shape[1]
    x = x.astype(np.float64) * scale
    rdms = np.full((len(neighbours), n * (n - 1) // 2), np.nan, dtype=np.float32)
    for c in range(len(neighbours)):
        members = neighbours.members(c)
        if len(members):
            own = None if noise is None else _select(noise, members)
            rdms[c] = rdm(x[:, members], distance=distance, groups=groups, noise=own)
    if models is None:
        return rdms
    undefined = np.isnan(rdms).any(1)
    similarities = np.full((len(rdms), len(models)), np.nan)
    similarities[~undefined] = compare_rdms(rdms[~undefined], models, method=method)
    return similarities


def _select(noise: Noise, members: NDArray[np.int64]) -> Noise:
    """Return the noise of one set of neurons."""
    batch = noise.select(members[None])
    if batch.variances is not None:
        return batch._replace(variances=batch.variances[0])
    if batch.residuals is not None:
        return batch._replace(residuals=batch.residuals[0])
    return batch._replace(covariance=batch.covariance[0])
