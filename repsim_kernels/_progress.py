"""How far long work is, on one line of a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_DELAY, _INTERVAL = 2.0, 0.2  # seconds before the line appears, and between its updates


@contextmanager
def show_progress(
    unit: str, total: int, done: int, show: bool | None
) -> Iterator[Callable[[int], None]]:
    """Yield a function to report the number of finished items to, some of which may be done before.

    With ``show`` None, a line appears on stderr after two seconds if that is a terminal. It is
    removed at the end.
    """
    is_shown = sys.stderr.isatty() if show is None else show
    start = time.monotonic()
    due = start + (_DELAY if show is None else 0)
    first, length = done, 0

    def report(done: int) -> None:
        nonlocal due, length
        now = time.monotonic()
        if not is_shown or now < due:
            return
        due = now + _INTERVAL
        left = (now - start) / (done - first) * (total - done)
        line = f"{done:,} of {total:,} {unit}, {format_clock(left)} left"
        print(f"\r{line:<{length}}", end="", file=sys.stderr, flush=True)
        length = len(line)

    try:
        yield report
    finally:
        if length:
            print(f"\r{'':<{length}}\r", end="", file=sys.stderr, flush=True)


def format_clock(seconds: float) -> str:
    """Return a duration such as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
