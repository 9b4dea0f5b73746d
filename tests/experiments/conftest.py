"""Fixtures: reset process settings, a working folder with images, and cheaper reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _toy import write_image_folder

from repsim_kernels.experiments.report import page
from repsim_kernels.experiments.report.figures import FigureGroup


@pytest.fixture(scope="module", autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Undo the command line's flush of subnormal numbers."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of images in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return write_image_folder(tmp_path / "images")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Omit the reports' figures, which take half of their time, in tests of numbers."""
    kinds = ("classes", "layers", "grid", "strip", "cells")
    none: dict[str, list[FigureGroup]] = {kind: [] for kind in kinds}
    monkeypatch.setattr(page, "_make_figures", lambda _models: none)


@pytest.fixture
def blank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty reports in tests that don't read them; a report costs a second."""

    def write(runs: Any, path: Path) -> Path:
        path.write_text("", encoding="utf-8")
        return path

    monkeypatch.setattr(page, "write_report", write)
