"""A pytest plugin that counts the kernels loaded, and records launches if a folder is named."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.gpu_report.cache import log_loads

FOLDER = "REPSIM_RECORD_LAUNCHES"  # where each process writes the variants that it launched

_recording = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    log_loads()
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    from bench.gpu_report.variants import Variant, record_launches, save_variants

    variants: dict[Variant, None] = {}
    path = Path(folder) / f"{os.getpid()}.json"
    _recording.callback(lambda: save_variants(path, variants))
    _recording.enter_context(record_launches(variants))


def pytest_unconfigure(config: pytest.Config) -> None:
    _recording.close()
