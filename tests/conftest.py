"""One CPU thread: these matrices are tiny, and threads that wait for each other cost seconds.

OMP_NUM_THREADS asks for another number: sums are then split, and rounded, in another way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from repsim_kernels import _options


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("gpu" in getattr(report, "keywords", ()) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} GPU tests skipped: no CUDA device (pytest -m gpu)")


@pytest.fixture(scope="session", autouse=True)
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int((os.environ.get("OMP_NUM_THREADS") or "1").split(",")[0]))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_warning_of_chance() -> None:
    """Drawn representations are noise of many neurons, for which CKA warns once in a process."""
    _options._warned.add("chance")
