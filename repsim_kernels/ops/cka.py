"""Centred kernel alignment."""

from __future__ import annotations

import functools
from typing import Any

from repsim_kernels import _check, _check_matrices, _dispatch, _gradients, _options
from repsim_kernels._typing import Array, ArrayLike

KERNELS = (*_options.KERNELS, "precomputed")
UNDEFINED = (
    "x or y: its kernel matrix is zero after centring (all stimuli are equally far apart), or the "
    "median distance is 0 and 'rbf' has no bandwidth; expected distances that differ"
)


def cka(
    x: ArrayLike,
    y: ArrayLike,
    *,
    debiased: bool = False,
    kernel: str = "linear",
    sigma: float | None = None,
    batched: bool = False,
    precision: str = "float32",
    backend: str | None = None,
) -> Array:
    """Centred kernel alignment (CKA), a similarity.

    ⟨K, L⟩ / (‖K‖ ‖L‖) for the centred Gram matrices K of x and L of y. If debiased, HSIC₁ of
    Song et al. replaces the inner product in all three places.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n stimuli (n >= 2, or n >= 4 if debiased). Integers are converted
        to float64. With kernel="precomputed" kernel matrices, (n, n), symmetric up to 1e-5 of their
        largest entry; they are made exactly symmetric, and centred, in float64.
    debiased : bool
        Use the unbiased estimator of HSIC: the result does not grow with p, and may be negative.
    kernel : {"linear", "rbf", "precomputed"}
        Kernel of both Gram matrices. "precomputed": x and y are kernel matrices of any kernel,
        whether or not they are centred. If debiased, their diagonals have no effect.
    sigma : float, optional
        Bandwidth of the RBF kernel as a fraction of the median distance, 1e-10 … 1e5; by default 1.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    precision : {"float32", "float64"}
        How linear CKA multiplies features of at most 32 bits; float64 input is always multiplied
        in float64. "float32" sums its products in float64, and the similarity is within 1e-6: data
        for which that can't be had, such as features far from zero, are multiplied in float64.
        The other kernels are always computed in float64.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]; if debiased, or if a kernel matrix has negative eigenvalues, in [-1, 1].
        Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Warns
    -----
    DegenerateWarning
        If not debiased, and the mean over permutations of one side's stimuli exceeds 0.5. That mean
        is tr K tr L / ((n - 1) ‖K‖ ‖L‖), which approaches 1 as neurons outnumber stimuli (Murphy
        et al. 2024). The message states it, and is shown once per process.

    Notes
    -----
    Computed from the features if that is cheaper than from the n x n Gram matrices. Invariant to
    rotation, isotropic scaling and translation of either side. Gram matrices of features that are
    far from zero have lost digits before they are centred here: centre the features first. 1 - CKA
    is not a metric: it violates the triangle inequality.
    The result for tensors that require grad can be differentiated once, by a closed form in
    float64: see docs/compare.md, "A similarity as a loss".
    Source: Kornblith, Norouzi, Lee & Hinton 2019, "Similarity of Neural Network Representations
    Revisited", ICML; for the debiased form Song, Smola, Gretton, Bedo & Borgwardt 2012, JMLR 13,
    and Székely & Rizzo 2014, Annals of Statistics 42; for the warning Murphy, Zylberberg & Fyshe
    2024, "Correcting Biased Centered Kernel Alignment Measures in Biological and Artificial Neural
    Networks", Re-Align workshop at ICLR.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))  # 100 stimuli, 10 neurons
    >>> y = x + rng.standard_normal((100, 10))  # another layer, the same stimuli
    >>> round(float(rk.cka(x, y)), 3)
    0.552
    >>> round(float(rk.cka(x, y, debiased=True)), 3)
    0.509
    >>> round(float(rk.cka(x, y, kernel="rbf", sigma=0.5)), 3)
    0.635
    >>> round(float(rk.cka(x @ x.T, y @ y.T, kernel="precomputed")), 3)
    0.552
    """
    debiased = _options.check_flag(debiased, "debiased")
    sigma = _options.check_bandwidth(kernel, sigma, KERNELS)
    precision = _options.check_product_precision(precision)
    arguments, checks = (x, y), choose_check(kernel, debiased)
    x, y, source = _check.check_pair(x, y, batched=batched, accept_grad=True, **checks)
    n, p, q = x.shape[-2], x.shape[-1], y.shape[-1]
    options: dict[str, Any] = {
        "debiased": debiased,
        "kernel": kernel,
        "sigma": sigma,
        "precision": precision,
    }
    # Kernel matrices have been checked in full.
    deferred = {} if kernel == "precomputed" else {"x": x, "y": y}
    chance = None
    if not _options.may_be_high_by_chance(n, p, q, debiased, kernel):
        similarity = _dispatch.call("cka", backend, source, x, y, **options)
    else:
        result = _dispatch.call("cka", backend, source, x, y, **options, chance=True)
        similarity, chance = result["similarity"], result["chance"]
    _check.raise_if_nan(similarity, UNDEFINED, **deferred)
    if chance is not None:
        _options.warn_if_high_by_chance(float(chance.max()))
    return _gradients.attach(
        similarity, "cka", *arguments, debiased=debiased, kernel=kernel, sigma=sigma
    )


def choose_check(kernel: str, debiased: bool) -> dict[str, Any]:
    """Return how to check the two arguments: options of `_check.check_pair`."""
    if kernel == "precomputed":
        check = functools.partial(_check_matrices.check_kernel_matrix, debiased=debiased)
        return {"check": check}
    return {"min_stimuli": 4 if debiased else 2, "defer": True}
