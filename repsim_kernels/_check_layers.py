"""Checks of two arguments that are one representation each, or a sequence of layers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from repsim_kernels import _arrays, _check
from repsim_kernels._arrays import Source


class Sides(NamedTuple):
    """The representations of two arguments, checked."""

    xs: list[Tensor]
    ys: list[Tensor] | None  # None if they are xs
    source: Source
    is_pair: bool  # whether no argument was a sequence of layers
    by_name: dict[str, Tensor]  # all representations, by their names in errors


def check_sides(
    xs: Any, ys: Any, *, names: tuple[str, str] = ("xs", "ys"), **options: Any
) -> Sides:
    """Check two arguments, each one representation (n, p) or a sequence of them.

    ys may be None, for xs. `options` are those of `_check.check_representations`.
    """
    left, source = _check.check_representations(xs, names[0], allow_one=True, **options)
    by_name = _name_layers(xs, names[0], left)
    right = None
    if ys is not None:
        first: dict[str, Any] = {"like": (left[0], source), "like_name": next(iter(by_name))}
        right, _ = _check.check_representations(ys, names[1], allow_one=True, **first, **options)
        by_name |= _name_layers(ys, names[1], right)
    return Sides(left, right, source, by_name.keys() <= set(names), by_name)


def _name_layers(xs: Any, name: str, checked: list[Tensor]) -> dict[str, Tensor]:
    if _arrays.count_dimensions(xs) == 2:
        return {name: checked[0]}
    return {f"{name}[{i}]": x for i, x in enumerate(checked)}
