"""Arrays that are written to a .npy file row by row, and resumed after an interruption."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from repsim_kernels._files import move_file
from repsim_kernels.errors import OptionError


class RowFile:
    """Rows of an array, appended to a file that replaces another when they are complete.

    Until then the file is called ``<out>.<fingerprint>.partial``, and it stays if the process is
    interrupted or killed. The next one with the same fingerprint continues after its last whole
    group of rows.

    Attributes
    ----------
    count : int
        Number of rows that are already in the file.
    """

    def __init__(
        self, out: Path, fingerprint: str, shape: tuple[int, ...], dtype: str, group: int
    ) -> None:
        """``group`` is the number of rows that are always appended together, except at the end."""
        self._out = out
        self._partial = out.with_name(f"{out.name}.{fingerprint}.partial")
        header = BytesIO()
        fields = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self._file: BinaryIO = self._partial.open("a+b")
        try:
            self._lock()
            if not self._is_in_place():  # another call has just finished it
                self._file.close()
                self._file = self._partial.open("a+b")
                self._lock()
            row_bytes = np.dtype(dtype).itemsize * math.prod(shape[1:])
            self.count = self._drop_torn_rows(header.getvalue(), shape[0], row_bytes, group)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Lock the file against other processes; the system unlocks it when it is closed."""
        with suppress(ImportError):  # on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OptionError(
                    f"out: another call is writing {self._partial}; expected one at a time"
                ) from None

    def _is_in_place(self) -> bool:
        """Whether the open file still has its name."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat())
        return False

    def _drop_torn_rows(self, header: bytes, total: int, row_bytes: int, group: int) -> int:
        """Return the number of rows of whole groups in the file, and drop what follows them."""
        size = self._file.seek(0, os.SEEK_END)
        rows = (size - len(header)) // row_bytes
        if rows < 0 or size > len(header) + total * row_bytes:
            self._file.truncate(0)
            self._file.write(header)
            return 0
        count = total if rows >= total else rows - rows % group
        self._file.truncate(len(header) + count * row_bytes)
        return count

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows; they are with the system when this returns."""
        self._file.write(np.ascontiguousarray(rows).data)
        self._file.flush()
        self.count += len(rows)

    def finish(self) -> None:
        """Give the complete file its name; it is flushed to disk first."""
        move_file(self._partial, self._out)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
