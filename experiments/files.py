"""Writing files so that nothing is left half written."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def find_write_obstacle(path: Path) -> str | None:
    """Why no file can be written at a path, and what is expected; None where one may be."""
    if not path.name or path.is_dir():
        return f"{path} is a folder; expected the name of a file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} for {path.name}; expected one that exists"
    return None


@contextmanager
def replace_file(path: Path, new: bool = False) -> Iterator[Path]:
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
