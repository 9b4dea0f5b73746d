"""What the picture and the page of a similarity map share: limits, texts, names that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from repsim_kernels.comparison.similarity_map import SimilarityMap

_MAX_NAME = 32  # characters of a name that fit next to a map


def find_limits(m: SimilarityMap) -> tuple[float, float]:
    """Return the range of the values, rounded outwards to a round number; 0 and 1 if none is."""
    if np.isnan(m.values).all():
        return 0.0, 1.0
    low, high = float(np.nanmin(m.values)), float(np.nanmax(m.values))
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size:  # one value: half of its size around it, within the bounds
        (least, most), half = m.bounds, max(size, 1.0) / 2
        low, high = max(low - half, min(low, least)), min(high + half, max(high, most))
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    # A value that is a multiple of the step up to rounding is rounded to it.
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def describe_threshold(m: SimilarityMap) -> str:
    """Say what a marked cell is not above, and what the threshold comes from."""
    source = ""
    match m.options.get("calibrate"):
        case {"permutations": int(count), "alpha": float(alpha)}:
            source = f"; {100 * (1 - alpha):g} % of {count:,} permuted maps stay below it"
    return f"not above {m.threshold:.3g}{source}"


def shorten_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Return the names without the first and last parts that they share, and those parts.

    Parts are separated by dots. The shared ones are returned as a pattern, such as
    "encoder.layer.*.output", or "" if there are none; a name that is still long loses its middle.
    """
    parts = [name.split(".") for name in names]
    most = min(map(len, parts)) - 1 if len(names) > 1 else 0
    head = _count_shared(parts, most)
    tail = _count_shared([part[::-1] for part in parts], most - head)
    shared = [*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]
    short = [_truncate(".".join(part[head : len(part) - tail])) for part in parts]
    return short, ".".join(shared) if head or tail else ""


def _count_shared(parts: list[list[str]], most: int) -> int:
    """Return how many first parts all names share, at most `most`."""
    count = 0
    while count < most and len({part[count] for part in parts}) == 1:
        count += 1
    return count


def _truncate(name: str) -> str:
    half = (_MAX_NAME - 1) // 2
    return name if len(name) <= _MAX_NAME else f"{name[:half]}…{name[-half:]}"
