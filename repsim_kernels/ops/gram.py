"""Gram matrices of centred representations: of all neurons, and of each cell of neurons."""

from __future__ import annotations

from repsim_kernels import _check, _check_cells, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike, CellsLike

_NO_BANDWIDTH = (
    "x: the median distance between stimuli is 0, so that kernel='rbf' has no bandwidth; expected "
    "fewer identical stimuli, or kernel='linear'"
)


def centered_gram(
    x: ArrayLike,
    *,
    kernel: str = "linear",
    sigma: float | None = None,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> Array:
    """Centred Gram matrix of the stimuli.

    ``xc @ xc.T`` with ``xc = x - x.mean(0)``; with ``kernel="rbf"`` the double-centred matrix
    ``H exp(-d² / (2 b²)) H``, where b² is sigma² times the median of all n² squared distances.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    kernel : {"linear", "rbf"}
        Kernel of the Gram matrix.
    sigma : float, optional
        Bandwidth of the RBF kernel as a fraction of the median distance, 1e-10 … 1e5; by default 1.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions become those of the result.
        Without it, more than two dimensions are an error: flatten activations (n, c, h, w) first.
    precision : {"tf32x3", "tf32", "ieee"}
        Float32 products in the Triton kernels: "tf32x3" is as accurate as float32 and runs on
        tensor cores, "tf32" has 10 bits and runs on tensor cores, "ieee" is plain float32. Other
        backends compute in float64.
    backend : {"reference", "torch", "triton"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    gram : array like x, (…, n, n), float64
        Symmetric and positive semidefinite, with rows that sum to zero; in x's units squared
        ("rbf": dimensionless). Zeros if x is constant.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, BackendUnavailable
    ConstantError
        For "rbf", if most pairs of stimuli are identical: the median distance is 0.

    Notes
    -----
    Reads x once ("triton" three times, see docs/gpu.md); 2 n² p operations, or half of that if BLAS
    has a symmetric product. The features are centred rather than the Gram matrix: with a feature
    mean of 100, centring the Gram matrix would cost a float32 result three digits.
    Source: Kornblith, Norouzi, Lee & Hinton 2019, "Similarity of Neural Network Representations
    Revisited", ICML, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    >>> rk.centered_gram(x)
    array([[ 5.,  1., -6.],
           [ 1.,  1., -2.],
           [-6., -2.,  8.]])
    """
    sigma = _options.check_bandwidth(kernel, sigma)
    x, source = _check.check_representation(x, batched=batched, allow_constant=kernel == "linear")
    precision = _options.check_precision(precision)
    gram = _dispatch.call(
        "centered_gram", backend, source, x, kernel=kernel, sigma=sigma, precision=precision
    )
    return _check.raise_if_nan(gram, _NO_BANDWIDTH)


def cell_grams(
    x: ArrayLike,
    cells: CellsLike,
    *,
    n_cells: int | None = None,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> Array:
    """Centred Gram matrices of the stimuli, one for each cell of neurons.

    ``grams[c] = xc[:, cells == c] @ xc[:, cells == c].T`` with ``xc = x - x.mean(0)``. Over a
    partition they sum to the Gram matrix of x; the sum without cell c is the Gram matrix of x with
    cell c ablated.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    cells : integer array, (p,) or (T, p), or boolean array, (C, p)
        Integers: the cell of each neuron, 0 … n_cells - 1, or -1 for a neuron in no cell; or T such
        partitions, for example for several target classes. Booleans: the membership of cells that
        may overlap.
    n_cells : int, optional
        Number of cells C; by default the largest label plus 1.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions become those of the result.
        Without it, more than two dimensions are an error: flatten activations (n, c, h, w) first.
    precision : {"tf32x3", "tf32", "ieee"}
        Float32 products in the Triton kernels: "tf32x3" is as accurate as float32 and runs on
        tensor cores, "tf32" has 10 bits and runs on tensor cores, "ieee" is plain float32. "cupy"
        multiplies float32 in float32, other backends compute in float64.
    backend : {"reference", "torch", "triton", "cupy"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    grams : array like x, (…, C, n, n) or (…, T, C, n, n), float64
        Symmetric and positive semidefinite, in x's units squared. Zeros for an empty cell.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, CellError, OptionError, BackendUnavailable

    Notes
    -----
    Reads x once ("triton" three times, see docs/gpu.md); 2 n² p operations for all cells of a
    partition together.
    Source: docs/metrics.md, "One original, many ablations".

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    >>> grams = rk.cell_grams(x, [0, 1])  # one cell for each of the two neurons
    >>> grams[1]
    array([[ 1.,  1., -2.],
           [ 1.,  1., -2.],
           [-2., -2.,  4.]])
    >>> np.allclose(grams.sum(0), rk.centered_gram(x))
    True
    """
    x, source = _check.check_representation(x, batched=batched, allow_constant=True)
    checked, n_cells = _check_cells.check_cells(cells, x.shape[-1], n_cells, allow_partitions=True)
    precision = _options.check_precision(precision)
    return _dispatch.call(
        "cell_grams", backend, source, x, cells=checked, n_cells=n_cells, precision=precision
    )
