"""Orthogonal Procrustes similarity and distances."""

from __future__ import annotations

from repsim_kernels import _check, _dispatch, _gradients, _options
from repsim_kernels._typing import Array, ArrayLike


def procrustes(
    x: ArrayLike, y: ArrayLike, *, batched: bool = False, backend: str | None = None
) -> Array:
    """Orthogonal Procrustes similarity: ‖xcᵀyc‖_* / (‖xc‖ ‖yc‖), for centred xc and yc.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n >= 2 stimuli. Integers are converted to float64.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]: the cosine between x and y after the best rotation. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    A p x q matrix is formed only if both sides are smaller than n. Invariant to rotation, isotropic
    scaling and translation of either side.
    The result for tensors that require grad can be differentiated once, by a closed form in
    float64: see docs/compare.md, "A similarity as a loss".
    Source: Williams, Kunz, Kornblith & Linderman 2021, "Generalized Shape Metrics on Neural
    Representations", NeurIPS; Ding, Denain & Steinhardt 2021, "Grounding Representation Similarity
    Through Statistical Testing", NeurIPS.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.procrustes(x, y)), 3)
    0.729
    >>> rotation = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    >>> round(float(rk.procrustes(x, x @ rotation)), 3)
    1.0
    """
    arguments = x, y
    x, y, source = _check.check_pair(x, y, batched=batched, accept_grad=True)
    similarity = _dispatch.call("procrustes", backend, source, x, y)
    return _gradients.attach(similarity, "procrustes", *arguments)


def procrustes_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    form: str = "squared",
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Orthogonal Procrustes distance, in one of three forms.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n >= 2 stimuli. Integers are converted to float64.
    form : {"squared", "angular", "size-and-shape"}
        With s the similarity of `procrustes`: "squared" is 2 - 2s, the squared distance after
        scaling both sides to unit Frobenius norm; "angular" is arccos s; "size-and-shape" does not
        scale, and is √(‖xc‖² + ‖yc‖² - 2‖xcᵀyc‖_*).
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    distance : array like x, (…), float64
        "squared": in [0, 2], dimensionless; "angular": in [0, π/2], radians; "size-and-shape": at
        least 0, in x's units.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    "angular", "size-and-shape" and the square root of "squared" are metrics; "squared" violates the
    triangle inequality.
    Source: Ding, Denain & Steinhardt 2021, "Grounding Representation Similarity Through Statistical
    Testing", NeurIPS ("squared"); Williams, Kunz, Kornblith & Linderman 2021, "Generalized Shape
    Metrics on Neural Representations", NeurIPS ("angular", "size-and-shape").

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.procrustes_distance(x, y)), 3)
    0.542
    >>> round(float(rk.procrustes_distance(x, y, form="angular")), 3)
    0.754
    """
    form = _options.check_form(form)
    x, y, source = _check.check_pair(x, y, batched=batched)
    return _dispatch.call("procrustes_distance", backend, source, x, y, form=form)
