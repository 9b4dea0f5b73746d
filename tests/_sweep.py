"""A sweep in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

TESTS = Path(__file__).parent
TOY = ("--model", "_toy:Toy", "--layers", "act1,act2", "--size", "8", "--images", "images")
SMALL = ("--model", "alexnet_small", "--stimuli", "10", "--metrics", "cka,procrustes")


class Sweep:
    """A sweep in a process of its own, killed with its workers when the test ends."""

    def __init__(self, folder: Path, *options: str | Path, **environment: str) -> None:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "repsim_kernels.experiments",
                "sweep",
                "--block",
                "1",
                *map(str, options),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self, timeout: float = 240) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def kill(self, number: int = signal.SIGKILL) -> tuple[int, str, str]:
        self.process.send_signal(number)
        return self.end()

    def workers(self) -> list[int]:
        """Its child processes, but for multiprocessing's own."""
        return [pid for pid in children(self.process.pid) if "spawn_main" in command(pid)]


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended
    return found


def descendants(parent: int) -> list[int]:
    """Its children, theirs, and so on."""
    mine = children(parent)
    return mine + [pid for child in mine for pid in descendants(child)]


def command(pid: int) -> str:
    """How a process was started, or what it calls itself; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def until(what: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.02)


def parts(run: Path) -> set[str]:
    return {path.name for path in (run / "parts").glob("*.parquet")}


def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "results.parquet")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
