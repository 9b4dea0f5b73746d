"""Comparison of RDMs."""

from __future__ import annotations

import math

from repsim_kernels import _check, _check_matrices, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import ShapeError

METHODS = ("spearman", "pearson", "cosine", "kendall", "rho-a", "whitened")


def compare_rdms(
    a: ArrayLike,
    b: ArrayLike,
    *,
    method: str = "spearman",
    backend: str | None = None,
) -> Array:
    """Similarity of RDMs: of one with one, or of each of several with each of several.

    Parameters
    ----------
    a, b : array, (N,) or (A, N) and (N,) or (B, N), float16 | bfloat16 | float32 | float64
        Condensed RDMs of the same n >= 3 conditions, as `rdm` and SciPy's ``pdist`` return them:
        N = n(n - 1)/2 dissimilarities of the pairs (0, 1), (0, 2), …, (n - 2, n - 1). They may be
        negative. Integers are converted to float64.
    method : {"spearman", "pearson", "cosine", "kendall", "rho-a", "whitened"}
        "spearman" and "pearson" are correlations, "kendall" is τ-a, "rho-a" is Spearman's
        correlation with ties broken at random, and "whitened" is the whitened cosine; see Notes.
        For models whose dissimilarities tie, Schütt et al. (2023) recommend "rho-a".
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of a.

    Returns
    -------
    similarity : array like a, (), (A,), (B,) or (A, B), float64
        In [-1, 1]; 1 for equal RDMs, but below it for "kendall" and "rho-a" if values tie.
        Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        If an RDM has no similarity to others: all its values are equal (for "spearman" and
        "pearson") or 0 (for "cosine" and "whitened").

    Notes
    -----
    For values u and v, and for their ranks r and s less the mean rank (N + 1)/2, where equal values
    have their mean rank:

    * "pearson": Σ (u - ū)(v - v̄) / √(Σ (u - ū)² Σ (v - v̄)²); "cosine": Σ u v / √(Σ u² Σ v²)
    * "spearman": Σ r s / √(Σ r² Σ s²)
    * "rho-a": 12 Σ r s / (N³ - N), the mean of Spearman's correlation over all ways to break ties
    * "kendall": (concordant - discordant) / (N(N - 1)/2) pairs of values, τ-a; a pair that ties in
      one of the RDMs counts as 0
    * "whitened": uᵀV⁻¹v / √(uᵀV⁻¹u · vᵀV⁻¹v), where V is proportional to the covariance of the
      values if all patterns are equal and their noise is independent: the squared entries of C Cᵀ,
      where C (N, n) has 1 and -1 in the columns of each pair. Pass squared distances: for
      "sqeuclidean" it is linear CKA, and for "crossnobis" the whitened unbiased cosine. It is
      computed from doubly centred (n, n) matrices, without V.

    Only exactly equal values tie, whereas in `rsa` distances tie that differ by rounding alone. If
    RDMs were computed from categorical patterns, round them first, for example to float32.

    The time is proportional to A B N, and to N log N for each RDM if it is ranked; "kendall" takes
    A B N log² N. Next to the RDMs, memory is proportional to the smaller set of them.

    Source: Schütt, Kipnis, Diedrichsen & Kriegeskorte 2023, "Statistical inference on
    representational geometries", eLife 12, for "rho-a"; Nili et al. 2014, "A toolbox for
    representational similarity analysis", PLOS Computational Biology 10, for "kendall"; Diedrichsen
    et al. 2021, "Comparing representational geometries using whitened unbiased-distance-matrix
    similarity", Neurons, Behavior, Data Analysis, and Theory 5, for "whitened".

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> measured = rng.random((2, 6))  # two RDMs of 4 conditions
    >>> model = [0, 1, 1, 1, 1, 0]  # conditions 0 and 1 are alike, and so are 2 and 3
    >>> rk.compare_rdms(measured, model, method="rho-a").round(3)
    array([-0.514,  0.514])
    >>> rk.compare_rdms(measured, measured, method="kendall").shape
    (2, 2)
    """
    _options.check_choice(method, "method", METHODS)
    a, source = _check_matrices.check_rdms(a, "a")
    b, b_source = _check_matrices.check_rdms(b, "b")
    _check.check_same_source(source, b_source, "a", "b")
    if a.shape[-1] != b.shape[-1]:
        raise ShapeError(
            f"b: {b.shape[-1]} dissimilarities, but a has {a.shape[-1]}; expected RDMs of the same "
            "conditions in the same order"
        )
    similarity = _dispatch.call("compare_rdms", backend, source, a, b, method=method)
    if math.isnan(float(similarity.sum())):
        for rdms, name in ((a, "a"), (b, "b")):
            _check_matrices.raise_if_undefined(rdms, name, method)
    return similarity
