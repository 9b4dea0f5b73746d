"""What a person, or a program, sees of a run while it goes on."""

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

_FAILURES = {"failed": "failed", "retry": "again"}  # how a failure's own line begins
_LOG_INTERVAL = 1.0  # seconds between two lines of a log


@contextmanager
def show_progress(
    console: Console, quiet: bool = False, log_json: bool = False
) -> Iterator[Callable[[RunProgress], None]]:
    """Show a run's steps: a bar in a terminal, lines one after the other elsewhere.

    Rate and time left are those of the units that were finished while the block lasts, by a clock
    that nobody sets; they are not known before the first.

    Parameters
    ----------
    console : Console
    quiet : bool
        Say nothing but which units are given up, on stderr.
    log_json : bool
        A JSON object on a line for each step, whatever else is asked for: ``event`` ("started",
        "done", "failed", or "retry" for a failure after which the unit is tried again), ``time``
        (UTC), ``model``, ``layer``, ``block``, ``worker``, ``seconds``, ``memory_bytes``,
        ``error``, ``done``, ``failed``, ``left``, ``total``, ``units_per_minute`` and
        ``seconds_left``; null where something is not known.

    Yields
    ------
    callable
        What `repsim_kernels.experiments.runs.driver.execute` calls with each `RunProgress`.
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
            lines.print_held()


def format_duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def format_rate(per_minute: float, units: str = " units") -> str:
    """A rate as a person says it."""
    if per_minute < 1:
        return f"{60 / per_minute:.0f} s/unit"
    return f"{per_minute:.{0 if per_minute >= 10 else 1}f}{units}/min"


class _Display:
    """Follows a run's rate, and says on stderr which units are given up."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began: float | None = None
        self.finished = self.failed = self.left = 0  # finished in this run; earlier ones are not
        self.per_minute: float | None = None  # until the last unit was finished

    def __call__(self, step: RunProgress) -> None:
        event, self.now = step.event, time.monotonic()
        retry = event.what == "failed" and step.failed == self.failed
        self.failed, self.left = step.failed, step.total - step.done - step.failed
        if self.began is None:
            self.began = self.now - event.seconds
        if event.what == "done":
            self.finished += 1
            if self.now > self.began:
                self.per_minute = 60 * self.finished / (self.now - self.began)
        self.show("retry" if retry else event.what, step)

    def show(self, what: str, step: RunProgress) -> None:
        """Show a step that is started, done, failed or retry."""
        if what == "failed":
            print(_describe_failure(what, step), file=sys.stderr, flush=True)

    @property
    def seconds_left(self) -> float | None:
        return None if self.per_minute is None else 60 * self.left / self.per_minute

    def figures(self, memory: int, units: str = " units") -> Iterator[str]:
        """Rate, time left and memory, as far as they are known."""
        if self.per_minute is not None and self.seconds_left is not None:
            yield format_rate(self.per_minute, units)
            if self.left:
                yield f"{format_duration(self.seconds_left)} left"
        if memory:
            yield f"{memory / 2**30:.1f} GiB"


class _Json(_Display):
    def show(self, what: str, step: RunProgress) -> None:
        event = step.event
        fields = {
            "event": what,
            "time": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            **event.unit._asdict(),
            "worker": event.worker or None,
            "seconds": event.seconds or None,
            "memory_bytes": event.memory or None,
            "error": event.error or None,
            "done": step.done,
            "failed": step.failed,
            "left": self.left,
            "total": step.total,
            "units_per_minute": self.per_minute,
            "seconds_left": self.seconds_left,
        }
        print(json.dumps(fields), file=self.console.file, flush=True)


class _Lines(_Display):
    """For a file: a line for each finished unit, at most one a second, and the last in any case."""

    printed: float | None = None  # when
    held = ""

    def show(self, what: str, step: RunProgress) -> None:
        where = f"{step.done}/{step.total} {step.event.unit}"
        due = self.printed is None or self.now - self.printed >= _LOG_INTERVAL
        if what in _FAILURES:
            self._print(_describe_failure(what, step))
        elif what == "done":
            took = f"{where} done in {format_duration(step.event.seconds)}"
            self.held = ", ".join([took, *self.figures(step.event.memory)])
            if due:
                self.printed = self.now
                self.print_held()
        elif self.printed is None:  # a run of long units must not be mute
            self.printed = self.now
            self._print(f"{where} started")

    def print_held(self) -> None:
        if self.held:
            self._print(self.held)
            self.held = ""

    def _print(self, line: str) -> None:
        print(line, file=self.console.file, flush=True)  # rich would break it in two


class _Bar(_Display):
    """For a terminal: one line that changes, below what is said of units that fail."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.memory = 0
        self.in_hand: dict[Unit, None] = {}
        rest = Column(ratio=1, no_wrap=True)  # its end is cut off where a terminal is narrow
        self.progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=console,
            expand=True,
            transient=True,  # nothing is left of a run without a step
            redirect_stderr=sys.stderr.isatty(),  # a file that it goes to is to have it
        )
        self.task = self.progress.add_task("starting", total=None)

    def show(self, what: str, step: RunProgress) -> None:
        unit = step.event.unit
        self.progress.live.transient = False
        self.memory = max(self.memory, step.event.memory)
        if what == "started":
            self.in_hand[unit] = None
        else:
            self.in_hand.pop(unit, None)
        if what in _FAILURES:
            self.console.print(_describe_failure(what, step), markup=False, highlight=False)
        facts = [f"{step.failed} failed"] if step.failed else []
        facts += self.figures(self.memory, "")
        if self.in_hand:
            *others, last = self.in_hand
            more = f" +{len(others)}" if others else ""
            facts.append(f"{last.layer} {last.block}{more}, {last.model}")
        self.progress.update(
            self.task, total=step.total, completed=step.done, description=", ".join(facts)
        )


def _describe_failure(what: str, step: RunProgress) -> str:
    return f"{_FAILURES[what]}: {step.event.unit}: {step.event.error}"
