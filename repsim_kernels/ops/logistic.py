"""Many small logistic regressions at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _dispatch, _options
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array, ArrayLike, Tensor
from repsim_kernels.errors import LabelError, OptionError, ShapeError

MAX_NEURONS = 128  # neurons of one problem


def logistic_fits(
    x: ArrayLike,
    y: ArrayLike,
    columns: ArrayLike,
    *,
    C: float = 1.0,
    tol: float | None = None,
    max_iter: int = 200,
    start: tuple[ArrayLike, ArrayLike] | None = None,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Array]:
    """Fit many L2-penalised logistic regressions, each on a few neurons of one representation.

    Problem i minimises ``w·w / 2 + C Σⱼ log(1 + exp(-sⱼ (xⱼ·w + c)))`` over w and c, where xⱼ are
    the values of neurons ``columns[i]`` for stimulus j, and sⱼ is 1 if ``y[j] == 1``, otherwise -1.
    This is scikit-learn's objective, in which the intercept c is not penalised. With more than two
    classes, each is fitted against the rest.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    y : integer array, (n,)
        Class of each stimulus, 0 … k - 1, with k >= 2 and a stimulus of every class.
    columns : integer array, (b, d)
        Neurons of each of b >= 1 problems, 0 … p - 1; 1 <= d <= 128.
    C : float
        Inverse strength of the penalty, above 0, as in scikit-learn.
    tol : float, optional
        Above 0; by default 1e-10 if x is float64, otherwise 1e-5. A fit has converged when a step
        changes no coefficient by more than tol times the largest coefficient, and the intercept by
        no more than tol times the larger of 1 and its magnitude.
    max_iter : int
        Largest number of steps, below 2^31.
    start : (array, array), optional
        Initial coefficients and intercepts, shaped like those of the result; by default zeros and
        the log-odds of the class.
    precision : {"tf32x3", "tf32", "ieee"}
        Precision of the Hessians in the Triton kernel, which only determine the steps; the
        gradient, which determines the result, is float32 in all three. Other backends ignore it.
    backend : {"reference", "torch", "triton"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    fits : dict of str to array like x
        ``"coef"``, (b, d), and ``"intercept"``, (b,), float64 if x is float64, otherwise float32,
        for log-odds per unit of x; ``"n_iter"``, (b,), the number of steps; ``"converged"``, (b,),
        booleans; ``"errors"``, (b,), the number of stimuli on the wrong side of the fit. With k > 2
        classes the shapes are (b, k, d) and (b, k), for each class against the rest.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, LabelError, OptionError, BackendUnavailable

    Notes
    -----
    Where ``converged`` is true, the coefficients match those of scikit-learn's "newton-cholesky" on
    the same numbers in float64, to 1e-4 of the largest in float32 and to 1e-9 in float64. Each fit
    estimates how far its own rounding may have moved the optimum, from the curvature, the residuals
    and the magnitudes of the activations. If float32 may have moved it by more than 3e-5 of the
    largest coefficient, or failed, the fit resumes in float64 from the original activations. This
    happens with an outlier 1,000 times as large as the other activations, with a duplicated neuron
    that the penalty hardly constrains, or with classes that heavy-tailed neurons separate. If the
    float64 fit fails the same test, ``converged`` is false: for example, if one outlier of 1e9
    occurs in both classes. A tol above 3e-5 replaces 3e-5 in the test.

    On a CPU a fit costs 4 n d operations for each of 8 to 30 gradients, and 2 n d² for each of one
    to three Hessians, with d³ / 3 for its factorisation. Problems are solved in batches, which are
    distributed over the threads.

    Source: the objective of scikit-learn's LogisticRegression with an L2 penalty.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 10))
    >>> y = (x[:, 0] + 0.5 * rng.standard_normal(100) > 0).astype(int)
    >>> fits = rk.logistic_fits(x, y, columns=[[0, 1], [2, 3]])
    >>> fits["coef"].round(2)
    array([[ 2.48,  0.03],
           [-0.21, -0.23]])
    >>> fits["errors"]  # of 100 stimuli: only neuron 0 is informative
    array([17, 44])
    """
    x, source = _check.check_representation(x, allow_constant=True, allow_batch=False)
    y, k = _check.check_classes(y, x.shape[0], None, "y")
    if k < 2:
        raise LabelError("y: one class, 0; expected at least two")
    columns = _check_columns(columns, x.shape[1])
    shape = (len(columns), k) if k > 2 else (len(columns),)
    initial = None if start is None else _check_start(start, (*shape, columns.shape[1]))
    fits = fit_columns(
        source,
        x,
        np.arange(k)[:, None] == y if k > 2 else y[None] == 1,
        columns,
        initial,
        backend,
        C=_options.check_number(C, "C", low=0, exclude_low=True),
        tol=check_tolerance(tol, x),
        max_iter=_options.check_count(max_iter, "max_iter", maximum=2**31 - 1),
        precision=_options.check_precision(precision),
    )
    return {
        name: value.reshape(*shape, columns.shape[1]) if name == "coef" else value.reshape(shape)
        for name, value in fits.items()
    }


def _check_columns(columns: Any, p: int) -> np.ndarray[Any, Any]:
    """Check neurons (b, d) of problems and return them as int64."""
    numbers = _check.check_integers(columns, "columns", OptionError)
    if numbers.ndim != 2 or not numbers.shape[0] or not 1 <= numbers.shape[1] <= MAX_NEURONS:
        raise ShapeError(
            f"columns: shape {numbers.shape}; expected (b, d), of 1 … {MAX_NEURONS} neurons each"
        )
    low, high = int(numbers.min()), int(numbers.max())
    if numbers.dtype.kind == "b" or low < 0 or high >= p:
        raise OptionError(f"columns: neurons {low} … {high}; expected integers in 0 … {p - 1}")
    return numbers.astype(np.int64)


def _check_start(start: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Check initial coefficients of a shape, (b, d) or (b, k, d), and their intercepts."""
    pair = _options.to_tuple(start) or ()
    if len(pair) != 2:
        raise OptionError("start: not a pair; expected (coefficients, intercepts)")
    coef, intercept = (_check.check_numbers(a, f"start[{i}]") for i, a in enumerate(pair))
    if tuple(coef.shape) != shape or tuple(intercept.shape) != shape[:-1]:
        raise ShapeError(
            f"start: shapes {tuple(coef.shape)} and {tuple(intercept.shape)}; expected {shape} and "
            f"{shape[:-1]}, like the result"
        )
    return coef.reshape(shape[0], -1, shape[-1]), intercept.reshape(shape[0], -1)


def check_tolerance(tol: Any, x: Tensor) -> float:
    """Check the tolerance of fits.

    Parameters
    ----------
    tol : float or None
        None means the default for the dtype of x.
    x : tensor
        The checked activations.

    Returns
    -------
    tol : float
        Above 0.

    Raises
    ------
    OptionError
    """
    if tol is None:
        return 1e-10 if str(x.dtype).endswith("float64") else 1e-5
    return _options.check_number(tol, "tol", low=0, exclude_low=True)


def fit_columns(
    source: Source,
    x: Tensor,
    targets: np.ndarray[Any, Any],
    columns: np.ndarray[Any, Any] | Tensor,
    start: tuple[Tensor, Tensor] | None,
    backend: str | None,
    **options: Any,
) -> dict[str, Array]:
    """Run the kernel of `logistic_fits` on checked arguments.

    Parameters
    ----------
    source : Source
        The caller's library and device.
    x : tensor, (n, p)
    targets : array, (t, n)
        For each problem, whether a stimulus is of the target class.
    columns : integer array, (b, d)
        On any device; moved to that of x.
    start : (tensor, tensor), optional
        Coefficients and intercepts to start from, on any device.
    backend : str, optional
    **options
        Those of the kernel, passed unchanged.

    Returns
    -------
    fits : dict of str to array
        What `logistic_fits` returns.

    Raises
    ------
    BackendUnavailable
    """
    return _dispatch.call(
        "logistic_fits",
        backend,
        source,
        x,
        targets=targets,
        columns=_arrays.to_tensor(columns, x.device),
        start=None if start is None else tuple(_arrays.to_tensor(a, x.device) for a in start),
        **options,
    )
