"""The pieces of work that a study is cut in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Unit(NamedTuple):
    """The smallest piece of work that is stored by itself: a layer, for some target classes."""

    model: str
    layer: str
    block: int  # of target classes, counted from 1

    def __str__(self) -> str:
        return f"{self.model} {self.layer} {self.block}"


def units_of(model: str, layers: Iterable[str], classes: int, block: int) -> list[Unit]:
    """The units of so many classes, in blocks of a size: layer by layer."""
    blocks = range(1, -(-classes // block) + 1)
    return [Unit(model, layer, number) for layer in layers for number in blocks]
