"""Class means of neurons, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

from typing import Any

from repsim_kernels import _check, _dispatch, _options
from repsim_kernels._typing import Array


def class_means(
    x: Any,
    labels: Any,
    *,
    n_classes: int | None = None,
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Mean activation of every neuron over the stimuli of each class.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 1 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    labels : integer array, (n,)
        Class of each stimulus, 0 … n_classes - 1.
    n_classes : int, optional
        Number of classes k; by default the largest label and one.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions are those of the result. Without
        it more than two dimensions are refused: flatten activations (n, c, h, w) first.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    means : array like x, (…, k, p), float64
        In x's units.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, BackendUnavailable
    LabelError
        Labels out of range or of the wrong length, or a class without a stimulus.

    Notes
    -----
    Reads x once. Source: Morcos et al. 2018, the numerators of the selectivity index.
    """
    x, source = _check.check_representation(x, batched=batched, allow_constant=True, min_stimuli=1)
    labels, n_classes = _check.check_classes(labels, x.shape[-2], n_classes)
    return _dispatch.call("class_means", backend, source, x, labels=labels, n_classes=n_classes)


def selectivity_grid(
    x: Any,
    labels: Any,
    target: int,
    *,
    grid: tuple[int, int] = (4, 4),
    edges: str = "equal",
    batched: bool = False,
    backend: str | None = None,
) -> Array:
    """Cells of neurons by how selective for a class, and how active, they are.

    With m_c a neuron's mean over the target's stimuli and m_o over the others, the neurons are cut
    in ``grid[0]`` strips of equal count by selectivity (m_c - m_o)/√2, and each strip in
    ``grid[1]`` of equal count by magnitude (m_c + m_o)/√2.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int
        The label of the class.
    grid : (int, int)
        Strips by selectivity, and parts of each by magnitude.
    edges : {"equal", "inclusive"}
        "equal": a partition; ties are broken by index. "inclusive": a cell holds every neuron on
        its edges, as in the code that Hayne et al. published. The edges of k strips are
        ``sorted(selectivity)[i * p // k]``, i from 0, and the largest; those of a strip's parts
        are found likewise among the magnitudes of the neurons strictly inside the strip.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions are those of the result. Without
        it more than two dimensions are refused: flatten activations (n, c, h, w) first.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    cells : array like x, (…, p), int64; with edges="inclusive" (…, C, p), bool
        C = ``grid[0] * grid[1]`` cells; cell ``i * grid[1] + j`` is strip i (selectivity rising
        with i), part j (magnitude rising with j). "equal": the cell of each neuron. Strips differ
        by at most one neuron, and so do the parts of a strip; with fewer neurons than cells some
        are empty. "inclusive": the membership of cells that overlap. A neuron on edges can be in
        several; one on a strip's edge, whose magnitude no neuron inside reaches, in none; and the
        cells of a strip with no neuron strictly inside are empty.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError, BackendUnavailable
    LabelError
        Labels of the wrong length, only one class, or a target that is not there.

    Notes
    -----
    Either kind of cells, of one representation (n, p), goes to `cell_grams`, `ablation_distances`,
    `ablation_decodability` and `AblatedForward.logits`. Those take one set of cells a call, so
    that the cells of a batch are given one item at a time, each with its x.
    Source: Hayne, Jung & Carter 2024; "equal" has an exact partition in place of inclusive edges.
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
