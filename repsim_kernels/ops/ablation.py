"""Distances between a representation and each of its ablations, for every metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np

from repsim_kernels import _arrays, _check, _check_cells, _dispatch, _metrics, _options
from repsim_kernels._cell_sets import Cells, are_partitions
from repsim_kernels._routes import Distances, Info, Route
from repsim_kernels._typing import Array, ArrayLike, CellsLike
from repsim_kernels.errors import DeviceError, DtypeError, ShapeError

ALL_METRICS = tuple(metric.name for metric in _metrics.METRICS if metric.ablation)
METRICS = _metrics.list_default_ablation()


@overload
def ablation_distances(
    x: ArrayLike,
    cells: CellsLike,
    *,
    metrics: Sequence[str] | Literal["all"] = ...,
    ridge: float = ...,
    penalty: float = ...,
    compare: str = ...,
    sigma: float | None = ...,
    k: int = ...,
    memory: int | None = ...,
    grams: ArrayLike | None = ...,
    info: Literal[False] = ...,
    batched: bool = ...,
    precision: str = ...,
    backend: str | None = ...,
) -> dict[str, Array]: ...


@overload
def ablation_distances(
    x: ArrayLike,
    cells: CellsLike,
    *,
    metrics: Sequence[str] | Literal["all"] = ...,
    ridge: float = ...,
    penalty: float = ...,
    compare: str = ...,
    sigma: float | None = ...,
    k: int = ...,
    memory: int | None = ...,
    grams: ArrayLike | None = ...,
    info: Literal[True],
    batched: bool = ...,
    precision: str = ...,
    backend: str | None = ...,
) -> tuple[dict[str, Array], dict[str, Info]]: ...


def ablation_distances(
    x: ArrayLike,
    cells: CellsLike,
    *,
    metrics: Sequence[str] | Literal["all"] = METRICS,
    ridge: float = 0.1,
    penalty: float = 0.0,
    compare: str = "spearman",
    sigma: float | None = None,
    k: int = 10,
    memory: int | None = None,
    grams: ArrayLike | None = None,
    info: bool = False,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Array] | tuple[dict[str, Array], dict[str, Info]]:
    """Distances between a representation and each of its ablations, for every metric.

    The first argument of each metric is the original x, the second is x with the neurons of one
    cell set to zero. Leaving those neurons out instead would yield the same distances, except for
    ridge CCA, which averages over min(n - 1, p) correlations and counts zeroed neurons in p, and
    "rsa_correlation", which subtracts each stimulus' mean over all p neurons.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli (n >= 3 for RSA, n >= 4 for "cka_debiased" and n > k for
        "mutual_knn"), p >= 1 neurons, any strides. Integers are converted to float64.
    cells : integer array, (p,) or (T, p); boolean array, (p,) or (C, p); or sparse, (C, p)
        Integers: the cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated; or T
        such partitions, for example for several target classes. `rk.cells` makes labels of
        channels, attention heads, positions and others.
        Booleans: the neurons of one cell, (p,), or of cells that may overlap, (C, p). Sparse: the
        latter as a SciPy CSR array, or as a tuple (indptr, indices). Labels and the neurons of one
        cell may also have a shape that broadcasts to that of one stimulus' activation, such as
        (c, 1, 1) or (tokens, 1); one run of 1s then stands for the dimensions to broadcast.
    metrics : sequence of str, or str
        Any of "cka", "cka_debiased", "procrustes" (the squared form), "pwcca", "cca",
        "cca_squared" and "svcca" (99 % of the variance), which are the default; and of
        "rsa_euclidean", "rsa_cosine", "rsa_correlation", "cka_rbf" and "mutual_knn", which compare
        distances between stimuli. "all" means all twelve.
    ridge : float
        Relative ridge of "cca", "cca_squared" and "pwcca", at most 1e10: κ = ridge · tr(K) / n on
        each side, with its own Gram matrix K. Ignored if `penalty` is nonzero.
    penalty : float
        Absolute ridge κ of the same metrics, on both sides, in x's units squared; at most 1e150.
    compare : {"spearman", "pearson", "cosine"}
        How "rsa_euclidean", "rsa_cosine" and "rsa_correlation" compare distances, as in `rsa`.
    sigma : float, optional
        Bandwidth of "cka_rbf" as a fraction of the median distance, as in `cka`; by default 1.
    k : int
        Number of neighbours of "mutual_knn", below n, as in `mutual_knn`.
    memory : int, optional
        Bytes for the canonical variates that "pwcca" collects between passes over x, by default
        1 GiB; with less memory it makes more passes. As much again for the Gram matrices of sparse
        cells, whose distances are computed in chunks of cells. The Gram matrices of other cells
        need up to 8 C n² bytes (half of that in the torch backend, which stores one triangle).
    grams : array like x, (C, n, n) or (T, C, n, n), float64, optional
        The result of ``cell_grams`` for this x and these cells, which is then not computed again.
        Its values are not checked. Not with ``batched=True``. With metrics that compare distances
        between stimuli, the triton backend computes them again, in float64.
    info : bool
        Also return how each distance was computed.
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
    distances : dict of str to array like x, (…, C) or (…, T, C), float64
        By metric: 1 - similarity, in [0, 1] ("cka_debiased" and RSA: [0, 2]); "procrustes": 2 - 2
        times the similarity, in [0, 2]. Dimensionless. For an empty cell, or one that is constant
        on these stimuli, exactly the distance of x to itself, which is 0 without a ridge; but
        "rsa_cosine", "rsa_correlation" and "mutual_knn" see constant neurons that are not 0. NaN
        for a cell of all neurons, which leaves no representation, and where the similarity of x and
        the ablated x is not defined: for those three metrics if a stimulus has no activation left,
        or had none before, unless the cell removes nothing.
    info : dict of str to Info
        Only with ``info=True``; by metric, NumPy arrays of that shape. ``steps`` is the number of
        iterations, ``route`` the method. "nothing": nothing to compute, because the cell removes
        nothing or everything, or CCA has no ridge. "sums": sums over matrix elements.
        "eigenvalues": those of a product of two Gram matrices, on a CPU. "factors": singular values
        of a product with a Cholesky factor of the ablated Gram matrix, on a CPU, or with the
        remaining features. "iterations": iterations of a Riccati equation, for distances that are
        too small for eigenvalues and Cholesky factors. "eigenvectors": those of an ablated matrix,
        which PWCCA and SVCCA need, and which CCA shares if it is computed with PWCCA.
        "definition": the metric itself, from an ablated copy: in the reference, and where Gram
        matrices have too few digits, for a cell without which many stimuli are nearly equal, one
        has hardly any activation, or less than 1e-10 of the variance remains (1e-4 with Gram
        matrices of float32 products).

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, OptionError,
    BackendUnavailable
    ConvergenceError
        For "cca", "cca_squared" and "pwcca", if the ridge is nonzero but below 1e-10, or the
        penalty is equally small.

    Warns
    -----
    DegenerateWarning
        For CCA without a ridge: the remaining neurons span a part of the original's space, so that
        every canonical correlation is 1 and every distance 0.

    Notes
    -----
    One pass over x yields the Gram matrices of all cells: at most 2 n² p operations for cells that
    do not overlap, however many there are, and 2 n² for each neuron of each cell otherwise. Each of
    T partitions takes such a pass, and so does each chunk of sparse cells, unless ``grams`` has the
    result. In addition, CKA costs n² operations per cell and the
    other metrics a few times n³; "pwcca" costs 2 C n² p more, in x's precision. No ablated copy of
    x is made. Several partitions share the original's spectrum and the pass of "pwcca".

    Metrics that compare distances between stimuli need two more passes over x, for sums over
    neurons, and n² log n operations per cell. At n = 500, on one core of a CPU, a cell costs 5 to 7
    times as much for RSA as for CKA, 4 to 5 times for "cka_rbf" and "mutual_knn", and 13 to 15
    times for "procrustes". Distances tie as those of the ablated copy would in `rsa` and
    `mutual_knn`: those between stimuli that an ablation makes nearly equal are computed from the
    activations. On layers of trained networks, 250 stimuli, values differ by at most 2e-15 from
    those of ablated copies in float64.

    Distances are not computed as 1 minus a similarity near 1, so small ones keep their digits. From
    float64 input, "cka", "procrustes", and the excess of "cca" and "cca_squared" over the
    self-distance are accurate to 1e-6 relative or 1e-14 absolute; the latter two for a ridge of
    1e-3 or more, since rounding errors grow as the ridge falls. None of these distances but that
    of "mutual_knn" is a metric in the mathematical sense.

    Source: docs/metrics.md, "One original, many ablations".

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x = np.random.default_rng(0).standard_normal((50, 400))
    >>> cells = np.repeat([0, 1, 2, -1], [10, 40, 150, 200])  # three cells of growing size
    >>> distances = rk.ablation_distances(x, cells, metrics=["cka", "procrustes"])
    >>> distances["cka"].round(3)
    array([0.001, 0.006, 0.034])
    >>> distances, info = rk.ablation_distances(x, cells, metrics=["procrustes"], info=True)
    >>> info["procrustes"].route.tolist()
    ['eigenvalues', 'eigenvalues', 'eigenvalues']
    """
    names = _options.check_metrics(metrics, ALL_METRICS)
    compare, sigma, k = _options.check_stimulus_options(compare, sigma, k)
    ridge, penalty = _options.check_ridge_and_penalty(ridge, penalty)
    memory = _options.check_memory(memory)
    info = _options.check_flag(info, "info")
    # CKA can be checked afterwards, since wrong values make its distances NaN or 0. The
    # other metrics compute eigenvectors, which would fail.
    defer = bool(names) and set(names) <= {"cka", "cka_debiased"}
    x, source = _check.check_representation(
        x,
        batched=batched,
        defer=defer,
        **_require_stimuli(names, k),
    )
    checked, n_cells = _check_cells.check_cells(cells, x.shape[-1], allow_partitions=True)
    _options.warn_without_ridge(names, ridge, penalty)
    results = _dispatch.call(
        "ablation_distances",
        backend,
        source,
        x,
        cells=checked,
        n_cells=n_cells,
        metrics=names,
        ridge=ridge,
        penalty=penalty,
        memory=memory,
        compare=compare,
        sigma=sigma,
        k=k,
        grams=check_grams(grams, x, source, checked, n_cells),
        precision=_options.check_precision(precision),
    )
    if defer:
        _check.finish_checks(results[names[0]].values, x, "x")
    return to_public_result(results, info)


def min_stimuli(metrics: Sequence[str]) -> int:
    """Return how many stimuli the metrics need, apart from "mutual_knn".

    Parameters
    ----------
    metrics : sequence of str

    Returns
    -------
    int
    """
    own = [metric for metric in _metrics.METRICS if metric.name in metrics]
    return max([2, *(metric.min_stimuli for metric in own)])


def _require_stimuli(metrics: Sequence[str], k: int) -> dict[str, Any]:
    """Return the options of `check_representation` for the stimuli that the metrics need."""
    least = min_stimuli(metrics)
    if "mutual_knn" in metrics and k >= least:
        return _check.require_neighbours("mutual_knn", k)
    return {"min_stimuli": least}


def check_grams(grams: Any, x: Any, source: _arrays.Source, cells: Cells, n_cells: int) -> Any:
    """Check the shape and the place of Gram matrices that `cell_grams` has returned.

    Parameters
    ----------
    grams : array or None
    x : tensor, (…, n, p)
        Checked.
    source : Source
        Of x.
    cells : Cells
        As `check_cells` returns them.
    n_cells : int
        C.

    Returns
    -------
    tensor, (C, n, n) or (T, C, n, n), or None

    Raises
    ------
    ShapeError, DeviceError, DtypeError
    """
    if grams is None:
        return None
    tensor, grams_source = _arrays.convert(grams, "grams")
    partitions = (len(cells),) if are_partitions(cells) else ()
    n = x.shape[-2]
    if x.ndim > 2 or tuple(tensor.shape) != (*partitions, n_cells, n, n):
        expected = f"{(*partitions, n_cells, n, n)}, as cell_grams returns them for x and cells"
        raise ShapeError(
            f"grams: shape {tuple(tensor.shape)}; expected "
            + (expected if x.ndim == 2 else "None with batched=True")
        )
    if grams_source != source:
        raise DeviceError(
            f"grams: a {grams_source.library} array on {grams_source.device}, but x is a "
            f"{source.library} array on {source.device}; expected both from one library on one "
            "device"
        )
    if (dtype := _arrays.dtype_name(tensor)) != "float64":
        raise DtypeError(f"grams: dtype {dtype}; expected float64")
    return tensor


def to_public_result(
    results: dict[str, Distances], info: bool
) -> dict[str, Array] | tuple[dict[str, Array], dict[str, Info]]:
    """Convert a backend's results to what public functions of ablations return.

    Parameters
    ----------
    results : dict of str to Distances
        By metric; arrays (…, C) or (…, T, C) of the caller's library.
    info : bool
        Whether to return how each distance was computed, too.

    Returns
    -------
    dict of str to array, or (dict of str to array, dict of str to Info) with `info`
    """
    distances = {name: result.values for name, result in results.items()}
    if not info:
        return distances
    routes = np.array([route.name.lower() for route in Route])
    return distances, {
        name: Info(routes[_arrays.to_numpy(result.route)], _arrays.to_numpy(result.steps))
        for name, result in results.items()
    }
