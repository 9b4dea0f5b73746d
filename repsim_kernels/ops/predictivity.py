"""Linear predictivity: how well one representation predicts another."""

from __future__ import annotations

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike


def linear_predictivity(
    x: ArrayLike,
    y: ArrayLike,
    *,
    ridge: float | str = 1.0,
    folds: int = 5,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Held-out R² of y predicted from x by ridge regression; **not symmetric**.

    1 - Σ ‖yᵢ - ŷᵢ‖² / Σ ‖yᵢ - ȳ‖² over all stimuli i. The prediction ŷᵢ comes from the fit without
    the fold that contains i; ȳ is the mean over all stimuli. Each neuron of y counts in
    proportion to its variance.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations for the same n >= 2 stimuli. Integers are converted to float64. x predicts y.
    ridge : float, or "gcv"
        Relative ridge, 1e-6 … 1e10. The penalty of every fold is κ ‖w‖² with κ = ridge · tr(K) / n,
        where K is the Gram matrix of x for all stimuli; the intercept is not penalised. "gcv"
        chooses a ridge between 1e-6 and 1e6 by generalised cross-validation on all stimuli of x and
        y. As in `ablation_decodability`.
    folds : int
        Number of folds, 2 … n. Folds are contiguous runs of stimuli, the first n mod folds of them
        longer by one, like those of scikit-learn's KFold without shuffling. If the stimuli are
        sorted, for example by class, shuffle both sides in the same way first.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast and
        become those of the result. Without it, more than two dimensions are an error: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    score : array like x, (…), float64
        At most 1. Predicting the mean over all stimuli scores 0, and worse predictions are
        negative. Less than 1 for x and itself, because of the ridge. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    Costs one Gram matrix of x, at most 2 n² p operations, and one of y if q >= n; one n x n
    factorisation for all folds, n³; solves of 2 n³ / folds; and a product of 2 n² min(q, n). "gcv"
    adds an eigendecomposition of x, and one of y if q >= n.
    Source: Yamins et al. 2014, PNAS 111, and Schrimpf et al. 2018, "Brain-Score", bioRxiv 407007,
    for linear predictivity, there fitted by partial least squares; Hoerl & Kennard 1970,
    Technometrics 12, for the ridge; Golub, Heath & Wahba 1979, Technometrics 21, for "gcv".

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = x[:, :5] + 0.5 * rng.standard_normal((100, 5))
    >>> round(float(rk.linear_predictivity(x, y, ridge=0.01)), 3)
    0.74
    >>> round(float(rk.linear_predictivity(y, x, ridge=0.01)), 3)  # y lacks half of x's neurons
    0.357
    """
    ridge = _options.check_ridge_or_gcv(ridge)
    x, y, source = _check.check_pair(x, y, batched=batched)
    fold_of_stimulus = _options.make_contiguous_folds(folds, x.shape[-2])
    return _dispatch.call(
        "linear_predictivity", backend, source, x, y, ridge=ridge, folds=fold_of_stimulus
    )
