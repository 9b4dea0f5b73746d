"""The ablation study: do representation metrics follow what happens to a network's function?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repsim_kernels.experiments.report.page import write_report as write_report
    from repsim_kernels.experiments.runs.driver import run as run
    from repsim_kernels.experiments.runs.membership import open_run as open_run
    from repsim_kernels.experiments.study.checks import Draws as Draws
    from repsim_kernels.experiments.study.study import Study as Study

_MODULES = {
    "Draws": "study.checks",
    "Study": "study.study",
    "open_run": "runs.membership",
    "run": "runs.driver",
    "write_report": "report.page",
}

__all__ = ["Draws", "Study", "open_run", "run", "write_report"]


def __getattr__(name: str) -> object:
    """Import PyTorch, pandas and matplotlib only when something that needs them is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
