"""Distances between a representation and its ablations; Triton kernels read the activations.

Everything after the Gram matrices is n x n, in float64, and shared with the torch backend apart
from the solvers, which are faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from repsim_kernels._routes import Distances
from repsim_kernels.kernels.torch import ablation, panels
from repsim_kernels.kernels.torch import gram as torch_gram
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.cca import variate_weights
from repsim_kernels.kernels.triton.gram import cell_statistics
from repsim_kernels.kernels.triton.operands import Operands
from repsim_kernels.kernels.triton.spectral import SOLVERS


def unsupported(x: Tensor) -> str | None:
    """Return why the kernels can't take x, or None if they can."""
    return _launch.unsupported(x)


def make_passes(precision: str) -> ablation.Passes:
    """Build the passes over x that `ablation_distances` and `ablation_decodability` make."""
    kept: list[Operands] = []  # of all neurons, from Grams that were computed before

    def compute_cell_statistics(
        x: Tensor, cells: np.ndarray, n_cells: int, shifts: bool
    ) -> tuple[panels.Panels, Tensor, Tensor]:
        if x.shape[1] >= x.shape[0]:
            g, n_varying, shift = cell_statistics(
                x, cells, n_cells, shifts, precision=precision, kept=kept
            )
            if int(n_varying.sum()) >= x.shape[0]:
                return panels.panels_view(g), n_varying, shift
        # With fewer varying neurons than stimuli the Gram is singular, which rounding would hide.
        return torch_gram.cell_statistics(x, cells, n_cells, shifts)

    def compute_weights(h: Tensor, x: Tensor) -> Tensor:
        return variate_weights(h, x, precision=precision, operands=kept[0] if kept else None)

    return ablation.Passes(compute_cell_statistics, compute_weights)


def select_grams(x: Tensor, grams: Tensor | None) -> Tensor | None:
    """Return Grams that the caller knows, or None if those of `make_passes` are more accurate."""
    if grams is not None and int((x != x[:1]).any(0).sum()) >= len(x):
        return grams
    return None


def ablation_distances(
    x: Tensor, *, grams: Tensor | None = None, precision: str = "tf32x3", **options: Any
) -> dict[str, Distances]:
    """Compute the torch backend's result with passes and solvers for the GPU."""
    options["grams"] = select_grams(x, grams)
    return ablation.ablation_distances(x, passes=make_passes(precision), solvers=SOLVERS, **options)
