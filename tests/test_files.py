"""Files are written atomically."""

from __future__ import annotations

from pathlib import Path

import pytest

from repsim_kernels._files import replace_file


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_partially() -> None:
        with replace_file(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_partially()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
