"""Canonical correlation: mean, singular-vector and projection-weighted."""

from __future__ import annotations

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike


def cca(
    x: ArrayLike,
    y: ArrayLike,
    *,
    squared: bool = False,
    ridge: float = 0.0,
    penalty: float = 0.0,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Mean canonical correlation (CCA), a similarity.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n >= 2 stimuli. Integers are converted to float64.
    squared : bool
        Return the mean of ρ² (R²CCA) instead of the mean of ρ.
    ridge : float
        Relative ridge on both sides, at most 1e10: κ = ridge · tr(K) / n, with each side's own Gram
        matrix K.
    penalty : float
        Absolute ridge on both sides, at most 1e150: κ itself, added to the scatter matrix xcᵀxc, in
        x's units squared. At most one of `ridge` and `penalty` may be nonzero.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]. The mean over min(rank x, rank y) correlations; with a ridge, over
        min(n - 1, p, q), and the similarity of a representation to itself is less than 1.
        Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Warns
    -----
    DegenerateWarning
        Without a ridge, if either side has at least n neurons: every correlation is 1.

    Notes
    -----
    Neither 1 - mean ρ nor 1 - mean ρ² is a metric: both violate the triangle inequality.
    Source: Hotelling 1936, "Relations Between Two Sets of Variates", Biometrika 28; for the ridge
    Vinod 1976, Journal of Econometrics 4, and Tuzhilina, Tozzi & Hastie 2021, Statistical Modelling
    (their λ is penalty / (n - 1)); for R²CCA Kornblith, Norouzi, Lee & Hinton 2019, ICML.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x + rng.standard_normal((100, 10))
    >>> round(float(rk.cca(x, y)), 3)
    0.719
    >>> round(float(rk.cca(x, y, ridge=0.1)), 3)
    0.711
    """
    squared = _options.check_flag(squared, "squared")
    ridge, penalty = _options.check_ridge_or_penalty(ridge, penalty)
    x, y, source = _check.check_pair(x, y, batched=batched)
    _options.warn_if_degenerate("cca", x.shape[-2], x.shape[-1], y.shape[-1], ridge, penalty)
    return _dispatch.call(
        "cca", backend, source, x, y, squared=squared, ridge=ridge, penalty=penalty
    )


def svcca(
    x: ArrayLike,
    y: ArrayLike,
    *,
    variance: float = 0.99,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Singular-vector canonical correlation (SVCCA), a similarity.

    The mean canonical correlation of each side's leading principal components: the fewest that
    explain the fraction `variance` of its variance.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n >= 2 stimuli. Integers are converted to float64.
    variance : float
        Fraction of the variance to keep, in (0, 1].
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]; the mean over the smaller of the two numbers of components. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    1 - SVCCA is not a metric: it violates the triangle inequality.
    Source: Raghu, Gilmer, Yosinski & Sohl-Dickstein 2017, "SVCCA: Singular Vector Canonical
    Correlation Analysis for Deep Learning Dynamics and Interpretability", NeurIPS.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10)) * 0.5 ** np.arange(10)  # a few strong directions
    >>> y = x + 0.1 * rng.standard_normal((100, 10))
    >>> round(float(rk.svcca(x, y, variance=0.9)), 3)
    0.986
    """
    variance = _options.check_variance(variance)
    x, y, source = _check.check_pair(x, y, batched=batched)
    return _dispatch.call("svcca", backend, source, x, y, variance=variance)


def pwcca(
    x: ArrayLike,
    y: ArrayLike,
    *,
    ridge: float = 0.0,
    penalty: float = 0.0,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Projection-weighted canonical correlation (PWCCA), a similarity; **not symmetric**.

    Σ wᵢ ρᵢ with weights wᵢ ∝ Σⱼ |⟨hᵢ, xⱼ⟩| over the neurons xⱼ of the first argument, where hᵢ are
    its canonical variates. The weights sum to 1 over the directions kept.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n >= 2 stimuli. Integers are converted to float64. The weights
        come from x.
    ridge : float
        Relative ridge on both sides, at most 1e10: κ = ridge · tr(K) / n, with each side's own Gram
        matrix K.
    penalty : float
        Absolute ridge on both sides, at most 1e150: κ itself, added to the scatter matrix xcᵀxc, in
        x's units squared. At most one of `ridge` and `penalty` may be nonzero.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    similarity : array like x, (…), float64
        In [0, 1]. With a ridge the variates are shrunk and not normalised again, and the similarity
        of a representation to itself is less than 1. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Warns
    -----
    DegenerateWarning
        Without a ridge, if either side has at least n neurons: every correlation is 1. Without a
        ridge, if p + q > n: several correlations are 1, so that their variates, and hence the
        weights, are not unique.

    Notes
    -----
    Costs one pass over x, 2 n² p operations, in addition to the spectra. The n x p products with
    the neurons are computed block by block, in x's precision. 1 - PWCCA is not a metric: it is not
    symmetric.
    Source: Morcos, Raghu & Bengio 2018, "Insights on representational similarity in neural networks
    with canonical correlation", NeurIPS.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x[:, :5] + rng.standard_normal((100, 5))
    >>> round(float(rk.pwcca(x, y)), 3)
    0.714
    >>> round(float(rk.pwcca(y, x)), 3)
    0.709
    """
    ridge, penalty = _options.check_ridge_or_penalty(ridge, penalty)
    x, y, source = _check.check_pair(x, y, batched=batched)
    _options.warn_if_degenerate("pwcca", x.shape[-2], x.shape[-1], y.shape[-1], ridge, penalty)
    return _dispatch.call("pwcca", backend, source, x, y, ridge=ridge, penalty=penalty)
