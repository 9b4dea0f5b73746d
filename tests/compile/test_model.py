"""The page of predicted kernel costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.predict import model
from bench.predict.compile import CompiledKernel, Dots, build, list_cases, read_dots
from bench.predict.sass import Loop, parse
from repsim_kernels.kernels.triton._launch import CompileCase, Floor


def test_page_has_a_row_for_every_case(tmp_path: Path) -> None:
    out = tmp_path / "MODEL.md"
    result = CliRunner().invoke(app, ["model", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    assert "Nothing on this page was measured on a GPU" in text
    assert "python -m bench model" in text
    text, _, stage = text.partition("## The n x n stage")
    text, _, loops = text.partition("## Product loops")
    # 40 million fits of 8 steps at 36 or 52 thousand cycles, plus 20 per fit, on 132 x 1.7 GHz.
    assert "40 million take 55 s and 78 s." in " ".join(loops.split())
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    titles, rows = lines[0], [line for line in lines if line[0] not in ("case", "---")]
    assert [row[0] for row in rows] == [case.name for _, case in list_cases()]
    for row, (_, case) in zip(rows, list_cases(), strict=True):
        entries = dict(zip(titles, row, strict=True))
        kernels = build(case, 90)
        assert entries["registers"] == " / ".join(str(kernel.registers) for kernel in kernels)
        times = {name: entries[f"{name} µs"] for name in ("bytes", "operations", "issue")}
        times = {name: float(t.replace(",", "")) for name, t in times.items() if t != "-"}
        assert times[entries["bound"]] == max(times.values()) > 0
        products = [k for k in kernels if case.products and k.tensor_cores]
        assert loops.count(f"| {case.name} |") == len(products)
    parts = [line.strip("| ").split(" | ") for line in stage.splitlines() if "| " in line][2:]
    assert sum(float(row[1]) for row in parts[:-1]) == pytest.approx(float(parts[-1][1]), rel=0.01)
    # 25,000 times 19.3 products of 2 · 499³ operations, at 67 · 10¹² per second.
    assert parts[-1] == ["together", "19.3", "1.79"]


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


def test_the_largest_time_is_the_bound() -> None:
    floor = Floor(8_600_000, 1_600_000_000, "tf32")
    assert model.predict(floor) == (pytest.approx(4e-6), "operations")
    assert model.predict(floor, 5e-6) == (5e-6, "issue")
    assert model.predict(floor, 1e-6) == (pytest.approx(4e-6), "operations")


LOOPS = """\
  tt.func public @toy(%x: !tt.ptr<f32>) {
    %total = scf.for %start = %a to %b step %c iter_args(%t = %z) -> (tensor<64x128xf32>)  : i32 {
      %part = scf.for %s = %start to %d step %e iter_args(%p = %z) -> (tensor<64x128xf32>)  : i32 {
        %1 = tt.dot %u, %v, %p{} : tensor<64x16x{}> * tensor<16x128x{}> -> tensor<64x128xf32>
        scf.yield %1 : tensor<64x128xf32>
      }
      scf.yield %part : tensor<64x128xf32>
    }
    tt.return
  }
"""


def write_dots(precision: str, dtype: str) -> str:
    dot = f", inputPrecision = {precision}" if precision != "ieee" else ""
    return LOOPS.replace("%p{}", f"%p{dot}").replace("{}", dtype)


@pytest.mark.parametrize(
    ("precision", "dtype", "count"),
    [("tf32x3", "f32", 3), ("tf32x3", "bf16", 1), ("tf32", "f32", 1), ("ieee", "f64", 1)],
)
def test_products_of_the_source(precision: str, dtype: str, count: int) -> None:
    text = write_dots(precision, dtype)
    assert read_dots(text) == Dots(count, 2 * 64 * 128 * 16)
    (dot,) = (line for line in text.splitlines() if "tt.dot" in line)
    assert read_dots(text.replace(dot, f"{dot}\n{dot}")) == Dots(2 * count, 2 * 64 * 128 * 16)


def test_products_in_several_places_have_no_known_iterations() -> None:
    text = write_dots("tf32", "f32")
    (dot,) = (line for line in text.splitlines() if "tt.dot" in line)
    assert read_dots(text.replace(dot, "")) is None
    assert read_dots(text.replace("    tt.return", f"{dot[4:]}\n    tt.return")) is None
    assert (
        read_dots(text.replace("      scf.yield %part", f"{dot[2:]}\n      scf.yield %part"))
        is None
    )
    other = dot.replace("x16x", "x32x").replace("<16x", "<32x")
    assert read_dots(text.replace(dot, f"{dot}\n{other}")) is None


def test_issue_of_a_product_loop() -> None:
    name = "linear 9216 to 4096, float32"
    (case,) = (c for module, c in list_cases() if module == "masked_pointwise" and c.name == name)
    (kernel,) = build(case, 90)
    # 16 cells; tiles of 128 x 64 take 16 channels per iteration; each warp issues its instructions.
    iterations = 2 * 16 * 50 * 9216 * 4096 / (2 * 128 * 64 * 16)
    cycles = iterations * len(kernel.product_loop) * 8 / 4
    issue = model.predict_issue(case)
    assert issue == pytest.approx(cycles / (132 * 1.7e9))
    assert model.predict(case.floor, issue) == (issue, "issue")


def test_issue_without_known_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tuple(parse("  /*0000*/  HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;")))
    kernel = CompiledKernel("_", 4, 32, 0, 0, 0, "HGMMA", (loop,), Dots(1, 2 * 64 * 128 * 16))

    def predict(*kernels: CompiledKernel, products: bool = True) -> float | None:
        floor = Floor(0, 2 * 64 * 128 * 16 * 1000, "bfloat16")
        case = CompileCase("toy", lambda device: None, floor, products=products)
        monkeypatch.setattr(model, "build", lambda case, arch: kernels)
        return model.predict_issue(case)

    without = replace(kernel, product_loops=(), dots=None)
    assert predict(without, kernel) == pytest.approx(1000 / (132 * 1.7e9))
    assert predict(kernel, products=False) is None
    assert predict(without) is None
    assert predict(kernel, replace(kernel, warps=8)) == predict(kernel)
    assert predict(kernel, replace(kernel, dots=Dots(1, 2 * 64 * 128 * 64))) != predict(kernel)
    assert predict(replace(kernel, product_loops=(loop, loop))) is None
    assert predict(replace(kernel, dots=Dots(2, 2 * 64 * 128 * 16))) is None


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
