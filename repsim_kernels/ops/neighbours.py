"""Overlap of nearest neighbours between representations."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike

UNDEFINED = (
    "x or y: all its stimuli are equal (in direction, for 'cosine' and 'correlation'), or one is "
    "zero (for 'cosine') or constant (for 'correlation'); expected stimuli that differ"
)


def mutual_knn(
    x: ArrayLike,
    y: ArrayLike,
    k: int = 10,
    *,
    distance: str = "cosine",
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Mutual k-nearest neighbours: the share of its neighbours that a stimulus has in both.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n > k stimuli. Integers are converted to float64.
    k : int
        Number of neighbours of a stimulus, at least 1.
    distance : {"cosine", "euclidean", "sqeuclidean", "correlation"}
        Distance between the rows of x, and between those of y, as in SciPy's ``pdist``. The
        activations are not centred first.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1], and k / (n - 1) on average for unrelated representations. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        If all stimuli of a representation are equal (in direction, for "cosine" and "correlation"),
        or a row is zero (for "cosine") or constant (for "correlation").

    Notes
    -----
    The mean over stimuli i of ``|N_x(i) ∩ N_y(i)| / k``, where N(i) are the k nearest other
    stimuli. Huh et al. scale features to unit length first, which is the cosine distance.

    Which distances tie is decided among the distances from one stimulus, by the rule that `rsa`
    documents: it does not depend on the machine. Tied stimuli count in the order of their indices.
    With "correlation" and fewer than about ten neurons, rows are often nearly parallel, and whether
    they tie may depend on rounding.

    There is no n x n matrix. Tiles of float32 products find k + 7 candidates for each stimulus,
    whose distances are then computed from the features in float64. Where rounding or a tie leaves
    the neighbours open, all distances from that stimulus are. That is n² p operations and, next to
    the inputs, memory for one float32 copy of a representation.

    Source: Huh, Cheung, Wang & Isola 2024, "The Platonic Representation Hypothesis", ICML,
    appendix A.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.mutual_knn(x, y)), 3)
    0.28
    """
    return _compare("mutual_knn", x, y, k, batched, backend, distance=distance)


def jaccard_knn(
    x: ArrayLike,
    y: ArrayLike,
    k: int = 10,
    *,
    distance: str = "cosine",
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Jaccard similarity of the k nearest neighbours of each stimulus.

    Parameters
    ----------
    x, y, k, distance, batched, backend
        As in `mutual_knn`.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        As in `mutual_knn`.

    Notes
    -----
    The mean over stimuli i of ``|N_x(i) ∩ N_y(i)| / |N_x(i) ∪ N_y(i)|``, with the neighbours N(i)
    of `mutual_knn`, whose Notes say how they are found and which of equally distant ones count.
    ReSi uses k = 10 and cosine distances.

    Source: Klabunde et al. 2025, "ReSi: A comprehensive benchmark for representational similarity
    measures", ICLR.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.jaccard_knn(x, y)), 3)
    0.171
    """
    return _compare("jaccard_knn", x, y, k, batched, backend, distance=distance)


def cknna(
    x: ArrayLike,
    y: ArrayLike,
    k: int = 10,
    *,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Centred kernel nearest-neighbour alignment: CKA of the pairs that are neighbours in both.

    Parameters
    ----------
    x, y, k, batched, backend
        As in `mutual_knn`.

    Returns
    -------
    similarity : array like x, (…), float64
        In [-1, 1]. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, DeviceError, OptionError, BackendUnavailable
    ConstantError
        If all stimuli of a representation have one direction, or one of them is zero.

    Notes
    -----
    Rows are scaled to unit length, and K̄(i, j) is the product of rows i and j minus its mean over
    all j (equation 12 of the paper). With A(K, L) the sum of K̄(i, j) L̄(i, j) over the pairs in
    which stimulus j is one of the k nearest other stimuli of i for both K and L (16, 17), CKNNA is
    ``A(K, L) / √(A(K, K) A(L, L))`` (18). The neighbours are those of `mutual_knn` with cosine
    distances.

    Subtracting the mean over j alone is the paper's definition; it leaves the kernel centred on one
    side. With k = n - 1 the value is therefore not linear CKA, which also has the diagonal.

    The code that the authors published returns another number. It multiplies both kernels by the
    mask of shared neighbours without centring them, and then takes the unbiased estimator of HSIC
    (Song et al. 2012) of the two masked matrices, which are not symmetric and whose zeros count as
    values. It adds 1e-6 to the denominator, needs k of at least 2, and leaves scaling to unit
    length to the caller.

    Source: Huh, Cheung, Wang & Isola 2024, "The Platonic Representation Hypothesis", ICML,
    appendix A.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.cknna(x, y)), 3)
    0.302
    """
    return _compare("cknna", x, y, k, batched, backend)


def _compare(
    metric: str, x: Any, y: Any, k: Any, batched: Any, backend: str | None, **options: Any
) -> Array:
    k = _options.check_count(k, "k")
    if "distance" in options:
        _options.check_distance(options["distance"])
    x, y, source = _check.check_pair(x, y, batched=batched, **_check.require_neighbours(metric, k))
    similarity = _dispatch.call(metric, backend, source, x, y, k=k, **options)
    return _check.raise_if_nan(similarity, UNDEFINED)
