"""What the commands do when a signal stops them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Event

import typer


@contextmanager
def exit_on_signals(reason: str = "before any unit was started") -> Iterator[None]:
    """Exit with a one-line message and code 130 on Ctrl-C, or 143 on SIGTERM.

    The message is that of the KeyboardInterrupt, or the reason.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    # The event, since libraries may replace our KeyboardInterrupt with another one.
    handler = handle_termination(KeyboardInterrupt()) if in_main_thread else nullcontext(Event())
    with handler as terminated:
        try:
            yield
        except KeyboardInterrupt as interrupt:
            print(f"interrupted: {str(interrupt) or reason}", file=sys.stderr)
            raise typer.Exit(143 if terminated.is_set() else 130) from None


@contextmanager
def handle_termination(exception: BaseException) -> Iterator[Event]:
    """Raise an exception on SIGTERM, and set the event; for the main thread.

    Python ignores exceptions in destructors and in callbacks of weak references, of which imports
    run many. If it ignores this one, or the KeyboardInterrupt of Ctrl-C, the signal is sent again.
    """
    terminated = Event()

    def stop(*_: object) -> None:
        terminated.set()
        raise exception

    def send_again(ignored: sys.UnraisableHookArgs) -> None:
        if ignored.exc_value is exception or isinstance(ignored.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if terminated.is_set() else signal.SIGINT
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            report(ignored)

    report, sys.unraisablehook = sys.unraisablehook, send_again
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = report
