"""What every benchmark records beside its times."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

import repsim_kernels

_LINES: list[str] = []


@pytest.fixture(scope="session")
def findings() -> list[str]:
    """Lines that are printed under the tables."""
    return _LINES


def pytest_terminal_summary(terminalreporter):
    for line in _LINES:
        terminalreporter.write_line(line)


@pytest.fixture
def benchmark(benchmark):
    benchmark.extra_info.update(
        repsim_kernels=repsim_kernels.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        threads=torch.get_num_threads(),
    )
    return benchmark
