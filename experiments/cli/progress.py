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
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.driver import Step
    from repsim_kernels.experiments.study.units import Unit

_TOLD = {"failed": "failed", "retry": "again"}  # what gets a line of its own everywhere
_GAP, _TOO_SHORT = 2, 6  # characters between two facts; of a name
_OFTEN = 1.0  # seconds between two lines of a log


@contextmanager
def progress_of(
    console: Console, quiet: bool = False, log_json: bool = False
) -> Iterator[Callable[[Step], None]]:
    """Show a run's steps: a line that changes in a terminal, lines one after the other elsewhere.

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
        What `repsim_kernels.experiments.runs.driver.drive` calls with each `Step`.
    """
    if log_json:
        yield _Json(console)
    elif quiet:
        yield _Failures()
    elif console.is_terminal and not console.is_dumb_terminal:
        line = _Line(console)
        with line.live:
            yield line
    else:
        lines = _Lines(console)
        try:
            yield lines
        finally:
            lines.catch_up()


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def pace(per_minute: float, units: str = " units") -> str:
    """A rate as a person says it."""
    if per_minute < 1:
        return f"{60 / per_minute:.0f} s/unit"
    return f"{per_minute:.{0 if per_minute >= 10 else 1}f}{units}/min"


class _Tally:
    """What the steps so far come to."""

    def __init__(self) -> None:
        self.now: float
        self.began: float | None = None
        self.finished = 0  # in this run; `done` also has those of the runs before it
        self.rate: float | None = None  # units a second, until the last was finished
        self.done = self.failed = self.total = 0
        self.memory = 0
        self.in_hand: dict[Unit, float] = {}  # since when

    def take(self, step: Step) -> str:
        """Count a step, and say what it is: started, done, failed or retry."""
        event, self.now = step.event, time.monotonic()
        what = "retry" if event.what == "failed" and step.failed == self.failed else event.what
        self.done, self.failed, self.total = step.done, step.failed, step.total
        self.memory = max(self.memory, event.memory)
        if self.began is None:
            self.began = self.now - event.seconds
        if what == "started":
            self.in_hand[event.unit] = self.now
        else:
            self.in_hand.pop(event.unit, None)
        if what == "done":
            self.finished += 1
            if self.now > self.began:
                self.rate = self.finished / (self.now - self.began)
        return what

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed

    @property
    def per_minute(self) -> float | None:
        return None if self.rate is None else 60 * self.rate

    @property
    def seconds_left(self) -> float | None:
        return None if self.rate is None else self.left / self.rate


class _Json:
    def __init__(self, console: Console) -> None:
        self.console, self.tally = console, _Tally()

    def __call__(self, step: Step) -> None:
        event, tally = step.event, self.tally
        said = {
            "event": tally.take(step),
            "time": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            **event.unit._asdict(),
            "worker": event.worker or None,
            "seconds": event.seconds or None,
            "memory_bytes": event.memory or None,
            "error": event.error or None,
            "done": tally.done,
            "failed": tally.failed,
            "left": tally.left,
            "total": tally.total,
            "units_per_minute": tally.per_minute,
            "seconds_left": tally.seconds_left,
        }
        print(json.dumps(said), file=self.console.file, flush=True)


class _Failures:
    def __init__(self) -> None:
        self.tally = _Tally()

    def __call__(self, step: Step) -> None:
        if self.tally.take(step) == "failed":
            print(_told("failed", step), file=sys.stderr, flush=True)


class _Lines:
    """For a file: a line for each finished unit, at most one a second, and the last in any case."""

    def __init__(self, console: Console) -> None:
        self.console, self.tally = console, _Tally()
        self.said: float | None = None  # when
        self.held: str | None = None

    def __call__(self, step: Step) -> None:
        what, tally = self.tally.take(step), self.tally
        where = f"{step.done}/{step.total} {step.event.unit}"
        if what in _TOLD:
            self._say(_told(what, step))
        elif what == "done":
            self.held = ", ".join(
                [f"{where} done in {duration(step.event.seconds)}", *_figures(tally, step)]
            )
            if self.said is None or tally.now - self.said >= _OFTEN:
                self.said = tally.now
                self.catch_up()
        elif self.said is None:  # a run of long units is not to be mute
            self.said = tally.now
            self._say(f"{where} started")

    def catch_up(self) -> None:
        if self.held is not None:
            self._say(self.held)
            self.held = None

    def _say(self, line: str) -> None:
        print(line, file=self.console.file, flush=True)  # rich would break it in two


def _figures(tally: _Tally, step: Step) -> Iterator[str]:
    if tally.per_minute is not None and tally.seconds_left is not None:
        yield pace(tally.per_minute)
        if tally.left:
            yield f"{duration(tally.seconds_left)} left"
    if step.event.memory:
        yield _gib(step.event.memory)


class _Line:
    """For a terminal: one line that changes, below what is said of units that fail."""

    def __init__(self, console: Console) -> None:
        self.console, self.tally = console, _Tally()
        self.live = Live(
            console=console,
            get_renderable=self._render,
            transient=True,  # nothing is left of a run without a step
            redirect_stderr=sys.stderr.isatty(),  # a file that it goes to is to have it
        )

    def __call__(self, step: Step) -> None:
        what = self.tally.take(step)
        self.live.transient = False
        if what in _TOLD:
            self.console.print(_told(what, step), markup=False, highlight=False)

    def _render(self) -> Table | Text:
        tally, width = self.tally, self.console.width
        if not tally.total:
            return Text("starting", no_wrap=True, overflow="crop")
        facts, bar = "  ".join(_facts(tally)), width // 8
        hand = _in_hand(tally, width - bar - len(facts) - 2 * _GAP)
        line = Table.grid(padding=(0, _GAP), collapse_padding=True, pad_edge=False)
        line.add_column(width=bar)
        line.add_column(no_wrap=True, overflow="crop")
        text = Text(f"{facts}  {hand}".rstrip(), no_wrap=True, overflow="crop")
        line.add_row(ProgressBar(tally.total, tally.done + tally.failed, width=bar), text)
        return line


def _facts(tally: _Tally) -> Iterator[str]:
    yield f"{tally.done}/{tally.total}"
    if tally.failed:
        yield f"{tally.failed} failed"
    yield "-/min" if tally.per_minute is None else pace(tally.per_minute, "")
    if tally.left:
        yield f"{'-' if tally.seconds_left is None else duration(tally.seconds_left)} left"
    if tally.memory:
        yield _gib(tally.memory)


def _in_hand(tally: _Tally, room: int) -> str:
    """The unit that started last, how many are under way beside it, since when; what fits."""
    units = list(tally.in_hand.items())  # once: a thread of its own draws the line
    if not units:
        return ""
    unit, since = units[-1]
    name, more = str(unit), f" +{len(units) - 1}" if len(units) > 1 else ""
    whole = f"{name}{more}, {duration(time.monotonic() - since)}"
    if len(whole) <= room:
        return whole
    cut = len(name) + len(more) - room  # the end of a layer's name says more than its beginning
    if cut <= 0:
        return name + more
    return f"…{name[cut + 1 :]}{more}" if len(name) - cut > _TOO_SHORT else ""


def _told(what: str, step: Step) -> str:
    return f"{_TOLD[what]}: {step.event.unit}: {step.event.error}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
