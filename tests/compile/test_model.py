"""The page of predicted kernel costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.predict import model
from bench.predict.compile import CompiledKernel, build, list_cases
from repsim_kernels.kernels.triton._launch import Floor


@pytest.mark.slow
def test_page_has_a_row_for_every_case(tmp_path: Path) -> None:
    out = tmp_path / "MODEL.md"
    result = CliRunner().invoke(app, ["model", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    assert "Nothing on this page was measured on a GPU" in text
    assert "python -m bench model" in text
    text, _, stage = text.partition("## The n x n stage")
    # 40 million fits of 8 steps at 36 or 52 thousand cycles, plus 20 per fit, on 132 x 1.7 GHz.
    assert "40 million take 55 s and 78 s." in " ".join(text.split())
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    titles, rows = lines[0], [line for line in lines if line[0] not in ("case", "---")]
    assert [row[0] for row in rows] == [case.name for _, case in list_cases()]
    for row, (_, case) in zip(rows, list_cases(), strict=True):
        entries = dict(zip(titles, row, strict=True))
        kernels = build(case, 90)
        assert entries["registers"] == " / ".join(str(kernel.registers) for kernel in kernels)
        assert entries["bound"] in ("bytes", "operations")
        assert float(entries["µs"].replace(",", "")) > 0
    parts = [line.strip("| ").split(" | ") for line in stage.splitlines() if "| " in line][2:]
    assert sum(float(row[1]) for row in parts[:-1]) == pytest.approx(float(parts[-1][1]), rel=0.01)
    # 25,000 times 18.7 products of 2 · 499³ operations, at 67 · 10¹² per second.
    assert parts[-1] == ["together", "18.7", "1.73"]


@pytest.mark.parametrize(
    ("floor", "seconds", "bound"),
    [
        (Floor(8_600_000, 0), 2e-6, "bytes"),
        (Floor(3_000_000, 800_000_000, "tf32"), 2e-6, "operations"),
        (Floor(3_000_000, 800_000_000, "tf32x3"), 6e-6, "operations"),
        (Floor(4_300_000, 30_000_000), 1e-6, "bytes"),
    ],
)
def test_predicted_times(floor: Floor, seconds: float, bound: str) -> None:
    assert model.predict(floor) == (pytest.approx(seconds), bound)


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "blocks"),
    [
        (4, 32, 0, 16),  # warps
        (1, 32, 0, 32),  # blocks
        (4, 128, 0, 4),  # registers
        (4, 129, 0, 3),  # rounded up to the allocation unit
        (8, 255, 0, 1),
        (1, 184, 0, 8),  # a quarter of the registers holds two such warps and part of a third
        (8, 64, 227 * 1024, 1),  # shared memory
        (8, 64, 113 * 1024, 2),
        (8, 64, 114 * 1024, 1),  # too much together with the system's 1 KB
    ],
)
def test_blocks_per_multiprocessor(warps: int, registers: int, shared: int, blocks: int) -> None:
    kernel = CompiledKernel("_", warps, registers, 0, shared, 0, "")
    assert model.blocks_per_multiprocessor(kernel) == blocks
