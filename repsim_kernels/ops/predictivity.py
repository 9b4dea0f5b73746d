"""Linear predictivity: how well one representation predicts another."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def linear_predictivity(
    x: Any,
    y: Any,
    *,
    ridge: float | str = 1.0,
    folds: int = 5,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Held-out R² of y predicted from x by ridge regression; **not symmetric**.

    1 - Σ ‖yᵢ - ŷᵢ‖² / Σ ‖yᵢ - ȳ‖² over all stimuli i, where ŷᵢ is predicted by the fit without the
    fold that holds i, and ȳ is the mean over all stimuli. A neuron of y counts by its variance.

    Parameters
    ----------
    x, y : array, (n, p) and (n, q), float16 | bfloat16 | float32 | float64
        Activations of the same n >= 2 stimuli. Integers are taken as float64. x predicts y.
    ridge : float, or "gcv"
        Relative ridge, 1e-6 … 1e10: the penalty κ ‖w‖² of every fold has κ = ridge · tr(K) / n,
        with K the Gram of all stimuli of x; the intercept is not penalised. "gcv" chooses a ridge
        between 1e-6 and 1e6 by generalised cross-validation on all stimuli of x and y. As in
        `ablation_decodability`.
    folds : int
        Number of folds, 2 … n: contiguous runs of stimuli, the first n mod folds of them one
        longer, as scikit-learn's KFold makes them without shuffling. Shuffle the stimuli of both
        sides together if they are sorted, for example by class.
    batched : bool
        Whether x and y are batches, (…, n, p) and (…, n, q). Their leading dimensions broadcast,
        and are those of the result. Without it more than two dimensions are refused: flatten
        activations (n, c, h, w) first.
    backend : {"reference", "torch"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    score : array like x, (…), float64
        At most 1; 0 is what predicting the mean over all stimuli gives, and worse predictions are
        negative. Less than 1 for x and itself, because of the ridge. Has no unit.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, DeviceError, OptionError,
    BackendUnavailable

    Notes
    -----
    Costs one Gram of x, 2 n² p operations at most, the same for y if q >= n, one n x n
    factorisation for all folds, n³, solves of 2 n³ / folds, and a product of 2 n² min(q, n); "gcv"
    adds an eigendecomposition of x, and one of y if q >= n.
    Source: Yamins et al. 2014 and Schrimpf et al. 2018 for linear predictivity, which they fit by
    partial least squares; Hoerl & Kennard 1970 for the ridge; Golub, Heath & Wahba 1979 for "gcv".
    """
    ridge = _options.check_ridge_or_gcv(ridge)
    x, y, source = _check.check_pair(x, y, batched=batched)
    labels = _options.make_contiguous_folds(folds, x.shape[-2])
    return _dispatch.call("linear_predictivity", backend, source, x, y, ridge=ridge, folds=labels)
