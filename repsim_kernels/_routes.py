"""How distances were found: what kernels tell by numbers, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from repsim_kernels import _arrays
from repsim_kernels._arrays import Array

#: By the number that kernels give, `kernels/torch/ablated.py: Route`; the last is the reference's.
ROUTES = ("nothing", "sums", "iterations", "factors", "eigenvectors", "definition")


class Info(NamedTuple):
    """How the distances of one metric were found; NumPy arrays (…, C)."""

    route: Any
    steps: Any


def split(
    found: dict[str, Array], metrics: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Info]]:
    """Distances, and the routes and steps that a kernel gave beside them."""
    info = {
        name: Info(
            np.array(ROUTES)[_arrays.to_numpy(found[f"{name} route"])],
            _arrays.to_numpy(found[f"{name} steps"]),
        )
        for name in metrics
    }
    return {name: found[name] for name in metrics}, info
