"""The ablation study: do representation metrics follow what happens to a network's function?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .study import Study as Study

_MODULES = {"Study": "study"}

__all__ = ["Study"]


def __getattr__(name: str) -> object:
    """Import the study, and PyTorch with it, only when it is asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
