"""What the command line sets for its process, taken back for the tests that follow; reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repsim_kernels.experiments.report import page as report


@pytest.fixture(scope="module", autouse=True)
def subnormal_numbers() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures, which take half of their time, where a test is of numbers."""
    none: dict[str, list[report.Plate]] = {"classes": [], "layers": [], "grid": [], "cells": []}
    monkeypatch.setattr(report, "_plates", lambda _models: none)


@pytest.fixture
def blank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write empty reports, where a test is of nothing in them: one costs a second."""

    def write(runs: Any, path: Path) -> Path:
        path.write_text("", encoding="utf-8")
        return path

    monkeypatch.setattr(report, "write_report", write)
