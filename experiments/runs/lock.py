"""Who works in a run's folder: locks of the system, which go when their process does."""

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

_WHOLE = ".lock"  # held alone by a run of all units, together by shards
_PATIENCE = 1.0  # seconds: another process may only be looking whether the lock is held


class Driver(NamedTuple):
    """A process that works in the folder."""

    host: str
    pid: int
    workers: int
    shard: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def hold_lock(folder: Path, shard: Shard, workers: int) -> Iterator[None]:
    """Keep other runs out of a folder, or out of one shard of it, while the block lasts.

    Raises
    ------
    StoreError
        A living process works there.
    """
    me = Driver(socket.gethostname(), os.getpid(), workers, str(shard))
    alone = shard.count == 1
    with ExitStack() as stack:
        own = stack.enter_context((folder / _WHOLE).open("a+", encoding="utf-8"))
        _take(own, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, folder)
        if not alone:
            path = folder / f"{_WHOLE}-{shard.index}-of-{shard.count}"
            own = stack.enter_context(path.open("a+", encoding="utf-8"))
            _take(own, fcntl.LOCK_EX, folder)
        own.truncate(0)
        own.write(json.dumps(me._asdict()) + "\n")
        own.flush()
        # Units of shards of another count overlap: one would delete what the other is writing.
        if others := [d for d in list_drivers(folder) if not d.shard.endswith(f"/{shard.count}")]:
            raise StoreError(
                f"out: {others[0]}, shard {others[0].shard}, works in {folder}; expected "
                f"shards of {shard.count} beside {shard}"
            )
        yield


def list_drivers(folder: Path) -> list[Driver]:
    """The processes that work in a folder now."""
    found = []
    for path in sorted(folder.glob(f"{_WHOLE}*")):
        with path.open(encoding="utf-8") as file:
            if not _try(file, fcntl.LOCK_SH):
                with suppress(ValueError, TypeError):  # it is being signed
                    found.append(Driver(**json.loads(file.read())))
    return found


def _take(file: IO[str], kind: int, folder: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not _try(file, kind):
        if time.monotonic() > end:
            others = list_drivers(folder)
            who = str(others[0]) if others else "another process"
            what = f", shard {others[0].shard}," if others and others[0].shard != "1/1" else ""
            raise StoreError(
                f"out: {who}{what} works in {folder}; expected one run at a time, or shards of one"
            )
        time.sleep(0.05)


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{file.name} can't be locked here ({error.strerror}): nothing keeps a second run "
            "out of the folder",
            stacklevel=2,
        )
    return True
