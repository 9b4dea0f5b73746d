"""The sheet of a card: rehearsed on a CPU, and robust to whatever a first run on a GPU meets."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import _cases, sheet
from bench._case import Case

RATES = {"copy": 1e9, "ieee": 1e9, "tf32": 1e9, "tf32x3": 1e9, "bfloat16": 1e9}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def double(x):
    return 2 * x


def dies(x):
    os._exit(7)


def hangs(x):
    time.sleep(600)


def interrupts(x):
    raise KeyboardInterrupt


def stops(x):
    raise SystemExit(1)


def rows_of(quick):
    """A row that is right, and rows to be spoiled."""
    return [
        Case(
            name,
            "n=3",
            torch.float32,
            "ieee",
            1e-6,
            bytes=24,
            operations=3,
            inputs=lambda g: (torch.randn(3, generator=g),),
            kernel=double,
            reference=lambda x: 2 * x.double(),
            routes={"plain": double},
        )
        for name in ("first", "second", "third")
    ]


def spoiled(rows, call):
    return [rows[0], dataclasses.replace(rows[1], routes={"plain": call}), rows[2]]


def rows_that_die(quick):
    return spoiled(rows_of(quick), dies)


def rows_that_hang(quick):
    return spoiled(rows_of(quick), hangs)


def dies_at_once(quick):
    os._exit(9)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels may run on the CPU; these here are plain functions."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def begun(out, make):
    """A record whose rows wait."""
    rows = [sheet._blank(case) for case in make(True)]
    sheet.save(out, {"ceilings": RATES, "rows": rows})


def measured(**changes):
    case = dataclasses.replace(rows_of(True)[0], **changes)
    row = sheet._blank(case)
    sheet.measure(row, case, "cpu", True, RATES, lambda: None)
    return row


@pytest.mark.parametrize(
    "interpret", ["0", pytest.param("1", marks=[needs_triton, pytest.mark.slow])]
)
def test_rehearsal(tmp_path, interpret):
    out = tmp_path / "sheet.json"
    code = "import pathlib, sys, bench.sheet as b; b.sheet(pathlib.Path(sys.argv[1]), 'cpu', True)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=sheet.ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["finished"]
    assert torch.__version__.startswith(record["environment"]["torch"].partition("+")[0])
    assert min(record["ceilings"].values()) > 0
    assert len(record["rows"]) == len(_cases.cases(True)) > 15
    for row in record["rows"]:
        assert row["name"] in done.stdout.rpartition("floor ms")[0]
        assert row["torch_ms"] > 0
        assert row["floor_ms"] > 0
        if interpret == "0":
            assert row["status"] == "not run"
            assert "TRITON_INTERPRET=1" in row["why"]
        else:
            assert row["status"] == "ok", row
            assert row["error"] <= row["tolerance"]
            assert row["ratio"] == row["torch_ms"] / row["ms"]
            assert row["of_floor"] == row["floor_ms"] / row["ms"]


def test_the_rows_of_a_gpu():
    rows = _cases.cases(False)
    assert len({(r.name, r.shape, r.dtype, r.precision) for r in rows}) == len(rows) > 30
    assert {r.precision for r in rows} <= set(RATES)
    assert all(r.bytes > 1e7 and r.routes for r in rows)


def test_no_gpu_or_an_interpreter_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device cpu --quick"):
        sheet.sheet(tmp_path / "sheet.json", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="would not run on the GPU"):
        sheet.sheet(tmp_path / "sheet.json", "cuda")


@pytest.mark.usefixtures("interpreted")
def test_a_right_kernel_is_timed():
    row = measured()
    assert row["status"] == "ok"
    assert row["error"] == 0
    assert row["call"]["min_ms"] <= row["ms"] <= row["call"]["max_ms"]
    assert row["floor_ms"] == 24 / 1e9 * 1e3
    assert row["bound"] == "bytes"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        (lambda x: 2.001 * x, pytest.approx(5e-4, rel=1e-2)),
        (lambda x: x * torch.nan, "nan"),
        (lambda x: torch.empty_like(x), "nan"),  # memory that is not written holds NaN
    ],
    ids=["wrong", "NaN", "unwritten"],
)
def test_a_wrong_kernel_is_not_timed(kernel, error):
    calls = []
    row = measured(kernel=lambda x: calls.append(0) or kernel(x))
    assert row["status"] == "WRONG"
    assert row["error"] == error
    assert len(calls) == 1
    assert not {"ms", "call", "ratio"} & set(row)
    assert row["torch_ms"] > 0


@pytest.mark.usefixtures("interpreted")
def test_a_small_wrong_part_does_not_hide():
    want = torch.tensor([[1e6, 1e6], [1.0, 1.0]])
    got = want + torch.tensor([[0.0, 0.0], [1e-3, 1e-3]])
    assert sheet.relative_error(got, want) < 1e-8
    assert sheet.relative_error(got, want, parts=2) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.usefixtures("interpreted")
def test_failures_keep_to_their_row():
    row = measured(kernel=lambda x: x[:2])
    assert row["status"] == "error"
    assert "(2,), not (3,)" in row["why"]
    assert row["torch_ms"] > 0
    row = measured(routes={"plain": lambda x: 1 / 0})
    assert row["status"] == "ok"
    assert "ZeroDivisionError" in row["routes"]["plain"]["why"]
    assert "ratio" not in row
    row = measured(inputs=lambda g: 1 / 0)
    assert row["status"] == "error"
    assert "inputs or reference: ZeroDivisionError" in row["why"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("end", [interrupts, stops])
def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path, end):
    out = tmp_path / "sheet.json"

    def make(quick):
        return spoiled(rows_of(quick), end)

    begun(out, make)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        sheet.work(out, "cpu", True, make, time.time() + sheet.WHOLE)
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "running", "waiting"]
    assert rows[0]["ms"] > 0
    assert not out.with_name("sheet.json.tmp").exists()


@pytest.mark.parametrize("run", [sheet.work, sheet._supervise])
def test_rows_after_the_deadline_are_skipped(tmp_path, run):
    out = tmp_path / "sheet.json"
    begun(out, rows_of)
    run(out, "cpu", True, rows_of, time.time())
    rows = json.loads(out.read_text())["rows"]
    assert {(row["status"], row["why"]) for row in rows} == {("skipped", "no time was left")}


@pytest.mark.usefixtures("interpreted")
def test_a_row_that_kills_its_process_costs_itself_alone(tmp_path):
    out = tmp_path / "sheet.json"
    begun(out, rows_that_die)
    sheet._supervise(out, "cpu", True, rows_that_die, time.time() + sheet.WHOLE)
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert rows[1]["why"] == "its process ended with exit code 7"


def test_workers_that_cannot_start_end_the_run(tmp_path):
    out = tmp_path / "sheet.json"
    begun(out, rows_of)
    sheet._supervise(out, "cpu", True, dies_at_once, time.time() + sheet.WHOLE)
    rows = json.loads(out.read_text())["rows"]
    assert {row["why"] for row in rows} == {"its process ended with exit code 9"}


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_a_row_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "ROW", 15.0)
    out = tmp_path / "sheet.json"
    begun(out, rows_that_hang)
    sheet._supervise(out, "cpu", True, rows_that_hang, time.time() + sheet.WHOLE)
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert rows[1]["why"] == "stopped: it took too long"


@pytest.mark.parametrize(
    ("last", "want"),
    [
        ("3 passed, 1 skipped, 90 deselected in 1.20s", {"passed": 3, "skipped": 1}),
        ("= 1 failed, 2 passed, 2 errors in 61.02s (0:01:01) =", {"failed": 1, "error": 2}),
        ("no tests ran in 0.01s", {}),
        ("Killed", {}),
    ],
)
def test_counts_of_pytest(last, want):
    found = sheet.counts(f"....F\nFAILED test_x.py - assert 3 passed\n{last}\n")
    assert found.items() >= want.items()
    assert bool(found) == bool(want)


def test_gpu_tests_run_beside_files_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert True\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    assert False\n"
    )
    found = sheet.gpu_tests()
    assert found["counts"] == {"failed": 1, "passed": 1, "error": 1}
    assert found["exit_code"] == 1
    assert any("no_such_module" in text for text in found["tail"])


@pytest.mark.slow
def test_gpu_tests_that_hang_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "ROOT", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import time\n\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert True\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    time.sleep(600)\n"
    )
    found = sheet.gpu_tests(limit=5)
    assert found["why"] == "stopped after 5 s"
    assert found["exit_code"] is None
    assert found["seconds"] < 60
    assert found["counts"].get("passed") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path):
    record = sheet.sheet(tmp_path / "sheet.json", "cuda", quick=True)
    assert all(row["status"] == "ok" for row in record["rows"])
    assert all(row["kernel"]["how"].startswith(("graph", "profiler")) for row in record["rows"])
