"""What the commands share: lists by commas, and errors and warnings of one line."""

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
    """End the command with one line and exit code 2 where what was asked for can't be done."""
    try:
        with print_warnings():
            yield
    except BrokenPipeError:  # what reads the output, such as `head`, has enough
        raise
    except (RepsimError, ExperimentError, OSError) as error:  # any other is a bug
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    except SystemExit as error:  # of a network's own code: it would pass for a run that is done
        if isinstance(error.__context__, BrokenPipeError):  # rich's way of ending
            raise
        print(f"error: something in the network called sys.exit({error.code!r})", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def print_warnings() -> Iterator[None]:
    """Warnings as a line for the person who runs the command, without a place in the code."""

    said = set[str]()

    def show(message: Warning | str, *_: object) -> None:
        if str(message) not in said:  # whoever finds it again, such as a second look at a folder
            said.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def split_commas(values: Sequence[str] | None) -> list[str] | None:
    """What was given repeatedly or by commas; None where nothing was."""
    if not values:
        return None
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
