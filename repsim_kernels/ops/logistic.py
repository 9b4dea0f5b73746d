"""Many small logistic regressions at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _dispatch, _options
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array
from repsim_kernels.errors import LabelError, OptionError, ShapeError

MOST = 128  # neurons of a fit


def logistic_fits(
    x: Any,
    y: Any,
    columns: Any,
    *,
    C: float = 1.0,
    tol: float | None = None,
    max_iter: int = 200,
    start: tuple[Any, Any] | None = None,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Array]:
    """Fit many L2-penalised logistic regressions, each on a few neurons of one representation.

    Problem i minimises ``w·w / 2 + C Σⱼ log(1 + exp(-sⱼ (xⱼ·w + c)))`` over w and c, where xⱼ are
    the values of neurons ``columns[i]`` for stimulus j, and sⱼ is 1 where ``y[j] == 1``, else -1:
    scikit-learn's objective, in which the intercept c is not penalised. Of more than two classes
    each is fitted against the rest.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    y : integer array, (n,)
        Class of each stimulus, 0 … k - 1, each with a stimulus; k >= 2.
    columns : integer array, (b, d)
        Neurons of each of b >= 1 problems, 0 … p - 1; 1 <= d <= 128.
    C : float
        Inverse of the penalty's strength, above 0, as in scikit-learn.
    tol : float, optional
        Above 0. A fit has converged when a step moves no coefficient by more than tol times the
        largest, nor the intercept by more than tol, or tol times itself; by default 1e-5, and
        1e-10 if x is float64.
    max_iter : int
        Steps, at most; below 2^31.
    start : (array, array), optional
        Coefficients and intercepts to begin from, shaped as the result's; by default zero, and the
        log-odds of the class.
    precision : {"tf32x3", "tf32", "ieee"}
        Of the Hessians in the Triton kernel, which steer the steps; the gradient, on which the
        result depends, is float32 in all three. Other backends take no notice.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    fits : dict
        ``"coef"``, (b, d), and ``"intercept"``, (b,), float64 if x is float64, else float32;
        ``"n_iter"``, (b,), steps; ``"converged"``, (b,), booleans; ``"errors"``, (b,), how many of
        the n stimuli the fit puts on the wrong side. Of k > 2 classes (b, k, d) and (b, k): each
        class against the rest.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, LabelError, OptionError, BackendUnavailable

    Notes
    -----
    Where ``converged`` is true, coefficients match those of scikit-learn's "newton-cholesky", on
    the same numbers in float64, to 1e-4 of the largest in float32 and to 1e-9 in float64. Each fit
    estimates how far its own rounding may have moved the optimum, from the curvature, the residuals
    and the magnitudes of the activations. If float32 may have moved it by more than 3e-5 of the
    largest coefficient, or failed, the fit resumes in float64 from the original activations. This
    happens with an outlier 1,000 times as large as the other activations, with a duplicated neuron
    that the penalty hardly holds, or with classes that heavy-tailed neurons separate. If the
    float64 fit fails the same test, ``converged`` is false: for example, where one outlier of 1e9
    occurs in both classes. A tol above 3e-5 replaces 3e-5 in the test.

    On a CPU a fit takes 2 n d² operations for each of two or three Hessians, d³ / 3 for its factor,
    and 4 n d for each of 10 to 25 gradients; problems are batched, and each thread takes some.

    Source: the objective of scikit-learn's LogisticRegression with an L2 penalty.
    """
    x, source = _check.check_representation(x, allow_constant=True, allow_batch=False)
    y, k = _check.check_classes(y, x.shape[0], None, "y")
    if k < 2:
        raise LabelError("y: one class, 0; expected at least two")
    numbers = _columns(columns, x.shape[1])
    shape = (len(numbers), k) if k > 2 else (len(numbers),)
    begin = None if start is None else _start(start, (*shape, numbers.shape[1]))
    found = _fits(
        source,
        x,
        np.arange(k)[:, None] == y if k > 2 else y[None] == 1,
        numbers,
        begin,
        backend,
        C=_options.check_number(C, "C", low=0, exclude_low=True),
        tol=_tolerance(tol, x),
        max_iter=_options.check_count(max_iter, "max_iter", maximum=2**31 - 1),
        precision=_options.check_precision(precision),
    )
    return {
        name: value.reshape(*shape, numbers.shape[1]) if name == "coef" else value.reshape(shape)
        for name, value in found.items()
    }


def _columns(columns: Any, p: int) -> np.ndarray[Any, Any]:
    numbers = _check.check_integers(columns, "columns", OptionError)
    if numbers.ndim != 2 or not numbers.shape[0] or not 1 <= numbers.shape[1] <= MOST:
        raise ShapeError(
            f"columns: shape {numbers.shape}; expected (b, d), of 1 … {MOST} neurons each"
        )
    low, high = int(numbers.min()), int(numbers.max())
    if numbers.dtype.kind == "b" or low < 0 or high >= p:
        raise OptionError(f"columns: neurons {low} … {high}; expected integers in 0 … {p - 1}")
    return numbers.astype(np.int64)


def _start(start: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    both = _options.to_tuple(start) or ()
    if len(both) != 2:
        raise OptionError("start: not a pair; expected (coefficients, intercepts)")
    coef, intercept = (_check.check_numbers(a, f"start[{i}]") for i, a in enumerate(both))
    if tuple(coef.shape) != shape or tuple(intercept.shape) != shape[:-1]:
        raise ShapeError(
            f"start: shapes {tuple(coef.shape)} and {tuple(intercept.shape)}; expected {shape} and "
            f"{shape[:-1]}, as of the result"
        )
    return coef.reshape(shape[0], -1, shape[-1]), intercept.reshape(shape[0], -1)


def _tolerance(tol: Any, x: Array) -> float:
    if tol is None:
        return 1e-10 if str(x.dtype).endswith("float64") else 1e-5
    return _options.check_number(tol, "tol", low=0, exclude_low=True)


def _fits(
    source: Source,
    x: Array,
    targets: np.ndarray[Any, Any],
    columns: Any,
    start: tuple[Array, Array] | None,
    backend: str | None,
    **options: Any,
) -> dict[str, Array]:
    """What the kernels give; columns and start may lie anywhere."""
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
