"""Every metric between a representation and its ablations, where kernels read the activations.

What follows the Grams is n x n, in float64: the torch backend's, by faster solvers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from torch import Tensor

from repsim_kernels._routes import Distances
from repsim_kernels.kernels.torch import ablation, panels
from repsim_kernels.kernels.torch import gram as torch_gram
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.cca import variate_weights
from repsim_kernels.kernels.triton.gram import cell_sums
from repsim_kernels.kernels.triton.spectral import SOLVERS


def unsupported(x: Tensor) -> str | None:
    return _launch.unsupported(x)


def passes(precision: str) -> ablation.Passes:
    """The passes over x by kernels, for `ablation_distances` and `ablation_decodability`."""

    def sums(
        x: Tensor, cells: np.ndarray, n_cells: int, shifts: bool
    ) -> tuple[panels.Panels, Tensor, Tensor]:
        if x.shape[1] >= x.shape[0]:
            g, live, shift = cell_sums(x, cells, n_cells, shifts, precision=precision)
            if int(live.sum()) >= x.shape[0]:
                return panels.panels_view(g), live, shift
        # With fewer live neurons than stimuli the Gram is singular, which rounding would hide.
        return torch_gram.cell_sums(x, cells, n_cells, shifts)

    return ablation.Passes(sums, functools.partial(variate_weights, precision=precision))


def ablation_distances(
    x: Tensor, *, precision: str = "tf32x3", **options: Any
) -> dict[str, Distances]:
    return ablation.ablation_distances(x, passes=passes(precision), solvers=SOLVERS, **options)
