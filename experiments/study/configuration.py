"""Configurations, which determine a run's rows: their hash, and the differences between two."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def digest(configuration: dict[str, Any]) -> str:
    """Hash a configuration to 16 hex digits, independent of the order of its keys."""
    text = json.dumps(configuration, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """List what differs between two configurations, one line per key, in order of the keys."""
    if isinstance(there, dict) and isinstance(here, dict):
        lines = []
        for key in (*there, *(key for key in here if key not in there)):
            path = f"{name}.{key}" if name else key
            if key not in there or key not in here:
                has, lacks = ("here", "there") if key in here else ("there", "here")
                value = here[key] if key in here else there[key]
                lines.append(
                    f"{path} only {has}"
                    if isinstance(value, dict)
                    else f"{path}: {_brief(value)} {has}, not recorded {lacks}"
                )
            else:
                lines += differences(there[key], here[key], path)
        return lines
    if there == here:
        return []
    return [f"{name}: {_brief(there)} there, {_brief(here)} here"]


def _brief(value: Any) -> str:
    """A value as JSON, at most 40 characters of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"


def version_of(name: str) -> str:
    """The installed version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
