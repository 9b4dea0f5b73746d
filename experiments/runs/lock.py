"""Locks on a run's folder; the operating system releases them when their process ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from repsim_kernels.experiments.errors import StoreError
from repsim_kernels.experiments.runs.shard import Shard

_LOCK = ".lock"  # exclusive for a run of all units, shared between shards
_PATIENCE = 1.0  # seconds: `list_drivers` in another process briefly takes the lock


class Driver(NamedTuple):
    """A process that is running a run, or a shard of it, in the folder."""

    host: str
    pid: int
    workers: int
    shard: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def hold_lock(folder: Path, shard: Shard, workers: int) -> Iterator[None]:
    """Lock a folder, or one shard of it, against other runs while the block runs.

    Raises
    ------
    StoreError
        Another process holds the lock.
    """
    me = Driver(socket.gethostname(), os.getpid(), workers, str(shard))
    is_whole_run = shard.count == 1
    with ExitStack() as stack:
        lock_file = stack.enter_context((folder / _LOCK).open("a+", encoding="utf-8"))
        _acquire(lock_file, fcntl.LOCK_EX if is_whole_run else fcntl.LOCK_SH, folder)
        if not is_whole_run:
            path = folder / f"{_LOCK}-{shard.index}-of-{shard.count}"
            lock_file = stack.enter_context(path.open("a+", encoding="utf-8"))
            _acquire(lock_file, fcntl.LOCK_EX, folder)
        lock_file.truncate(0)
        lock_file.write(json.dumps(me._asdict()) + "\n")
        lock_file.flush()
        # Shards of different counts overlap: one could delete what the other is writing.
        if others := [d for d in list_drivers(folder) if not d.shard.endswith(f"/{shard.count}")]:
            raise StoreError(
                f"out: {others[0]} is running shard {others[0].shard} in {folder}; expected only "
                f"shards of {shard.count} alongside {shard}"
            )
        yield


def list_drivers(folder: Path) -> list[Driver]:
    """List the processes that are running in a folder now."""
    active = []
    for path in sorted(folder.glob(f"{_LOCK}*")):
        with path.open(encoding="utf-8") as file:
            if not _try_lock(file, fcntl.LOCK_SH):
                with suppress(ValueError, TypeError):  # its holder has not written its name yet
                    active.append(Driver(**json.loads(file.read())))
    return active


def _acquire(file: IO[str], kind: int, folder: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not _try_lock(file, kind):
        if time.monotonic() > end:
            others = list_drivers(folder)
            holder = str(others[0]) if others else "another process"
            is_shard = bool(others) and others[0].shard != "1/1"
            task = f" shard {others[0].shard}" if is_shard else ""
            raise StoreError(
                f"out: {holder} is running{task} in {folder}; expected no other run in the folder, "
                "or only other shards of the same run"
            )
        time.sleep(0.05)


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{file.name} can't be locked ({error.strerror}); make sure that no second run uses "
            "the folder",
            stacklevel=2,
        )
    return True
