"""Fixtures and Hypothesis profiles of all tests.

Tests run on one CPU thread: their matrices are tiny, and threads that wait for each other cost
seconds. OMP_NUM_THREADS sets another number, which splits and rounds sums differently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from repsim_kernels import _options

# No deadline, since tests share cores. Derandomized, so that a passing test keeps passing.
settings.register_profile("repsim", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("deep", settings.get_profile("repsim"), max_examples=100)  # `make slow`
settings.load_profile("repsim")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests whose number of examples is the profile's.

    A number of their own makes every profile draw the same examples.
    """
    function = getattr(item, "obj", None)
    if hasattr(function, "hypothesis"):  # it draws inputs
        # A private attribute, whose absence is an error.
        own = function._hypothesis_internal_use_settings
        if own.max_examples == settings().max_examples:
            item.add_marker("deep")


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
def silence_chance_warning() -> None:
    """Random representations of many neurons have a high CKA by chance, which would warn once."""
    _options._warnings_shown.add("chance")
