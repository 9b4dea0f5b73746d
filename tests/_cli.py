"""Run commands in this process, and make units fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from typer.testing import CliRunner

from repsim_kernels.experiments.cli.app import app
from repsim_kernels.experiments.study import measure


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Run a command; return its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def fail_at_call(count: int, error: BaseException) -> Callable[..., pd.DataFrame]:
    """Return a `measure._measure_target` whose ``count``-th call raises an error."""
    target, calls = measure._measure_target, []

    def failing(*arguments: Any) -> pd.DataFrame:
        calls.append(arguments)
        if len(calls) == count:
            raise error
        return target(*arguments)

    return failing
