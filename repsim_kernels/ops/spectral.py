"""The n x n stage on its own: distances of ablations from Grams, and spectra of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repsim_kernels import _check, _dispatch, _metrics, _options
from repsim_kernels._typing import Array
from repsim_kernels.errors import ConvergenceError
from repsim_kernels.ops.ablation import public_result

GRAM_METRICS = tuple(m.name for m in _metrics.METRICS if m.ablation and m.from_gram)


def gram_ablation_distances(
    gram: Any,
    parts: Any,
    *,
    metrics: Sequence[str] = GRAM_METRICS,
    ridge: float = 0.1,
    penalty: float = 0.0,
    neurons: int | None = None,
    info: bool = False,
    backend: str | None = None,
) -> Any:
    """Distances between a Gram matrix and what is left of it without each of its parts.

    For whoever sums Grams elsewhere, over batches of neurons or over machines: with
    ``gram = centered_gram(x)`` and ``parts = cell_grams(x, cells)`` these are the distances of
    `ablation_distances`, which has the activations as well and keeps more digits where little is
    left of a direction.

    Parameters
    ----------
    gram : array, (n, n), float16 | bfloat16 | float32 | float64
        Of all neurons: n >= 2 stimuli (n >= 4 for "cka_debiased"). Symmetric; centred here if it
        isn't. float64 is what keeps the digits.
    parts : array, (C, n, n), of the same library and device
        What each ablation removes of it.
    metrics : sequence of str
        Among "cka", "cka_debiased", "procrustes" (the squared form), "cca", "cca_squared" and
        "svcca" (99 % of the variance). "pwcca" needs the activations.
    ridge : float
        Relative ridge of cca and cca_squared: κ = ridge · tr(K) / n on each side; ignored where
        `penalty` > 0. At most 1e10.
    penalty : float
        Absolute ridge κ of the same, on both sides, in gram's units. At most 1e150.
    neurons : int, optional
        How many there are: ridge CCA averages over min(n - 1, neurons). By default n - 1 or more.
    info : bool
        Whether to tell as well how each distance was found.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of gram.

    Returns
    -------
    distances : dict of str to array like gram, (C,), float64
        1 - similarity, "procrustes" 2 - 2·similarity. A part of zeros has exactly the
        self-distance; a part that leaves nothing has NaN.
    info : dict of str to Info, only with ``info=True``
        The ``route`` to each distance and the ``steps`` it took, as of `ablation_distances`.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable
    ConvergenceError
        For "cca" and "cca_squared", a ridge below 1e-10 but not 0, or as small a penalty.

    Warns
    -----
    DegenerateWarning
        CCA without a ridge, as in `ablation_distances`.

    Notes
    -----
    A few times n³ operations a part: products in the original's eigenbasis, Riccati iterations and
    Cholesky solves; an eigenproblem a part for "svcca" alone, and where iterations would crawl.
    Source: METRICS, "One original, many ablations".
    """
    names = _options.check_choices(metrics, "metrics", GRAM_METRICS)
    ridge, penalty = _options.check_ridge_and_penalty(ridge, penalty)
    if neurons is not None:
        neurons = _options.check_count(neurons, "neurons")
    info = _options.check_flag(info, "info")
    least = 4 if "cka_debiased" in names else 2
    gram, parts, source = _check.check_gram_and_parts(gram, parts, min_stimuli=least)
    _options.warn_without_ridge(names, ridge, penalty)
    found = _dispatch.call(
        "gram_ablation_distances",
        backend,
        source,
        gram,
        parts,
        metrics=names,
        ridge=ridge,
        penalty=penalty,
        neurons=neurons,
    )
    return public_result(found, info)


def eigh(a: Any, *, vectors: bool = True, backend: str | None = None) -> Any:
    """Eigenvalues and eigenvectors of symmetric matrices, many at a time.

    Parameters
    ----------
    a : array, (…, n, n), float32 | float64
        Symmetric; other dtypes are taken as float64.
    vectors : bool
        Whether eigenvectors are wanted.
    backend : {"reference", "torch", "cupy"}, optional
        What computes it; by default chosen by the kind and the device of a. "cupy": Jacobi
        rotations in shared memory for n <= 128, all matrices at once; cuSOLVER's batches above,
        whose results are checked. A matrix that either fails on is solved again by PyTorch.

    Returns
    -------
    w : array like a, (…, n)
        Eigenvalues, ascending, in a's units.
    v : array like a, (…, n, n), only with ``vectors=True``
        Orthonormal eigenvectors as columns, of free sign.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, ConvergenceError, BackendUnavailable

    Notes
    -----
    PyTorch and LAPACK take one matrix after the other where n > 32.
    Source: Golub & Van Loan 2013, 8.5 (Jacobi methods).
    """
    found = _decompose("eigh", a, vectors, backend, symmetric=True)
    return (found["values"], found["vectors"]) if vectors else found["values"]


def svd(a: Any, *, vectors: bool = True, backend: str | None = None) -> Any:
    """Singular values and vectors of matrices, many at a time.

    Parameters
    ----------
    a : array, (…, m, n), float32 | float64
        Other dtypes are taken as float64.
    vectors : bool
        Whether singular vectors are wanted.
    backend : {"reference", "torch", "cupy"}, optional
        What computes it; by default chosen by the kind and the device of a. "cupy": one-sided
        Jacobi rotations in shared memory where neither side is above 128, all matrices at once.

    Returns
    -------
    u : array like a, (…, m, k), only with ``vectors=True``
        Left singular vectors as columns, k = min(m, n).
    s : array like a, (…, k)
        Singular values, descending, in a's units. The only result with ``vectors=False``.
    vh : array like a, (…, k, n), only with ``vectors=True``
        Right singular vectors as rows.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, ConvergenceError, BackendUnavailable

    Notes
    -----
    Source: Golub & Van Loan 2013, 8.6 (one-sided Jacobi, Hestenes).
    """
    found = _decompose("svd", a, vectors, backend, symmetric=False)
    return (found["left"], found["values"], found["right"]) if vectors else found["values"]


def _decompose(
    operation: str, a: Any, vectors: bool, backend: str | None, *, symmetric: bool
) -> dict[str, Array]:
    vectors = _options.check_flag(vectors, "vectors")
    a, source = _check.check_matrices(a, "a", symmetric=symmetric)
    found: dict[str, Array] = _dispatch.call(
        operation, backend, source, _check.at_least_float32(a), vectors=vectors
    )
    failed = int(found["failed"].sum()) if "failed" in found else 0
    if failed:
        another = " (backend='torch' has another method)" if operation == "svd" else ""
        raise ConvergenceError(
            f"a: {failed} matrices of shape {tuple(a.shape)} did not converge; "
            f"expected matrices that the solvers finish{another}"
        )
    return found
