"""Result types for the distances of ablations, shared by all backends."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple


class Route(enum.IntEnum):
    """How a distance was computed; `ablation_distances` reports the names in lower case."""

    NOTHING = 0  # the cell is constant, or no varying neuron remains, or CCA without a ridge
    SUMS = 1  # sums over matrix elements, after a linear solve for squared CCA
    ITERATIONS = 2  # Riccati iterations
    FACTORS = 3  # singular values of the original's factor times one of the remaining Gram
    EIGENVECTORS = 4  # eigenvectors of an ablated matrix
    DEFINITION = 5  # the metric itself, on an ablated copy
    EIGENVALUES = 6  # eigenvalues of the product of two Grams


class Distances(NamedTuple):
    """The distances of one metric, and how each was computed.

    Arrays (…, C), or (…, T, C) for partitions, of a backend's kind.
    """

    values: Any  # float64
    route: Any  # int64, a `Route` each
    steps: Any  # int64, iterations


class Info(NamedTuple):
    """How the distances of one metric were computed; NumPy arrays of the distances' shape."""

    route: Any  # the name of a `Route`, in lower case
    steps: Any
