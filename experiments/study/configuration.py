"""Configurations, which determine a run's rows: their hash, and the differences between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def digest(configuration: dict[str, Any]) -> str:
    """Hash a configuration to 16 hex digits, independent of the order of its keys."""
    text = json.dumps(configuration, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_ablations(cells: Any, fill: str | None) -> dict[str, str]:
    """Return how neurons are ablated, as far as it differs from a grid by selectivity set to zero.

    Takes a study's cells, or what its configuration records of them. Cells without a name are
    "own".
    """
    kinds = {"cells": cells if isinstance(cells, str) else "own", "fill": fill or "zero"}
    return {key: kind for key, kind in kinds.items() if kind not in ("selectivity", "zero")}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """List what differs between two configurations, one line per key, in order of the keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in (*before, *(key for key in now if key not in before)):
            path = f"{name}.{key}" if name else key
            if key not in before or key not in now:
                present, absent = ("now", "before") if key in now else ("before", "now")
                value = now[key] if key in now else before[key]
                lines.append(
                    f"{path} only {present}"
                    if isinstance(value, dict)
                    else f"{path}: {_abbreviate(value)} {present}, not recorded {absent}"
                )
            else:
                lines += differences(before[key], now[key], path)
        return lines
    if before == now:
        return []
    return [f"{name}: {_abbreviate(before)} before, {_abbreviate(now)} now"]


def _abbreviate(value: Any) -> str:
    """Write a value as JSON, cut to 40 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"


def shorten_list(names: Sequence[str]) -> str:
    """Write names in brackets: all of up to four, otherwise their number, first and last."""
    if len(names) <= 4:
        return str(list(names))
    return f"[{len(names)}: {names[0]!r}, …, {names[-1]!r}]"


def version_of(name: str) -> str:
    """The installed version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
