"""The progress of a run: a bar or lines for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.driver import RunProgress
    from repsim_kernels.experiments.study.units import Unit

_FAILURE_LABELS = {"failed": "failed", "retry": "retrying"}  # how the line of a failure begins
_LOG_INTERVAL = 1.0  # minimum seconds between two lines of a log


@contextmanager
def show_progress(
    console: Console, quiet: bool = False, log_json: bool = False
) -> Iterator[Callable[[RunProgress], None]]:
    """Show a run's progress: as a bar in a terminal, otherwise line by line.

    The rate and the remaining time are computed from the units that finish within the block, with a
    monotonic clock; they are unknown until the first one finishes.

    Parameters
    ----------
    console : Console
    quiet : bool
        Only print the units that fail, on stderr.
    log_json : bool
        Print one JSON object per line and event, even with ``quiet``: ``event`` ("started", "done",
        "failed", or "retry" for a failure after which the unit is retried), ``time`` (UTC),
        ``model``, ``layer``, ``block``, ``worker``, ``seconds``, ``memory_bytes``, ``error``,
        ``done``, ``failed``, ``left``, ``total``, ``units_per_minute`` and ``seconds_left``;
        unknown values are null.

    Yields
    ------
    callable
        The ``progress`` argument of `repsim_kernels.experiments.runs.driver.execute`.
    """
    if log_json:
        yield _Json(console)
    elif quiet:
        yield _Display(console)
    elif console.is_terminal and not console.is_dumb_terminal:
        bar = _Bar(console)
        with bar.progress:
            yield bar
    else:
        lines = _Lines(console)
        try:
            yield lines
        finally:
            lines.print_pending()


def format_duration(seconds: float) -> str:
    """Format a duration with a suitable unit."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def format_rate(per_minute: float, units: str = " units") -> str:
    """Format a rate as units per minute, or as seconds per unit if it is slow."""
    if per_minute < 1:
        return f"{60 / per_minute:.0f} s/unit"
    return f"{per_minute:.{0 if per_minute >= 10 else 1}f}{units}/min"


class _Display:
    """Tracks a run's rate, and prints units that fail on stderr."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start: float | None = None
        self.finished = self.failed = self.remaining = 0  # finished excludes units of earlier runs
        self.per_minute: float | None = None  # as of the latest finished unit

    def __call__(self, step: RunProgress) -> None:
        event, self.now = step.event, time.monotonic()
        is_retry = event.kind == "failed" and step.failed == self.failed
        self.failed, self.remaining = step.failed, step.total - step.done - step.failed
        if self.start is None:
            self.start = self.now - event.seconds
        if event.kind == "done":
            self.finished += 1
            if self.now > self.start:
                self.per_minute = 60 * self.finished / (self.now - self.start)
        self.show("retry" if is_retry else event.kind, step)

    def show(self, kind: str, step: RunProgress) -> None:
        """Show a step of kind "started", "done", "failed" or "retry"."""
        if kind == "failed":
            print(_describe_failure(kind, step), file=sys.stderr, flush=True)

    @property
    def seconds_left(self) -> float | None:
        return None if self.per_minute is None else 60 * self.remaining / self.per_minute

    def describe_rate(self, memory: int, units: str = " units") -> Iterator[str]:
        """Yield the rate, the remaining time and the memory, as far as they are known."""
        if self.per_minute is not None and self.seconds_left is not None:
            yield format_rate(self.per_minute, units)
            if self.remaining:
                yield f"{format_duration(self.seconds_left)} left"
        if memory:
            yield f"{memory / 2**30:.1f} GiB"


class _Json(_Display):
    def show(self, kind: str, step: RunProgress) -> None:
        event = step.event
        fields = {
            "event": kind,
            "time": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            **event.unit._asdict(),
            "worker": event.worker or None,
            "seconds": event.seconds or None,
            "memory_bytes": event.memory or None,
            "error": event.error or None,
            "done": step.done,
            "failed": step.failed,
            "left": self.remaining,
            "total": step.total,
            "units_per_minute": self.per_minute,
            "seconds_left": self.seconds_left,
        }
        print(json.dumps(fields), file=self.console.file, flush=True)


class _Lines(_Display):
    """For a file: one line per finished unit, at most one a second, but always the last."""

    printed_at: float | None = None
    pending = ""

    def show(self, kind: str, step: RunProgress) -> None:
        position = f"{step.done}/{step.total} {step.event.unit}"
        due = self.printed_at is None or self.now - self.printed_at >= _LOG_INTERVAL
        if kind in _FAILURE_LABELS:
            self._print(_describe_failure(kind, step))
        elif kind == "done":
            text = f"{position} done in {format_duration(step.event.seconds)}"
            self.pending = ", ".join([text, *self.describe_rate(step.event.memory)])
            if due:
                self.printed_at = self.now
                self.print_pending()
        elif self.printed_at is None:  # otherwise a run of long units would print nothing at first
            self.printed_at = self.now
            self._print(f"{position} started")

    def print_pending(self) -> None:
        if self.pending:
            self._print(self.pending)
            self.pending = ""

    def _print(self, line: str) -> None:
        print(line, file=self.console.file, flush=True)  # rich would wrap it


class _Bar(_Display):
    """For a terminal: one line that is updated, below the lines about units that fail."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.memory = 0
        self.running: dict[Unit, None] = {}
        description = Column(ratio=1, no_wrap=True)  # truncated in a narrow terminal
        self.progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False, table_column=description),
            console=console,
            expand=True,
            transient=True,  # erase the bar of a run without a step
            redirect_stderr=sys.stderr.isatty(),  # if stderr goes to a file, leave it alone
        )
        self.task = self.progress.add_task("starting", total=None)

    def show(self, kind: str, step: RunProgress) -> None:
        unit = step.event.unit
        self.progress.live.transient = False
        self.memory = max(self.memory, step.event.memory)
        if kind == "started":
            self.running[unit] = None
        else:
            self.running.pop(unit, None)
        if kind in _FAILURE_LABELS:
            self.console.print(_describe_failure(kind, step), markup=False, highlight=False)
        facts = [f"{step.failed} failed"] if step.failed else []
        facts += self.describe_rate(self.memory, "")
        if self.running:
            *others, last = self.running
            more = f" +{len(others)}" if others else ""
            facts.append(f"{last.layer} {last.block}{more}, {last.model}")
        self.progress.update(
            self.task, total=step.total, completed=step.done, description=", ".join(facts)
        )


def _describe_failure(kind: str, step: RunProgress) -> str:
    return f"{_FAILURE_LABELS[kind]}: {step.event.unit}: {step.event.error}"
