"""Class means, and the grid of neurons by selectivity and magnitude."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repsim_kernels.reference.gram import Array, Real


def class_means(x: Real, labels: Real, *, n_classes: int | None = None) -> Array:
    """Return the mean of x (n, p) over the stimuli of each class, (k, p)."""
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
    """Return the cell of each neuron, (p,): strips of equal count by selectivity, cut by magnitude.

    selectivity = (m_c - m_o)/√2 and magnitude = (m_c + m_o)/√2, where m_c and m_o are the means
    over the target's stimuli and over all others (Hayne et al. 2024). Ties are broken by the
    neuron's index, so the cells are a partition whose sizes differ by at most one. With
    edges="inclusive" the result is the membership, (C, p), of cells that include the neurons on
    their edges, as in that paper's code.
    """
    rows, cols = grid
    x = np.asarray(x, dtype=np.float64)
    is_target = labels == target
    n_target, n_other = int(is_target.sum()), int((~is_target).sum())
    # Means are multiplied by both counts, so that they are exact if the sums are, and equal neurons
    # tie. The first stimulus is subtracted, so that constant neurons have selectivity exactly 0.
    inside, outside = ((x - x[0])[mask].sum(axis=0) for mask in (is_target, ~is_target))
    selectivity = inside * n_other - outside * n_target
    magnitude = x[is_target].sum(axis=0) * n_other + x[~is_target].sum(axis=0) * n_target
    if edges == "inclusive":
        return _mark_inclusive_cells(selectivity.tolist(), magnitude.tolist(), rows, cols)
    cells = np.empty(x.shape[1], dtype=np.int64)
    strips = _split_equally(selectivity, rows)
    for strip in range(rows):
        neurons = np.flatnonzero(strips == strip)
        cells[neurons] = strip * cols + _split_equally(magnitude[neurons], cols)
    return cells


def _split_equally(values: Array, parts: int) -> NDArray[np.int64]:
    """Return the part of each value after cutting the sorted values into parts of equal count."""
    part = np.empty(len(values), dtype=np.int64)
    part[np.argsort(values, kind="stable")] = np.arange(len(values)) * parts // len(values)
    return part


def _mark_inclusive_cells(
    selectivity: list[float], magnitude: list[float], rows: int, cols: int
) -> NDArray[np.bool_]:
    """Return whether each neuron is in each cell, (C, p).

    The edges of a strip's cells come from the neurons strictly inside the strip.
    """
    member = np.zeros((rows * cols, len(selectivity)), dtype=np.bool_)
    neurons = list(zip(selectivity, magnitude, strict=True))
    strips = _find_edges(selectivity, rows)
    for i in range(rows):
        inner = [m for s, m in neurons if strips[i] < s < strips[i + 1]]
        if not inner:
            continue
        tiles = _find_edges(inner, cols)
        for neuron, (s, m) in enumerate(neurons):
            for j in range(cols):
                member[i * cols + j, neuron] = (
                    strips[i] <= s <= strips[i + 1] and tiles[j] <= m <= tiles[j + 1]
                )
    return member


def _find_edges(values: list[float], parts: int) -> list[float]:
    """Return the values where parts of equal count begin, and the largest value."""
    ordered = sorted(values)
    return [ordered[i * len(ordered) // parts] for i in range(parts)] + [max(values)]
