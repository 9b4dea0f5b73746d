"""Canonical correlation: mean, singular-vector and projection-weighted."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def cca(
    x: Any,
    y: Any,
    *,
    squared: bool = False,
    ridge: float = 0.0,
    penalty: float = 0.0,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Mean canonical correlation, a similarity.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 2 stimuli. Integers are taken as float64.
    squared : bool
        The mean of ρ² (R²CCA) in the place of that of ρ.
    ridge : float
        Relative ridge on both sides: κ = ridge · tr(K) / n, each side by its own Gram K.
        At most 1e10.
    penalty : float
        Absolute ridge on both sides: κ, in x's units squared, added to the scatter matrix xcᵀxc.
        At most 1e150, and at most one of the two.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]; the mean is over min(rank x, rank y), with a ridge over min(n - 1, p, q). With a
        ridge a representation is less than 1 similar to itself. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Warns
    -----
    DegenerateWarning
        No ridge and as many neurons as stimuli: every correlation is 1.

    Notes
    -----
    Source: Hotelling 1936; Vinod 1976 and Tuzhilina et al. 2021 for the ridge (their λ is
    penalty / (n - 1)); Kornblith et al. 2019 for R²CCA.
    """
    squared = _options.check_flag(squared, "squared")
    ridge, penalty = _options.check_ridge_or_penalty(ridge, penalty)
    x, y, source = _check.check_pair(x, y, batched=batched)
    _options.warn_if_degenerate("cca", x.shape[-2], x.shape[-1], y.shape[-1], ridge, penalty)
    return _dispatch.call(
        "cca", backend, source, x, y, squared=squared, ridge=ridge, penalty=penalty
    )


def svcca(
    x: Any, y: Any, *, variance: float = 0.99, batched: bool = False, backend: str | None = None
) -> Array:
    """Singular-vector canonical correlation, a similarity.

    The mean canonical correlation of the fewest leading principal components that explain a share
    ``variance`` of each side's variance.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 2 stimuli. Integers are taken as float64.
    variance : float
        Share of the variance to keep, in (0, 1].
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]; the mean is over the smaller of the two numbers of components. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    Source: Raghu et al. 2017.
    """
    variance = _options.check_number(variance, "variance", low=0, high=1, exclude_low=True)
    x, y, source = _check.check_pair(x, y, batched=batched)
    return _dispatch.call("svcca", backend, source, x, y, variance=variance)


def pwcca(
    x: Any,
    y: Any,
    *,
    ridge: float = 0.0,
    penalty: float = 0.0,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Projection-weighted canonical correlation, a similarity; **not symmetric**.

    Σ wᵢ ρᵢ with weights wᵢ ∝ Σⱼ |⟨hᵢ, xⱼ⟩| over the neurons xⱼ of the first argument, hᵢ its
    canonical variates; they sum to 1 over the directions kept.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 2 stimuli. Integers are taken as float64. x gives the
        weights.
    ridge : float
        Relative ridge on both sides: κ = ridge · tr(K) / n, each side by its own Gram K.
        At most 1e10.
    penalty : float
        Absolute ridge on both sides: κ, in x's units squared, added to the scatter matrix xcᵀxc.
        At most 1e150, and at most one of the two.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]. With a ridge the variates carry the shrinkage, and a representation is less than
        1 similar to itself. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Warns
    -----
    DegenerateWarning
        No ridge, and as many neurons as stimuli: every correlation is 1. Or p + q > n: several
        are, their variates are not unique, and with them the weights.

    Notes
    -----
    One pass over x beside the spectra, 2 n² p operations; the n x p products with the neurons are
    made a block at a time, in x's precision.
    Source: Morcos et al. 2018.
    """
    ridge, penalty = _options.check_ridge_or_penalty(ridge, penalty)
    x, y, source = _check.check_pair(x, y, batched=batched)
    _options.warn_if_degenerate("pwcca", x.shape[-2], x.shape[-1], y.shape[-1], ridge, penalty)
    return _dispatch.call("pwcca", backend, source, x, y, ridge=ridge, penalty=penalty)
