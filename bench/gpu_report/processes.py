"""Work and commands in processes of their own: one that crashes or hangs costs itself alone."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bench.common.machine import ROOT, Json

_GRACE = 10.0  # seconds that an interrupted command has to say what it has


def watch(
    work: Callable[..., None], *arguments: Any, end: float, silence: float = math.inf
) -> Iterator[Any]:
    """Yield what ``work(send, *arguments)`` sends from a process of its own.

    Raises
    ------
    RuntimeError
        The process died, or it was killed: at ``end``, or after ``silence`` seconds without news.
    """
    context = multiprocessing.get_context("spawn")
    news, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(sender.send, *arguments), daemon=True)
    worker.start()
    sender.close()  # the worker's own is then the last one: its death ends the news
    try:
        while news.poll(max(0.0, min(silence, end - time.time()))):
            yield news.recv()
        raise RuntimeError("stopped: it took too long")
    except (EOFError, OSError):
        worker.join(_GRACE)
        if worker.exitcode:
            raise RuntimeError(f"its process ended with exit code {worker.exitcode}") from None
    finally:
        worker.kill()
        worker.join()


def run_command(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> Json:
    """Run a command in the checkout; at the limit it is interrupted, and then killed.

    Returns
    -------
    dict
        ``exit_code``, None and ``why`` if it was stopped; ``seconds``; ``output``, of both streams.
    """
    start, code = time.time(), None
    # A file, not a pipe: whatever outlives the limit must not hold this process.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            for sent in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, sent)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE)
        output.seek(0)
        result = {"exit_code": code, "seconds": time.time() - start, "output": output.read()}
    return result if code is not None else {**result, "why": f"stopped after {limit:.0f} s"}
