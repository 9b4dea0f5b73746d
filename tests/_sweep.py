"""Run sweeps in their own processes, as a user starts them."""

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
SMALL = ("--model", "alexnet_small", "--metric-images", "10", "--metrics", "cka,procrustes")


class Sweep:
    """A sweep in its own process."""

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
        """The process ids of its workers."""
        return [pid for pid in children(self.process.pid) if "spawn_main" in command(pid)]


def children(parent: int) -> list[int]:
    """The ids of a process's children."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                pids.append(int(path.parent.name))
        except OSError:
            continue  # the process has ended
    return pids


def descendants(parent: int) -> list[int]:
    """The ids of a process's children, their children, and so on."""
    own = children(parent)
    return own + [pid for child in own for pid in descendants(child)]


def command(pid: int) -> str:
    """A process's command line or the title that it gave itself; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
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
