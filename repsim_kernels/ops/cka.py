"""Centred kernel alignment."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def cka(
    x: Any,
    y: Any,
    *,
    debiased: bool = False,
    kernel: str = "linear",
    sigma: float | None = None,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Centred kernel alignment, a similarity.

    ⟨K, L⟩ / (‖K‖ ‖L‖) for the centred Gram matrices K of x and L of y; debiased, HSIC₁ of
    Song et al. in the place of all three products.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n stimuli (n >= 2, debiased n >= 4). Integers are taken as
        float64.
    debiased : bool
        Use the unbiased estimator of HSIC: it does not grow with p, and may be negative.
    kernel : {"linear", "rbf"}
    sigma : float, optional
        Bandwidth of the RBF kernel, as a fraction of the median distance: 1e-10 … 1e5, 1 unless
        given.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]; debiased, in [-1, 1]. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Warns
    -----
    DegenerateWarning
        Not debiased, and more than 0.5 on average when the stimuli of one side are permuted:
        tr K tr L / ((n - 1) ‖K‖ ‖L‖), which nears 1 as neurons outnumber stimuli (Murphy et al.
        2024). Once in a process, with that number.

    Notes
    -----
    Works on features where that is cheaper than the n x n Grams. Invariant to rotation, isotropic
    scale and shift of either side.
    Source: Kornblith et al. 2019; Song et al. 2012; Székely & Rizzo 2014 for the debiased form.
    """
    debiased = _options.check_flag(debiased, "debiased")
    sigma = _options.check_bandwidth(kernel, sigma)
    x, y, source = _check.check_pair(
        x, y, min_stimuli=4 if debiased else 2, defer_finite=True, batched=batched
    )
    options: dict[str, Any] = {"debiased": debiased, "kernel": kernel, "sigma": sigma}
    if not _options.may_be_high_by_chance(x.shape[-2], x.shape[-1], y.shape[-1], debiased, kernel):
        value = _dispatch.call("cka", backend, source, x, y, **options)
        return _check.raise_if_nan(value, _check.UNDEFINED_CKA, x=x, y=y)
    found = _dispatch.call("cka", backend, source, x, y, **options, chance=True)
    value = _check.raise_if_nan(found["similarity"], _check.UNDEFINED_CKA, x=x, y=y)
    _options.warn_if_high_by_chance(float(found["chance"].max()))
    return value
