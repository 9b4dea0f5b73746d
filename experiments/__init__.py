"""Ablation studies: do representation metrics track changes of a network's function?"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repsim_kernels.experiments.report.page import write_report as write_report
    from repsim_kernels.experiments.runs.driver import run as run
    from repsim_kernels.experiments.runs.membership import open_run as open_run
    from repsim_kernels.experiments.runs.results import Results as Results
    from repsim_kernels.experiments.study.checks import Draws as Draws
    from repsim_kernels.experiments.study.study import Study as Study

_MODULES = {
    "Draws": "study.checks",
    "Results": "runs.results",
    "Study": "study.study",
    "open_run": "runs.membership",
    "run": "runs.driver",
    "write_report": "report.page",
}

#: Import names of the packages that the extra `experiments` installs.
_EXTRA = {
    *("jinja2", "matplotlib", "pandas", "pyarrow", "rich", "safetensors", "scipy", "sklearn"),
    *("statsmodels", "torchvision", "typer"),
}

__all__ = ["Draws", "Results", "Study", "open_run", "run", "write_report"]


def __getattr__(name: str) -> object:
    """Import PyTorch, pandas and matplotlib only when a name that needs them is used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _name_missing_extra():
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def main() -> None:
    """Run `repsim`; if the extra is not installed, exit with a one-line message."""
    try:
        with _name_missing_extra():
            from repsim_kernels.experiments.cli.app import app

            app()
    except _MissingExtraError as error:
        sys.exit(f"error: {error}")


class _MissingExtraError(ModuleNotFoundError):
    """A package that the extra `experiments` installs is missing."""


@contextlib.contextmanager
def _name_missing_extra() -> Iterator[None]:
    """Say how to install a package of the extra that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise _MissingExtraError(
            f"{error.name} is not installed; in a checkout of repsim_kernels run: "
            "pip install '.[experiments]'",
            name=error.name,
        ) from None
