"""Orthogonal Procrustes similarity and distances."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def procrustes(x: Any, y: Any, *, batched: bool = False, backend: str | None = None) -> Array:
    """Orthogonal Procrustes similarity: ‖xcᵀyc‖_* / (‖xc‖ ‖yc‖).

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 2 stimuli. Integers are taken as float64.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]: the cosine of the best alignment by a rotation. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    A p x q matrix is made only where both are smaller than n. Invariant to rotation, isotropic
    scale and shift of either side. Source: Williams et al. 2021; Ding et al. 2021.
    """
    x, y, source = _check.check_pair(x, y, batched=batched)
    return _dispatch.call("procrustes", backend, source, x, y)


def procrustes_distance(
    x: Any, y: Any, *, form: str = "squared", batched: bool = False, backend: str | None = None
) -> Array:
    """Orthogonal Procrustes distance.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 2 stimuli. Integers are taken as float64.
    form : {"squared", "angular", "size-and-shape"}
        With s the similarity of `procrustes`: 2 - 2s, the squared distance of both scaled to unit
        Frobenius norm, in [0, 2]; arccos s, in radians, in [0, π/2]; or, without scaling,
        √(‖xc‖² + ‖yc‖² - 2‖xcᵀyc‖_*), in x's units.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    distance : array like x, (…), float64

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    Source: Ding et al. 2021 ("squared"); Williams et al. 2021 ("angular", "size-and-shape").
    """
    form = _options.check_choice(form, "form", ("squared", "angular", "size-and-shape"))
    x, y, source = _check.check_pair(x, y, batched=batched)
    return _dispatch.call("procrustes_distance", backend, source, x, y, form=form)
