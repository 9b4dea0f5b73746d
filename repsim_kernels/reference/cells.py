"""Class means, and the selectivity x magnitude grid of neurons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repsim_kernels.reference.gram import Array, Real


def class_means(x: Real, labels: Real, *, n_classes: int | None = None) -> Array:
    """Mean over the stimuli of each class, (k, p)."""
    x = np.asarray(x, dtype=np.float64)
    count = labels.max() + 1 if n_classes is None else n_classes
    return np.array([x[labels == c].mean(axis=0) for c in range(count)])


def selectivity_grid(
    x: Real,
    labels: Real,
    target: int,
    *,
    grid: tuple[int, int] = (4, 4),
    edges: str = "equal",
) -> NDArray[np.int64] | NDArray[np.bool_]:
    """Cell of each neuron, (p,): strips of equal count by selectivity, each cut by magnitude.

    selectivity = (m_c - m_o)/√2 and magnitude = (m_c + m_o)/√2, m_c and m_o the means over the
    target's stimuli and over all others (Hayne et al. 2024). Ties go by the neuron's index, so
    the cells are a partition whose sizes differ by at most one. With edges="inclusive" the
    membership, (C, p), of cells that hold the neurons on their edges too, as that paper's code.
    """
    rows, cols = grid
    x = np.asarray(x, dtype=np.float64)
    own = labels == target
    n_own, n_other = int(own.sum()), int((~own).sum())
    # The means times both counts, exact where the sums are: equal neurons tie. Of what is left
    # after the first stimulus, so that a constant neuron has a selectivity of exactly 0.
    inside, outside = ((x - x[0])[some].sum(axis=0) for some in (own, ~own))
    selectivity = inside * n_other - outside * n_own
    magnitude = x[own].sum(axis=0) * n_other + x[~own].sum(axis=0) * n_own
    if edges == "inclusive":
        return _inclusive(selectivity.tolist(), magnitude.tolist(), rows, cols)
    cells = np.empty(x.shape[1], dtype=np.int64)
    strips = _equal_parts(selectivity, rows)
    for strip in range(rows):
        neurons = np.flatnonzero(strips == strip)
        cells[neurons] = strip * cols + _equal_parts(magnitude[neurons], cols)
    return cells


def _equal_parts(values: Array, parts: int) -> NDArray[np.int64]:
    """Part of each value when they are ordered and cut into parts of equal count."""
    part = np.empty(len(values), dtype=np.int64)
    part[np.argsort(values, kind="stable")] = np.arange(len(values)) * parts // len(values)
    return part


def _inclusive(
    selectivity: list[float], magnitude: list[float], rows: int, cols: int
) -> NDArray[np.bool_]:
    """Whether each neuron is in each tile; the tiles' edges are those of what is inside a strip."""
    member = np.zeros((rows * cols, len(selectivity)), dtype=np.bool_)
    neurons = list(zip(selectivity, magnitude, strict=True))
    strips = _edges(selectivity, rows)
    for i in range(rows):
        inner = [m for s, m in neurons if strips[i] < s < strips[i + 1]]
        if not inner:
            continue
        tiles = _edges(inner, cols)
        for neuron, (s, m) in enumerate(neurons):
            for j in range(cols):
                member[i * cols + j, neuron] = (
                    strips[i] <= s <= strips[i + 1] and tiles[j] <= m <= tiles[j + 1]
                )
    return member


def _edges(values: list[float], parts: int) -> list[float]:
    """The values where parts of equal count begin, and the largest."""
    ordered = sorted(values)
    return [ordered[i * len(ordered) // parts] for i in range(parts)] + [max(values)]
