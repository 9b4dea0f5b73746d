"""Writing files so that nothing is left half written."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, new: bool = False) -> Iterator[Path]:
    """Give a file beside ``path`` that takes its place, on the disk, when the block ends well.

    A ``new`` one takes nobody's place: FileExistsError.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        (os.link if new else os.replace)(temporary, path)
        with suppress(OSError):  # some file systems sync no folders
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
