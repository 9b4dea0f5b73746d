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
        return [
            pid for pid in list_children(self.process.pid) if "spawn_main" in read_command_line(pid)
        ]


def list_children(parent: int) -> list[int]:
    """List the ids of a process's children."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                pids.append(int(path.parent.name))
        except OSError:
            continue  # the process has ended
    return pids


def list_descendants(parent: int) -> list[int]:
    """List the ids of a process's children, their children, and so on."""
    pids = list_children(parent)
    return pids + [pid for child in pids for pid in list_descendants(child)]


def read_command_line(pid: int) -> str:
    """Read a process's command line, or the title that it set; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)


def list_parts(run: Path) -> set[str]:
    return {path.name for path in (run / "parts").glob("*.parquet")}


def read_results(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "results.parquet")


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
