"""The units of work that a study is split into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Unit(NamedTuple):
    """The unit of work and storage: one layer and one block of target classes."""

    model: str
    layer: str
    block: int  # number of the block of target classes, from 1

    def __str__(self) -> str:
        return f"{self.model} {self.layer} {self.block}"


def units_of(model: str, layers: Iterable[str], classes: int, block: int) -> list[Unit]:
    """List the units of a model, layer by layer, for a number of classes in blocks of a size."""
    blocks = range(1, -(-classes // block) + 1)
    return [Unit(model, layer, number) for layer in layers for number in blocks]
