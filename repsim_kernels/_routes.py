"""What every backend returns for the distances of ablations."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple


class Route(enum.IntEnum):
    """How a distance was computed; `ablation_distances` reports the names in lower case."""

    NOTHING = 0  # nothing was removed, or nothing is left
    SUMS = 1  # over elements, or over those that linear equations give
    ITERATIONS = 2  # Riccati iterations
    FACTORS = 3  # singular values of the product of what is left and the original
    EIGENVECTORS = 4  # of an ablated matrix
    DEFINITION = 5  # of the reference: the metric itself, from an ablated copy


class Distances(NamedTuple):
    """The distances of one metric, and how each was computed; arrays (…, C) of a backend's kind."""

    values: Any  # float64
    route: Any  # int64, a `Route` each
    steps: Any  # int64, iterations


class Info(NamedTuple):
    """How the distances of one metric were found; NumPy arrays (…, C)."""

    route: Any  # the name of a `Route`, in lower case
    steps: Any
