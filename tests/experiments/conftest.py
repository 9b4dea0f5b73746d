"""What the command line sets for its process, taken back for the tests that follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def subnormal_numbers() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)
