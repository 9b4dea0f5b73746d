"""One side of an exact comparison: a network, or arrays in its place, with its stimuli."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from repsim_kernels.comparison.extract import LayerSize, find_sizes, visit_representations
from repsim_kernels.comparison.layers import Network
from repsim_kernels.comparison.pooling import Pool
from repsim_kernels.comparison.stimuli import Stimuli
from repsim_kernels.errors import DeviceError, ShapeError


@dataclass
class Side:
    """A network, or arrays in its place, with its stimuli.

    Attributes
    ----------
    model : Network, or dict of str to tensor, (n, p)
    stimuli : Stimuli
    pool : str or function
    sizes : dict of str to LayerSize
        Of a network's layers; empty for arrays.
    positions : tensor, (n,), optional
        Where each stimulus is among those of the other side, if that has a loader of its own.
    """

    model: Any
    stimuli: Stimuli
    pool: Pool
    sizes: dict[str, LayerSize]
    positions: Tensor | None = None

    @classmethod
    def observe(cls, model: Network | dict[str, Tensor], stimuli: Stimuli, pool: Pool) -> Side:
        """Return a side whose layers are found by a pass of a few stimuli."""
        sizes = find_sizes(model, stimuli.sample, pool) if isinstance(model, Network) else {}
        return cls(model, stimuli, pool, sizes)

    @property
    def row_bytes(self) -> int:
        """Bytes of all layers for one stimulus."""
        return sum(size.row_bytes for size in self.sizes.values())

    @property
    def keeps_stimuli(self) -> bool:
        """Whether each layer has one row for each stimulus."""
        return self.pool != "tokens" and all(
            size.row_bytes == size.p * size.itemsize for size in self.sizes.values()
        )

    def visit(self, batch: Any, names: Iterable[str], visit: Callable[[str, Tensor], None]) -> None:
        """Run the network on a batch, and call ``visit(name, x)`` for each of the named layers."""
        visit_representations(self.model, batch, self.pool, names, visit)

    def put_in_order(self, x: Any) -> Any:
        """Return a representation of all stimuli in the order of the other side's."""
        if self.positions is None:
            return x
        if len(x) != self.stimuli.n:
            raise ShapeError(
                f"model_b: {len(x)} stimuli, but {self.stimuli.name} has {self.stimuli.n}; "
                "expected the same"
            )
        index = self.positions.argsort()
        return x[index.numpy() if isinstance(x, np.ndarray) else index.to(x.device)]


def is_on_gpu(network: Network) -> bool:
    return any(a.is_cuda for a in network.model.parameters())


def check_devices(networks: list[Network]) -> None:
    """Check that networks are all on GPUs, or none; each has the Grams of its backend."""
    if len({is_on_gpu(network) for network in networks}) > 1:
        raise DeviceError(
            "model_a, model_b: one is on a GPU and the other is not; expected both or neither"
        )
