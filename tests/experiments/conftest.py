"""What the command line sets for its process, taken back; where it runs; lighter reports."""

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
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command runs: nothing but a folder of images."""
    monkeypatch.chdir(tmp_path)
    return write_image_folder(tmp_path / "images")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures, which take half of their time, where a test is of numbers."""
    none: dict[str, list[FigureGroup]] = {"classes": [], "layers": [], "grid": [], "cells": []}
    monkeypatch.setattr(page, "_make_figures", lambda _models: none)


@pytest.fixture
def blank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write empty reports, where a test is of nothing in them: one costs a second."""

    def write(runs: Any, path: Path) -> Path:
        path.write_text("", encoding="utf-8")
        return path

    monkeypatch.setattr(page, "write_report", write)
