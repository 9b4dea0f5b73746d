"""The ablation study: do representation metrics follow what happens to a network's function?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .study import Study as Study

__all__ = ["Study"]


def __getattr__(name: str) -> object:
    """Import the study, and PyTorch with it, only when it is asked for."""
    if name == "Study":
        from .study import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
