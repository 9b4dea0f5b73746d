"""Compile kernels without a GPU, into a cache folder that belongs to the test run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

# Interpreted kernels can't be compiled, and the mode is fixed when they are imported.
if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by all workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield
