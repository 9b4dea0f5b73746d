"""Linear decodability of a representation and its ablations; Triton reads the activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from repsim_kernels.kernels.torch import probe
from repsim_kernels.kernels.triton.ablation import make_passes, select_grams, unsupported

__all__ = ["ablation_decodability", "unsupported"]


def ablation_decodability(
    x: Tensor, *, grams: Tensor | None = None, precision: str = "tf32x3", **options: Any
) -> dict[str, Tensor]:
    """Compute the torch backend's result with the kernels' passes over x."""
    options["grams"] = select_grams(x, grams)
    return probe.ablation_decodability(x, passes=make_passes(precision), **options)
