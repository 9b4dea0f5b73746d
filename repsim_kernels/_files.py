"""Write files atomically, so that none is left half written."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def find_write_obstacle(path: Path) -> str | None:
    """Say why no file can be written at a path, and what is expected; None if one can."""
    if not path.name or path.is_dir():
        return f"{path} is a folder; expected the name of a file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} for {path.name}; expected one that exists"
    return None


@contextmanager
def replace_file(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces ``path`` if the block succeeds.

    The file is flushed to disk first. With ``new``, raise FileExistsError if ``path`` exists.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        move_file(temporary, path, new)
    finally:
        temporary.unlink(missing_ok=True)


def move_file(temporary: Path, path: Path, new: bool = False) -> None:
    """Flush a file to disk, and let it replace ``path`` in the same folder.

    With ``new``, raise FileExistsError if ``path`` exists; the file keeps its first name as well.
    """
    _sync(temporary)
    (os.link if new else os.replace)(temporary, path)
    with suppress(OSError):  # some file systems can't sync folders
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
