"""Gram matrices of centred representations, whole and by cell of neurons."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def centered_gram(
    x: Any,
    *,
    kernel: str = "linear",
    sigma: float | None = None,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> Array:
    """Gram matrix of the stimuli, centred.

    ``xc @ xc.T`` with ``xc = x - x.mean(0)``; for ``kernel="rbf"`` the double-centred matrix
    ``H exp(-d² / (2 b²)) H``, b² = sigma² · the median of all n² squared distances.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    kernel : {"linear", "rbf"}
    sigma : float, optional
        Bandwidth of the RBF kernel, as a fraction of the median distance: 1e-10 … 1e5, 1 unless
        given.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions are those of the result. Without
        it more than two dimensions are refused: flatten activations (n, c, h, w) first.
    precision : {"tf32x3", "tf32", "ieee"}
        Of the float32 products of the Triton kernels: as accurate as float32 on tensor cores,
        10 bits on tensor cores, or float32 without them. Other backends compute in float64.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    g : array like x, (…, n, n), float64
        Symmetric, positive semidefinite, its rows sum to zero; x's units squared ("rbf": none).
        A constant x gives zeros.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, BackendUnavailable
    ConstantError
        "rbf", when most pairs of stimuli are identical: the median distance is 0.

    Notes
    -----
    Reads x once; 2 n² p operations, half of them where BLAS has a symmetric product. The features
    are centred, not the Gram: at a feature mean of 100 the latter loses three digits of a float32
    result. Source: Kornblith et al. 2019, section 3.
    """
    sigma = _options.check_bandwidth(kernel, sigma)
    x, source = _check.check_representation(x, batched=batched, allow_constant=kernel == "linear")
    precision = _options.check_precision(precision)
    g = _dispatch.call(
        "centered_gram", backend, source, x, kernel=kernel, sigma=sigma, precision=precision
    )
    return _check.raise_if_nan(
        g, "the median distance between stimuli is 0, so 'rbf' has no bandwidth"
    )


def cell_grams(
    x: Any,
    cells: Any,
    *,
    n_cells: int | None = None,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> Array:
    """Gram matrices of the stimuli, one for each cell of neurons.

    ``g[c] = xc[:, cells == c] @ xc[:, cells == c].T`` with ``xc = x - x.mean(0)``; their sum over a
    partition is the Gram of x, and the sum without c the Gram of x with cell c ablated.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    cells : integer array, (p,) or (T, p), or boolean array, (C, p)
        Cell of each neuron, 0 … n_cells - 1, or -1 for a neuron in none; T such partitions, as of
        several target classes; or the membership of cells that may overlap.
    n_cells : int, optional
        Number of cells C; by default the largest label and one.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions are those of the result. Without
        it more than two dimensions are refused: flatten activations (n, c, h, w) first.
    precision : {"tf32x3", "tf32", "ieee"}
        Of the float32 products of the Triton kernels: as accurate as float32 on tensor cores,
        10 bits on tensor cores, or float32 without them. "cupy" multiplies float32 in float32,
        other backends compute in float64.
    backend : {"reference", "torch", "triton", "cupy"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    g : array like x, (…, C, n, n) or (…, T, C, n, n), float64
        Symmetric, positive semidefinite, in x's units squared; an empty cell gives zeros.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, CellError, OptionError, BackendUnavailable

    Notes
    -----
    Reads x once; 2 n² p operations for all cells of a partition together.
    Source: METRICS, "One original, many ablations".
    """
    x, source = _check.check_representation(x, batched=batched, allow_constant=True)
    cells, n_cells = _check.check_cells(cells, x.shape[-1], n_cells, allow_partitions=True)
    precision = _options.check_precision(precision)
    return _dispatch.call(
        "cell_grams", backend, source, x, cells=cells, n_cells=n_cells, precision=precision
    )
