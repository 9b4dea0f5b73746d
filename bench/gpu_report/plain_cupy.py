"""What plain CuPy makes of a row's inputs, to be held against beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _nothing(device: torch.device) -> Sequence[Tensor]:
    return ()


@dataclass(frozen=True)
class PlainCupy:
    """``compute(cupy, *arrays)`` as a route: tensors in and out by DLPack, on torch's stream.

    The module is an argument, so that NumPy can stand in for it where there is no GPU. ``beside``
    gives tensors that the route has on the device beforehand.
    """

    compute: Callable[..., Any]
    beside: Callable[[torch.device], Sequence[Tensor]] = _nothing

    def __call__(self, *inputs: Tensor) -> Tensor:
        import cupy  # type: ignore[import-not-found]

        device = inputs[0].device
        with (
            cupy.cuda.Device(device.index),
            cupy.cuda.Stream.from_external(torch.cuda.current_stream(device)),
        ):
            arrays = map(cupy.from_dlpack, (*inputs, *self.beside(device)))
            return torch.utils.dlpack.from_dlpack(self.compute(cupy, *arrays))


def centred(x: Any) -> Any:
    """In float32, each neuron without its mean."""
    c = x.astype("float32", copy=False)
    return c - c.mean(0)


def cell_grams(xp: Any, x: Any, *members: Any) -> Any:
    """One product a cell."""
    rows = centred(x).T
    return xp.stack([b.T @ b for b in (rows[i] for i in members)])


def forget() -> None:
    """Give the memory that CuPy keeps for itself back, to PyTorch's rows."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
