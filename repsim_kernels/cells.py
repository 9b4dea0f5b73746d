"""Cells of an activation's neurons: channels, attention heads, positions, random or by scores.

Each function takes the shape of the activation of one stimulus, without n, or its number of
neurons p, and returns the cell of each neuron in C order, as ``x.reshape(n, -1)`` orders them. The
labels can be passed as ``cells`` to every function that takes cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repsim_kernels import _options
from repsim_kernels.errors import CellError, NonFiniteError, OptionError, ShapeError

if TYPE_CHECKING:
    from repsim_kernels._typing import ArrayLike

__all__ = ["by", "channels", "heads", "positions", "random"]

Labels: TypeAlias = NDArray[np.int64]


def channels(shape: Sequence[int], *, channels_last: bool | None = None) -> Labels:
    """One cell for each channel, or feature.

    Parameters
    ----------
    shape : sequence of int
        Shape of the activation of one stimulus, for example ``x.shape[1:]``.
    channels_last : bool, optional
        Whether the last dimension holds the channels, and not the first. By default it does for two
        dimensions, (tokens, features), and not for others, such as (c,), (c, h, w) and
        (c, t, h, w). Pass it for (h, w, c) or (c, t).

    Returns
    -------
    cells : int64 array, (p,)
        The channel of each neuron.

    Raises
    ------
    ShapeError, OptionError

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cells.channels((2, 1, 3))
    array([0, 0, 0, 1, 1, 1])
    >>> rk.cells.channels((2, 3))
    array([0, 1, 2, 0, 1, 2])
    """
    shape, axis = _check_shape(shape, channels_last)
    return _label_dimension(shape, axis, np.arange(shape[axis]))


def heads(shape: Sequence[int], n_heads: int, *, channels_last: bool | None = None) -> Labels:
    """One cell for each attention head: equal slices of consecutive channels.

    Parameters
    ----------
    shape : sequence of int
        Shape of the activation of one stimulus, for example (tokens, features).
    n_heads : int
        Number of heads, which divides the number of channels.
    channels_last : bool, optional
        As in `channels`.

    Returns
    -------
    cells : int64 array, (p,)
        The head of each neuron.

    Raises
    ------
    ShapeError, OptionError
    CellError
        If the heads do not divide the channels.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cells.heads((2, 4), 2)  # two tokens, four features
    array([0, 0, 1, 1, 0, 0, 1, 1])
    """
    shape, axis = _check_shape(shape, channels_last)
    n_heads = _options.check_count(n_heads, "n_heads")
    width, rest = divmod(shape[axis], n_heads)
    if rest:
        raise CellError(
            f"n_heads: {n_heads}, but shape {shape} has {shape[axis]} channels; expected a divisor "
            f"of {shape[axis]}"
        )
    return _label_dimension(shape, axis, np.arange(shape[axis]) // width)


def positions(shape: Sequence[int], *, channels_last: bool | None = None) -> Labels:
    """One cell for each position: a token, or a pixel, with all of its channels.

    Parameters
    ----------
    shape : sequence of int
        Shape of the activation of one stimulus.
    channels_last : bool, optional
        As in `channels`.

    Returns
    -------
    cells : int64 array, (p,)
        The position of each neuron; positions are numbered in C order of the other dimensions.

    Raises
    ------
    ShapeError, OptionError

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cells.positions((2, 1, 3))  # two channels of three pixels
    array([0, 1, 2, 0, 1, 2])
    >>> rk.cells.positions((2, 3))  # two tokens, three features
    array([0, 0, 0, 1, 1, 1])
    """
    shape, axis = _check_shape(shape, channels_last)
    others = [length for i, length in enumerate(shape) if i != axis]
    labels = np.arange(math.prod(others), dtype=np.int64).reshape(others)
    return np.broadcast_to(np.expand_dims(labels, axis), shape).flatten()


def random(p: int, n_cells: int, seed: int = 0) -> Labels:
    """Cells of equal size that consist of random neurons.

    Parameters
    ----------
    p : int
        Number of neurons.
    n_cells : int
        Number of cells, at most p.
    seed : int
        Seed of NumPy's ``default_rng``, at least 0.

    Returns
    -------
    cells : int64 array, (p,)
        The cell of each neuron. The sizes of cells differ by at most one.

    Raises
    ------
    OptionError
    CellError
        If there are more cells than neurons.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> cells = rk.cells.random(10, 3)
    >>> np.bincount(cells)
    array([4, 3, 3])
    """
    p = _options.check_count(p, "p")
    n_cells = _options.check_count(n_cells, "n_cells")
    seed = _options.check_count(seed, "seed", minimum=0)
    if n_cells > p:
        raise CellError(f"n_cells: {n_cells} for {p} neurons; expected at most {p}")
    labels = np.arange(p, dtype=np.int64) % n_cells
    return np.random.default_rng(seed).permutation(labels)


def by(scores: ArrayLike, grid: int | Sequence[int]) -> Labels:
    """Cells of neurons with similar scores.

    The neurons are sorted by the first score and divided into ``grid[0]`` groups of equal size.
    Each group is sorted by the next score and divided in the same way, and so on. Ties are broken
    by index. With a class's selectivity and magnitude these are the cells of `selectivity_grid`.

    Parameters
    ----------
    scores : array, (p,) or (s, p)
        One score of each neuron, or s scores. Infinite ones are allowed.
    grid : int, or sequence of s ints
        Number of groups for each score; one int for one score.

    Returns
    -------
    cells : int64 array, (p,)
        The cell of each neuron, numbered in C order of the grid: for a grid (4, 4), cell 4 i + j
        is part j of group i. The sizes of a group's parts differ by at most one.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cells.by([0.3, 0.1, 0.2, 0.4], 2)
    array([1, 0, 0, 1])
    >>> rk.cells.by([[1, 1, 2, 2], [8, 9, 6, 5]], (2, 2))
    array([0, 1, 3, 2])
    """
    from repsim_kernels import _arrays  # it imports PyTorch, which the other functions don't need

    values = _arrays.to_numpy(_arrays.convert(scores, "scores")[0])
    parts = (grid,) if isinstance(grid, (int, np.integer)) else _options.to_tuple(grid)
    if parts is None or isinstance(grid, str) or not parts:
        raise OptionError(
            f"grid: {_options.short_repr(grid)}; expected a whole number, or one for each score"
        )
    parts = tuple(_options.check_count(k, "grid") for k in parts)
    if values.ndim not in (1, 2) or values.shape[-1] < 1:
        raise ShapeError(f"scores: shape {values.shape}; expected (p,), or (s, p) for s scores")
    rows = values.reshape(-1, values.shape[-1])
    if len(rows) != len(parts):
        raise OptionError(
            f"grid: {len(parts)} numbers for {len(rows)} scores; expected one for each"
        )
    if missing := int((rows != rows).sum()):
        raise NonFiniteError(f"scores: {missing} of {rows.size} values are NaN; expected numbers")
    cells = np.zeros(rows.shape[1], dtype=np.int64)
    for row, k in zip(rows, parts, strict=True):
        order = np.lexsort((row, cells))
        sizes = np.bincount(cells)
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        size = np.repeat(sizes, sizes)
        cells[order] = cells[order] * k + (np.arange(len(row)) - starts) * k // size
    return cells


def _check_shape(shape: Any, channels_last: Any) -> tuple[tuple[int, ...], int]:
    """Check an activation's shape; return it and the index of its channel dimension."""
    lengths = None if isinstance(shape, str) else _options.to_tuple(shape)
    if not lengths:
        raise ShapeError(
            f"shape: {_options.short_repr(shape)}; expected the shape of one stimulus' activation, "
            "such as x.shape[1:]"
        )
    lengths = tuple(_options.check_count(k, "shape", error=ShapeError) for k in lengths)
    if channels_last is None:
        return lengths, len(lengths) - 1 if len(lengths) == 2 else 0
    last = _options.check_flag(channels_last, "channels_last")
    return lengths, len(lengths) - 1 if last else 0


def _label_dimension(shape: tuple[int, ...], axis: int, labels: NDArray[Any]) -> Labels:
    """Return the label of each neuron, given one for each index of a dimension."""
    after = shape[axis + 1 :]
    return np.broadcast_to(labels.reshape(-1, *(1 for _ in after)), shape).flatten()
