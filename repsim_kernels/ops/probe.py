"""Linear decodability of a representation and of each of its ablations."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._arrays import Array


def ablation_decodability(
    x: Any,
    cells: Any,
    labels: Any,
    *,
    target: int | None = None,
    ridge: float = 1.0,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Array]:
    """Leave-one-out accuracy of a linear reader of each ablation of a representation.

    Ridge regression on one-hot classes with an unpenalised intercept; the largest output is the
    answer.

    Parameters
    ----------
    x : array, (…, n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    cells : integer array, (p,), or boolean array, (C, p)
        Cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated; or the membership
        of cells that may overlap.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int, optional
        Read this class against the rest, scored by balanced accuracy; by default all classes,
        scored by accuracy.
    ridge : float
        Above 0. Relative: κ = ridge · tr(K) / n, K the Gram of all stimuli that the reader is
        fitted on.
    precision : {"tf32x3", "tf32", "ieee"}
        Of the float32 products of the Triton kernels: as accurate as float32 on tensor cores,
        10 bits on tensor cores, or float32 without them. Other backends compute in float64.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    accuracy : dict
        ``"refit"``, (…, C): the reader is fitted on the ablated representation (what information
        is left), NaN where a cell of everything leaves none; ``"frozen"``, (…, C): fitted on the
        original without stimulus i, applied to the ablated stimulus i, its activations set to
        zero (what a fixed reader loses); ``"intact"``, a float, or (…) for a batch. In [0, 1].

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, LabelError, OptionError,
    BackendUnavailable

    Notes
    -----
    From the Grams of one pass over x, and one Cholesky factorisation a cell; no vector of p weights
    is made. Source: METRICS, "Linear decodability".
    """
    ridge = _options.number(ridge, "ridge", low=0, above=True)
    x = _check.representation(x)
    cells, n_cells = _check.cells(cells, x.shape[-1])
    labels = _check.labels(labels, x.shape[-2], target)
    result = _dispatch.call(
        "ablation_decodability",
        backend,
        x,
        cells=cells,
        n_cells=n_cells,
        labels=labels,
        target=None if target is None else int(target),
        ridge=ridge,
        precision=_options.precision(precision),
    )
    if x.ndim == 2:
        result["intact"] = float(result["intact"])
    return result
