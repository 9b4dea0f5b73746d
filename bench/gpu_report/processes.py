"""Commands with a time limit, of which the output is wanted however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from bench.common.machine import ROOT

_GRACE = 10.0  # seconds to end in, after a signal


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int | None  # None: it was stopped
    output: str
    seconds: float


def run(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a command in the checkout; at the limit it is interrupted, and then killed."""
    start = time.time()
    # A file, not a pipe: whatever outlives a time limit must not hold this process.
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
            code = _wait(process, limit)
        finally:
            for sent in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, sent)
                    _wait(process, _GRACE)
        output.seek(0)
        return Ended(code, output.read(), time.time() - start)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process; None if it still runs."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None
