"""Helpers that the commands share: comma-separated lists, and one-line errors and warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from repsim_kernels import RepsimError
from repsim_kernels.experiments.errors import ExperimentError, one_line


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Print expected errors on one line and exit with code 2."""
    try:
        with print_warnings():
            yield
    except BrokenPipeError:  # the reader of the output, such as `head`, has stopped reading
        raise
    except (RepsimError, ExperimentError, OSError) as error:  # any other error is a bug
        print(f"error: {_describe(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    except SystemExit as error:  # raised by a network's code: exit code 0 would look like success
        if isinstance(error.__context__, BrokenPipeError):  # raised by rich
            raise
        print(f"error: the network's code called sys.exit({error.code!r})", file=sys.stderr)
        raise typer.Exit(2) from None


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print each distinct warning once, on one line, without a place in the code."""

    printed = set[str]()

    def show(message: Warning | str, *_: object) -> None:
        if str(message) not in printed:  # a folder that is read twice warns twice
            printed.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def split_commas(values: Sequence[str] | None) -> list[str] | None:
    """Split values that were separated by commas or given repeatedly; None if there are none."""
    if not values:
        return None
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
