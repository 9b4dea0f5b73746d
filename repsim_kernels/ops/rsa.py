"""Representational similarity analysis."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._arrays import Array


def rsa(
    x: Any,
    y: Any,
    *,
    distance: str = "euclidean",
    compare: str = "spearman",
    backend: str | None = None,
) -> Array:
    """Representational similarity analysis: the correlation of two vectors of distances.

    Parameters
    ----------
    x, y : array, (…, n, p) and (…, n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 3 stimuli; leading dimensions broadcast. Integers are taken as
        float64.
    distance : {"euclidean", "sqeuclidean", "correlation", "cosine"}
        Between the rows of x as they are given, as SciPy's ``pdist``. "correlation" and "cosine"
        depend on where zero is: subtract ``x.mean(0)`` first for those of the centred patterns.
    compare : {"spearman", "pearson", "cosine"}
        How the n(n - 1)/2 distances of both sides are compared; ties have their mean rank.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [-1, 1]; "cosine" in [0, 1]. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        A constant representation, distances that are all equal (they correlate with nothing), or
        for "correlation" and "cosine" a row that is constant or zero.

    Notes
    -----
    Distances come from one Gram matrix, 2 n² p operations at most; those of nearly identical
    stimuli from their features. Source: Kriegeskorte et al. 2008.
    """
    distance, compare = _options.rsa_options(distance, compare)
    x, y = _check.pair(x, y, least=3)
    value = _dispatch.call("rsa", backend, x, y, distance=distance, compare=compare)
    return _check.defined(value, _check.NO_RSA)
