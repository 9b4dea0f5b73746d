"""Containers of tensors: what modules return, and what networks are called with."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

from repsim_kernels import _arrays


def get_parts(value: Any) -> dict[Any, Any] | None:
    """Return the parts of a container by key, field or position; None for a value without any."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (tuple, list)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def rebuild(example: Any, parts: dict[Any, Any]) -> Any:
    """Return a container like the example with other parts."""
    if isinstance(example, (tuple, list)):
        return _arrays.rebuild_sequence(example, parts.values())
    if isinstance(example, Mapping) and not isinstance(example, MutableMapping):
        return parts
    rebuilt = copy.copy(example)  # constructors may have other arguments
    for key, part in parts.items():
        if isinstance(example, MutableMapping):
            rebuilt[key] = part
        else:
            object.__setattr__(rebuilt, key, part)  # also if the dataclass is frozen
    return rebuilt


def name_parts(parts: dict[Any, Any]) -> dict[str, Any]:
    """Return the keys of parts by the names that a path may use for them.

    A part is named by its key or its position, which may count from the end: "-1" is the last.
    """
    keys = list(parts)
    names = {str(i - len(keys)): key for i, key in enumerate(keys)}
    names |= {str(i): key for i, key in enumerate(keys)}
    return names | {str(key): key for key in keys}
