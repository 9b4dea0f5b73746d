"""Tests on the phantom device, whose kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from _phantom import Device
from _phantom_cuda import phantom_device

from repsim_kernels.kernels.triton import _launch

# Without the interpreter there is nothing to skip: these tests are not for a GPU.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := _launch.interpreter_unsupported()) is None:
        return
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def phantom() -> Iterator[Device]:
    """The phantom device, for the duration of a test."""
    with phantom_device() as device:
        yield device
