"""Representational similarity analysis."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def rsa(
    x: Any,
    y: Any,
    *,
    distance: str = "euclidean",
    compare: str = "spearman",
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Representational similarity analysis: the correlation of two vectors of distances.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 3 stimuli. Integers are taken as float64.
    distance : {"euclidean", "sqeuclidean", "correlation", "cosine"}
        Between the rows of x as they are given, as SciPy's ``pdist``. "correlation" and "cosine"
        depend on where zero is: subtract ``x.mean(0)`` first for those of the centred patterns.
    compare : {"spearman", "pearson", "cosine"}
        How the n(n - 1)/2 distances of both sides are compared; ties (see Notes) get their mean
        rank.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
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
        A constant representation, distances that are equal up to rounding (they correlate with
        nothing), or for "correlation" and "cosine" a row that is constant or zero.

    Notes
    -----
    Distances come from one Gram matrix, n² p operations; those of nearly identical stimuli from
    their features.

    Which distances tie (for "spearman") does not depend on the machine, or on the order of stimuli
    and neurons. Stimuli whose rows are equal count as one when distances are computed, so that
    repeats tie exactly. Other distances are equal if rounding alone can part them: the tolerance
    of a distance is twice what float64 arithmetic and half an ulp of each input entry may change it
    by. In order of size, distances form groups that are more than 4 tolerances apart. The members
    of a group, m different numbers, tie if they lie within the tolerance of the first, and the next
    distances on either side are more than 256 / (m - 1) tolerances away: with 2,000 stimuli,
    float32's rounding is as wide as the gaps between distances, and pairs that come close by chance
    must not tie. The rule is also applied with the tolerance of float64 arithmetic alone. NumPy's
    arrays of bfloat16, and all with ``backend="reference"``, count as float32.
    Source: Kriegeskorte et al. 2008.
    """
    distance, compare = _options.check_rsa_options(distance, compare)
    x, y, source = _check.check_pair(x, y, min_stimuli=3, batched=batched)
    value = _dispatch.call("rsa", backend, source, x, y, distance=distance, compare=compare)
    return _check.raise_if_nan(value, _check.UNDEFINED_RSA)
