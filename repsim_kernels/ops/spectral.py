"""The n x n stage alone: distances of ablations from Gram matrices, and spectra of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from repsim_kernels import _check, _check_matrices, _dispatch, _metrics, _options
from repsim_kernels._routes import Info
from repsim_kernels._typing import Array, ArrayLike
from repsim_kernels.errors import ConvergenceError
from repsim_kernels.ops.ablation import min_stimuli, to_public_result

ALL_GRAM_METRICS = tuple(m.name for m in _metrics.METRICS if m.ablation and m.from_gram)
GRAM_METRICS = tuple(m for m in _metrics.list_default_ablation() if m in ALL_GRAM_METRICS)


@overload
def gram_ablation_distances(
    gram: ArrayLike,
    parts: ArrayLike,
    *,
    metrics: Sequence[str] | Literal["all"] = ...,
    ridge: float = ...,
    penalty: float = ...,
    compare: str = ...,
    sigma: float | None = ...,
    neurons: int | None = ...,
    info: Literal[False] = ...,
    backend: str | None = ...,
) -> dict[str, Array]: ...


@overload
def gram_ablation_distances(
    gram: ArrayLike,
    parts: ArrayLike,
    *,
    metrics: Sequence[str] | Literal["all"] = ...,
    ridge: float = ...,
    penalty: float = ...,
    compare: str = ...,
    sigma: float | None = ...,
    neurons: int | None = ...,
    info: Literal[True],
    backend: str | None = ...,
) -> tuple[dict[str, Array], dict[str, Info]]: ...


def gram_ablation_distances(
    gram: ArrayLike,
    parts: ArrayLike,
    *,
    metrics: Sequence[str] | Literal["all"] = GRAM_METRICS,
    ridge: float = 0.1,
    penalty: float = 0.0,
    compare: str = "spearman",
    sigma: float | None = None,
    neurons: int | None = None,
    info: bool = False,
    backend: str | None = None,
) -> dict[str, Array] | tuple[dict[str, Array], dict[str, Info]]:
    """Distances between a Gram matrix and the same matrix without each of its parts.

    For Gram matrices that are summed elsewhere, over batches of neurons or over machines. With
    ``gram = centered_gram(x)`` and ``parts = cell_grams(x, cells)`` these are the distances of
    `ablation_distances`, which also has the activations and is therefore more accurate if an
    ablation removes nearly all of the variance along a direction, or makes stimuli nearly equal.

    Parameters
    ----------
    gram : array, (n, n), float16 | bfloat16 | float32 | float64
        Gram matrix of all neurons, for n >= 2 stimuli (n >= 3 for "rsa_euclidean", n >= 4 for
        "cka_debiased"). Symmetric; it is centred first if necessary. Use float64 for accurate small
        distances.
    parts : array, (C, n, n), of the same library and device
        What each ablation removes from it.
    metrics : sequence of str, or str
        Any of "cka", "cka_debiased", "procrustes" (the squared form), "cca", "cca_squared" and
        "svcca" (99 % of the variance), which are the default; and of "rsa_euclidean" and "cka_rbf",
        which compare distances between stimuli. "all" means all eight. The other metrics of
        `ablation_distances` need the activations.
    ridge : float
        Relative ridge of "cca" and "cca_squared", at most 1e10: κ = ridge · tr(K) / n on each side,
        with its own Gram matrix K. Ignored if `penalty` is nonzero.
    penalty : float
        Absolute ridge κ of the same metrics, on both sides, in gram's units; at most 1e150.
    compare : {"spearman", "pearson", "cosine"}
        How "rsa_euclidean" compares distances, as in `rsa`.
    sigma : float, optional
        Bandwidth of "cka_rbf" as a fraction of the median distance, as in `cka`; by default 1.
    neurons : int, optional
        Number of neurons: ridge CCA averages over min(n - 1, neurons) correlations. By default it
        is assumed to be at least n - 1.
    info : bool
        Also return how each distance was computed.
    backend : {"reference", "torch", "triton"}, optional
        Backend to use; by default chosen by the library and device of gram.

    Returns
    -------
    distances : dict of str to array like gram, (C,), float64
        By metric: 1 - similarity; "procrustes": 2 - 2 times the similarity. Dimensionless. A part
        of zeros has exactly the distance of gram to itself; NaN for a part that leaves nothing, and
        where a similarity is not defined.
    info : dict of str to Info
        Only with ``info=True``; by metric the ``route`` and the ``steps`` of each distance, as in
        `ablation_distances`.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable
    ConvergenceError
        For "cca" and "cca_squared", if the ridge is nonzero but below 1e-10, or the penalty is
        equally small.

    Warns
    -----
    DegenerateWarning
        For CCA without a ridge, as in `ablation_distances`.

    Notes
    -----
    A few times n³ operations per part: products in the original's eigenbasis, Riccati iterations
    and Cholesky solves. An eigenproblem per part is solved for "svcca", on a CPU for "procrustes"
    (eigenvalues only), and otherwise if iterations would converge too slowly.
    Source: docs/metrics.md, "One original, many ablations".

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x = np.random.default_rng(0).standard_normal((50, 400))
    >>> cells = np.repeat([0, 1, 2, -1], [10, 40, 150, 200])
    >>> gram, parts = rk.centered_gram(x), rk.cell_grams(x, cells)
    >>> distances = rk.gram_ablation_distances(gram, parts, metrics=["cka", "procrustes"])
    >>> distances["cka"].round(3)
    array([0.001, 0.006, 0.034])
    """
    names = _options.check_metrics(metrics, ALL_GRAM_METRICS)
    compare, sigma, _ = _options.check_stimulus_options(compare, sigma)
    ridge, penalty = _options.check_ridge_and_penalty(ridge, penalty)
    if neurons is not None:
        neurons = _options.check_count(neurons, "neurons")
    info = _options.check_flag(info, "info")
    gram, parts, source = _check_matrices.check_gram_and_parts(gram, parts, min_stimuli(names))
    _options.warn_without_ridge(names, ridge, penalty)
    results = _dispatch.call(
        "gram_ablation_distances",
        backend,
        source,
        gram,
        parts,
        metrics=names,
        ridge=ridge,
        penalty=penalty,
        compare=compare,
        sigma=sigma,
        neurons=neurons,
    )
    return to_public_result(results, info)


@overload
def eigh(
    a: ArrayLike, *, vectors: Literal[True] = ..., backend: str | None = ...
) -> tuple[Array, Array]: ...


@overload
def eigh(a: ArrayLike, *, vectors: Literal[False], backend: str | None = ...) -> Array: ...


def eigh(
    a: ArrayLike, *, vectors: bool = True, backend: str | None = None
) -> tuple[Array, Array] | Array:
    """Eigenvalues and eigenvectors of a batch of symmetric matrices.

    Parameters
    ----------
    a : array, (…, n, n), float32 | float64
        Symmetric matrices; other dtypes are converted to float64.
    vectors : bool
        Whether to compute eigenvectors.
    backend : {"reference", "torch", "cupy"}, optional
        Backend to use; by default chosen by the library and device of a. "cupy" solves all matrices
        at once: for n <= 128 by Jacobi rotations in shared memory, for larger n by cuSOLVER's
        batched solver, whose results it checks. LAPACK solves the matrices for which these fail.

    Returns
    -------
    w : array like a, (…, n)
        Eigenvalues in ascending order, in a's units. The only result with ``vectors=False``.
    v : array like a, (…, n, n)
        Orthonormal eigenvectors as columns, with arbitrary signs.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, ConvergenceError, BackendUnavailable

    Notes
    -----
    On a CPU, LAPACK solves the matrices one after the other. On a GPU, "torch" calls cuSOLVER's
    batched solver for every n, with the same check, given CUDA 12.6.2 or newer; otherwise
    `torch.linalg.eigh`.
    Source: Golub & Van Loan 2013, *Matrix Computations*, 4th edition, section 8.5 (Jacobi methods).

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> w, v = rk.eigh(np.array([[2.0, 1.0], [1.0, 2.0]]))
    >>> w.round(6)
    array([1., 3.])
    >>> abs(v).round(3)
    array([[0.707, 0.707],
           [0.707, 0.707]])
    """
    results = _decompose("eigh", a, vectors, backend, symmetric=True)
    return (results["values"], results["vectors"]) if vectors else results["values"]


@overload
def svd(
    a: ArrayLike, *, vectors: Literal[True] = ..., backend: str | None = ...
) -> tuple[Array, Array, Array]: ...


@overload
def svd(a: ArrayLike, *, vectors: Literal[False], backend: str | None = ...) -> Array: ...


def svd(
    a: ArrayLike, *, vectors: bool = True, backend: str | None = None
) -> tuple[Array, Array, Array] | Array:
    """Singular values and vectors of a batch of matrices.

    Parameters
    ----------
    a : array, (…, m, n), float32 | float64
        Matrices; other dtypes are converted to float64.
    vectors : bool
        Whether to compute singular vectors.
    backend : {"reference", "torch", "cupy"}, optional
        Backend to use; by default chosen by the library and device of a. "cupy" solves all matrices
        at once by one-sided Jacobi rotations in shared memory, if neither side exceeds 128.

    Returns
    -------
    u : array like a, (…, m, k)
        Left singular vectors as columns, k = min(m, n).
    s : array like a, (…, k)
        Singular values in descending order, in a's units. The only result with ``vectors=False``.
    vh : array like a, (…, k, n)
        Right singular vectors as rows.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, ConvergenceError, BackendUnavailable

    Notes
    -----
    Source: Golub & Van Loan 2013, *Matrix Computations*, 4th edition, section 8.6 (one-sided
    Jacobi, Hestenes).

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> a = np.array([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> u, s, vh = rk.svd(a)
    >>> u.shape, s.round(6), vh.shape
    ((3, 2), array([3., 2.]), (2, 2))
    >>> np.allclose(u * s @ vh, a)
    True
    """
    results = _decompose("svd", a, vectors, backend, symmetric=False)
    if not vectors:
        return results["values"]
    return results["left"], results["values"], results["right"]


def _decompose(
    operation: str, a: Any, vectors: Any, backend: str | None, *, symmetric: bool
) -> dict[str, Array]:
    """Check the matrices, decompose them, and raise a ConvergenceError if any fails."""
    vectors = _options.check_flag(vectors, "vectors")
    a, source = _check_matrices.check_matrices(a, "a", symmetric=symmetric)
    results: dict[str, Array] = _dispatch.call(
        operation, backend, source, _check.at_least_float32(a), vectors=vectors
    )
    n_failed = int(results["failed"].sum()) if "failed" in results else 0
    if n_failed:
        hint = " (backend='torch' uses another method)" if operation == "svd" else ""
        raise ConvergenceError(
            f"a: {n_failed} matrices of shape {tuple(a.shape)} did not converge; "
            f"expected matrices that the solvers finish{hint}"
        )
    return results
