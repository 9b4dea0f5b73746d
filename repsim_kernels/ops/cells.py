"""Class means of neurons, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array, ArrayLike


def class_means(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    n_classes: int | None = None,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Mean activation of every neuron over the stimuli of each class.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 1 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    labels : integer array, (n,)
        Class of each stimulus, 0 … n_classes - 1.
    n_classes : int, optional
        Number of classes k; by default the largest label plus 1.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions become those of the result.
        Without it, more than two dimensions are an error: flatten activations (n, c, h, w) first.
    backend : {"reference", "torch", "triton"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    means : array like x, (…, k, p), float64
        In x's units.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, BackendUnavailable
    LabelError
        If labels are out of range or have the wrong length, or a class has no stimulus.

    Notes
    -----
    Reads x once.
    Source: Morcos, Barrett, Rabinowitz & Botvinick 2018, "On the importance of single directions
    for generalization", ICLR, whose selectivity index is computed from these means.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.class_means([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], [0, 0, 1])
    array([[1., 1.],
           [4., 4.]])
    """
    x, source = _check.check_representation(x, batched=batched, allow_constant=True, min_stimuli=1)
    labels, n_classes = _check.check_classes(labels, x.shape[-2], n_classes)
    return _dispatch.call("class_means", backend, source, x, labels=labels, n_classes=n_classes)


def selectivity_grid(
    x: ArrayLike,
    labels: ArrayLike,
    target: int,
    *,
    grid: tuple[int, int] = (4, 4),
    edges: str = "equal",
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Cells of neurons by how selective they are for a class, and how active.

    With m_c the mean of a neuron over the target's stimuli and m_o its mean over the others, the
    neurons are divided into ``grid[0]`` strips of equal size by selectivity (m_c - m_o)/√2, and
    each strip into ``grid[1]`` parts of equal size by magnitude (m_c + m_o)/√2.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int
        The label of the class.
    grid : (int, int)
        Number of strips, and number of parts of each strip.
    edges : {"equal", "inclusive"}
        "equal": a partition; ties are broken by index. "inclusive": a cell includes every neuron on
        its edges, as in the code that Hayne et al. published. The edges of k strips are
        ``sorted(selectivity)[i * p // k]``, i from 0, and the largest value; the edges of a strip's
        parts are found in the same way among the magnitudes of the neurons strictly inside it.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions become those of the result.
        Without it, more than two dimensions are an error: flatten activations (n, c, h, w) first.
    backend : {"reference", "torch", "triton"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    cells : array like x, (…, p), int64; with edges="inclusive" (…, C, p), bool
        C = ``grid[0] * grid[1]`` cells; cell ``i * grid[1] + j`` is part j (of increasing
        magnitude) of strip i (of increasing selectivity). "equal": the cell of each neuron. The
        sizes of strips differ by at most one neuron, and so do those of the parts of a strip; with
        fewer neurons than cells some cells are empty. "inclusive": the membership of cells that may
        overlap. A neuron on an edge can be in several cells. It is in none if, in each of its
        strips, the neurons strictly inside all have larger, or all smaller, magnitudes. The cells
        of a strip with no neuron strictly inside are empty.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, BackendUnavailable
    LabelError
        If labels have the wrong length or only one class, or none equals the target.

    Notes
    -----
    The result for one representation (n, p) can be passed to `cell_grams`, `ablation_distances`,
    `ablation_decodability` and `AblatedForward.logits`. Those accept one set of cells per call, so
    pass the cells of a batch one item after the other, each with its own x.
    Source: Hayne, Jung & Carter 2024, "Does Representation Similarity Capture Function
    Similarity?", TMLR, and its published code; "equal" replaces their inclusive edges with an exact
    partition.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x = np.array([[5.0, 1.0, 0.0, 8.0], [1.0, 0.0, 4.0, 8.0]])  # 2 stimuli, 4 neurons
    >>> rk.selectivity_grid(x, labels=[0, 1], target=0, grid=(2, 2))
    array([3, 2, 0, 1])
    """
    grid = _options.check_grid(grid)
    edges = _options.check_choice(edges, "edges", ("equal", "inclusive"))
    x, source = _check.check_representation(x, batched=batched, allow_constant=True)
    labels = _check.check_labels(labels, x.shape[-2], target)
    return _dispatch.call(
        "selectivity_grid",
        backend,
        source,
        x,
        labels=labels,
        target=int(target),
        grid=grid,
        edges=edges,
    )
