"""Linear decodability of a representation and its ablations; Triton reads the activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from repsim_kernels.kernels.torch import probe
from repsim_kernels.kernels.triton.ablation import make_passes, unsupported

__all__ = ["ablation_decodability", "unsupported"]


def ablation_decodability(x: Tensor, *, precision: str = "tf32x3", **options: Any) -> Any:
    """Compute the torch backend's result with the kernels' passes over x."""
    return probe.ablation_decodability(x, passes=make_passes(x, precision), **options)
