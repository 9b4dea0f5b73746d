"""Representational similarity analysis."""

from __future__ import annotations

from repsim_kernels import _check, _dispatch, _gradients, _options
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import OptionError

UNDEFINED = (
    "x or y: its distances are all equal, or a stimulus is zero (for 'cosine') or constant (for "
    "'correlation'); expected distances that differ"
)


def rsa(
    x: ArrayLike,
    y: ArrayLike,
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
        Activations for the same n >= 3 stimuli. Integers are converted to float64.
    distance : {"euclidean", "sqeuclidean", "correlation", "cosine"}
        Distance between the rows of x, and between those of y, as in SciPy's ``pdist``. The
        activations are not centred first, which affects "correlation" and "cosine": subtract
        ``x.mean(0)`` for the distances of centred patterns.
    compare : {"spearman", "pearson", "cosine"}
        How to compare the two vectors of n(n - 1)/2 distances. Tied distances (see Notes) get their
        mean rank.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [-1, 1]; with compare="cosine" in [0, 1]. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        If a representation is constant, or all its distances are equal up to rounding (their
        correlation is not defined), or a row is zero (for "cosine") or constant (for
        "correlation").

    Notes
    -----
    Distances are computed from one Gram matrix, n² p operations; those between nearly identical
    stimuli from their features.

    Which distances tie (for "spearman") does not depend on the machine, or on the order of the
    stimuli and neurons. Stimuli with equal rows count as one when distances are computed, so that
    repeated stimuli tie exactly. Other distances count as equal if rounding alone can explain
    their difference: the tolerance of a distance is twice the error that float64 arithmetic and
    half an ulp of each input entry can cause. Sorted by size, distances form groups that are more
    than 4 tolerances apart. The members of a group, m different numbers, tie if they lie within the
    tolerance of the first, and the next distances on either side are more than 256 / (m - 1)
    tolerances away: with 2,000 stimuli the rounding of float32 is as wide as the gaps between
    distances, and pairs that are close by chance must not tie. The rule is also applied with the
    tolerance of float64 arithmetic alone. NumPy arrays of bfloat16, and all arrays with
    ``backend="reference"``, count as float32.

    The result for tensors that require grad can be differentiated once, by a closed form in
    float64, unless ``compare="spearman"``: ranks have no gradient. See docs/compare.md, "A
    similarity as a loss".

    Source: Kriegeskorte, Mur & Bandettini 2008, "Representational similarity analysis: connecting
    the branches of systems neuroscience", Frontiers in Systems Neuroscience 2.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.rsa(x, y)), 3)
    0.457
    >>> round(float(rk.rsa(x, y, distance="correlation", compare="pearson")), 3)
    0.455
    """
    distance, compare = _options.check_rsa_options(distance, compare)
    arguments = x, y
    x, y, source = _check.check_pair(x, y, min_stimuli=3, batched=batched, accept_grad=True)
    if compare == "spearman" and _gradients.is_required(*arguments):
        raise OptionError(
            "compare: 'spearman' of a tensor that requires grad; expected 'pearson' or 'cosine', "
            "since ranks have no gradient, or a tensor that doesn't"
        )
    options = {"distance": distance, "compare": compare}
    similarity = _dispatch.call("rsa", backend, source, x, y, **options)
    _check.raise_if_nan(similarity, UNDEFINED)
    return _gradients.attach(similarity, "rsa", *arguments, **options)
