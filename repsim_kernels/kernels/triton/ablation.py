"""Distances between a representation and its ablations; Triton kernels read the activations.

Everything after the Gram matrices is n x n, in float64, and shared with the torch backend apart
from the solvers, which are faster.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from repsim_kernels.kernels.torch import ablation, panels, stimulus_metrics
from repsim_kernels.kernels.torch.ablation_parts import PASSES, Passes
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.cca import variate_weights
from repsim_kernels.kernels.triton.gram import cell_statistics, centered_gram
from repsim_kernels.kernels.triton.operands import Operands
from repsim_kernels.kernels.triton.spectral import SOLVERS


def unsupported(x: Tensor) -> str | None:
    """Return why the kernels can't take x, or None if they can."""
    return _launch.unsupported(x)


def make_passes(x: Tensor, precision: str) -> Passes:
    """Build the passes over x that `ablation_distances` and `ablation_decodability` make."""
    kept: list[Operands] = []  # of all neurons, from Grams that were computed before

    def weigh(h: Tensor, x: Tensor) -> Tensor:
        return variate_weights(h, x, precision=precision, operands=kept[0] if kept else None)

    if x.shape[1] < x.shape[0]:  # the Gram is singular, which rounding to float32 would hide
        return dataclasses.replace(PASSES, variate_weights=weigh)

    def compute_cell_statistics(
        x: Tensor, cells: np.ndarray, n_cells: int, shifts: bool
    ) -> tuple[panels.Panels, Tensor, Tensor]:
        g, n_varying, shift = cell_statistics(
            x, cells, n_cells, shifts, precision=precision, kept=kept
        )
        return [(slice(0, x.shape[0]), g)], n_varying, shift

    def compute_whole_gram(x: Tensor) -> Tensor:
        return centered_gram(x, kernel="linear", sigma=None, precision=precision)

    return Passes(compute_cell_statistics, weigh, compute_whole_gram, on_gpu=True)


def ablation_distances(x: Tensor, *, precision: str = "tf32x3", **options: Any) -> dict[str, Any]:
    """Compute the torch backend's result with passes and solvers for the GPU.

    Ranks and ties of distances between stimuli need Gram matrices of float64 products, also where
    others are known.
    """
    passes = make_passes(x, precision)
    if stimulus_metrics.is_needed(options["metrics"]):
        passes = dataclasses.replace(PASSES, variate_weights=passes.variate_weights)
        options["grams"] = None
    return ablation.ablation_distances(x, passes=passes, solvers=SOLVERS, **options)
