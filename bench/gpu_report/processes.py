"""Run work and commands in separate processes, so that a crash or hang stays isolated."""

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
from pathlib import Path
from typing import Any

from bench.common.machine import ROOT, Json

_GRACE = 10.0  # seconds for an interrupted command to print its results


def watch(
    work: Callable[..., None], *arguments: Any, end: float, silence: float = math.inf
) -> Iterator[Any]:
    """Run ``work(send, *arguments)`` in a separate process and yield the messages it sends.

    Raises
    ------
    RuntimeError
        The process died, or was killed at ``end`` or after ``silence`` seconds without a message.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(sender.send, *arguments), daemon=True)
    worker.start()
    sender.close()  # now only the worker holds a sender, so its death closes the pipe
    try:
        while receiver.poll(max(0.0, min(silence, end - time.time()))):
            yield receiver.recv()
        raise RuntimeError("stopped: it took too long")
    except (EOFError, OSError):
        worker.join(_GRACE)
        if worker.exitcode:
            raise RuntimeError(f"its process ended with exit code {worker.exitcode}") from None
    finally:
        worker.kill()
        worker.join()


def run_command(
    command: Sequence[str],
    limit: float,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> Json:
    """Run a command in a folder; interrupt it at the limit, then kill it.

    Returns
    -------
    dict
        ``exit_code`` (None, with ``why``, if it was stopped), ``seconds``, and the ``output`` of
        both streams.
    """
    start, code = time.time(), None
    # A file, not a pipe: a process that outlives the limit must not block this one.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            for number in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE)
        output.seek(0)
        result = {"exit_code": code, "seconds": time.time() - start, "output": output.read()}
    return result if code is not None else {**result, "why": f"stopped after {limit:.0f} s"}
