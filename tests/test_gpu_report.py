"""The rows of the GPU report, and every failure that a GPU might bring."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _cupy import FakeCupy

from bench import roofline
from bench.common.machine import ROOT
from bench.gpu_report import rows, run
from bench.gpu_report.case import KernelCase, PlainCupy
from bench.gpu_report.cases import list_cases, list_native_cases
from repsim_kernels.kernels import cupy as cuda_kernels
from repsim_kernels.kernels import triton as triton_kernels

RATES = dict.fromkeys(("copy", *roofline.PRECISIONS), 1e9)


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


def make_cases(quick):
    """Return three rows with correct kernels."""
    return [
        KernelCase(
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


def make_spoiled(quick, call):
    """Replace a route of the second row."""
    first, second, third = make_cases(quick)
    return [first, dataclasses.replace(second, routes={"plain": call}), third]


def dies_at_once(quick):
    os._exit(9)


@pytest.fixture
def interpreted(monkeypatch):
    """Allow kernels on the CPU; the kernels of these tests are plain functions."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def measure_three(make, end, **options):
    """Measure three rows; check that the saved record equals the result."""
    record = {"ceilings": RATES, "rows": [rows.make_row(case) for case in make_cases(True)]}
    saved = [json.dumps(record)]
    rows.measure_rows(
        record, lambda: saved.append(json.dumps(record)), "cpu", True, make, end, **options
    )
    assert json.loads(saved[-1]) == record
    return record["rows"]


def measure_one(rates=RATES, **changes):
    case = dataclasses.replace(make_cases(True)[0], **changes)
    row = rows.make_row(case)
    rows.measure(row, case, "cpu", True, rates, lambda: None)
    return row


def test_gpu_rows_are_unique_and_large():
    cases = list_cases(False)
    assert len({(r.name, r.shape, r.dtype, r.precision) for r in cases}) == len(cases) > 30
    assert {r.precision for r in cases} <= set(RATES)
    assert all(r.bytes > 1e7 and r.routes for r in cases)
    assert {r.precision for r in cases if r.name == "riccati"} == {"float64"}


def test_every_kernel_has_a_row():
    """A module that defines `choose` has a kernel."""
    folder = ROOT / "bench" / "gpu_report"
    text = "".join(path.read_text() for path in folder.glob("*cases.py"))
    kernels = {
        f"{path.parent.name}.{path.stem}:"
        for package in (triton_kernels, cuda_kernels)
        for path in Path(package.__file__).parent.glob("[!_]*.py")
        if "def choose(" in path.read_text()
    }
    assert len(kernels) > 9
    assert {name for name in kernels if name not in text} == set()


@pytest.mark.parametrize(
    "case",
    list_cases(True) + list_native_cases(True),
    ids=lambda c: f"{c.name} {c.shape} {c.dtype}",
)
def test_every_route_matches_the_reference(case):
    """NumPy replaces CuPy, and float32 replaces bfloat16, which NumPy lacks."""
    inputs = case.inputs(torch.Generator().manual_seed(0))
    want = case.reference(*inputs)
    rounded = case.name.startswith("masked_pointwise") and case.dtype == torch.bfloat16
    for name, route in case.routes.items():
        if name == "cupy":
            arrays = [t.float() if t.dtype == torch.bfloat16 else t for t in inputs]
            want = case.reference(*arrays)
            got = torch.from_numpy(route.formula(np, "float32", *(t.numpy() for t in arrays)))
        else:
            got = route(*inputs)
        assert rows.compute_relative_error(got, want, case.parts) < (2**-8 if rounded else 1e-5)


def test_cupy_uses_torchs_stream(monkeypatch):
    """A fake CuPy with NumPy arrays records its device and stream."""
    cupy = FakeCupy()
    cupy.from_dlpack = np.from_dlpack
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    seen = []

    def formula(xp, dtype, x, y):
        seen.extend(cupy.events)
        return (xp, dtype) == (cupy, "float32") and 2 * x + y

    x, y = torch.arange(6.0).view(2, 3), torch.ones(3)
    got = PlainCupy(formula)(x.mT.contiguous().mT, y)
    assert torch.equal(got, 2 * x + 1)
    scopes = [("device", None), ("stream", "the stream of cpu")]
    assert seen == [(*scope, "enter") for scope in scopes]
    assert cupy.events[2:] == [(*scope, "exit") for scope in reversed(scopes)]


@pytest.mark.usefixtures("interpreted")
def test_a_missing_cupy_is_ignored():
    row = measure_one(routes={"plain": double, "cupy": PlainCupy(lambda xp, dtype, x: 2 * x)})
    assert row["status"] == "ok"
    assert row["routes"]["cupy"]["why"]
    assert row["torch_route"] == "plain"
    assert "cupy_ratio" not in row


@pytest.mark.usefixtures("interpreted")
def test_ratios_to_cupy_and_to_torch(monkeypatch):
    monkeypatch.setattr(rows.module, "unsupported", lambda *_: None)
    monkeypatch.setattr(rows, "_free_cupy", lambda: None)

    def slow(x):
        time.sleep(0.01)
        return 2 * x

    row = measure_one(routes={"plain": double, "cupy": slow})
    assert row["cupy_ms"] == row["routes"]["cupy"]["ms"] > 10
    assert row["cupy_ratio"] == row["cupy_ms"] / row["call"]["ms"]
    assert row["torch_ms"] == row["routes"]["plain"]["ms"]


@pytest.mark.parametrize("route", [double, lambda x: 3 * x, lambda x: 1 / 0])
def test_cupys_memory_is_freed_however_its_route_ends(monkeypatch, route):
    freed = []
    monkeypatch.setattr(rows.module, "unsupported", lambda *_: None)
    monkeypatch.setattr(rows, "_free_cupy", lambda: freed.append(1) or 1 / 0)
    row = measure_one(routes={"cupy": route, "plain": double})
    assert freed == [1]
    assert row["torch_ms"] > 0


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_route_is_not_timed():
    row = measure_one(routes={"plain": lambda x: 3 * x, "backend": double})
    assert "ms" not in row["routes"]["plain"]
    assert row["routes"]["plain"]["error"] == pytest.approx(0.5)
    assert row["torch_route"] == "backend"


@pytest.mark.usefixtures("interpreted")
def test_without_ceilings_there_is_no_floor():
    row = measure_one({"why": "failed"})
    assert row["status"] == "ok"
    assert row["ratio"] > 0
    assert not {"floor_ms", "of_floor"} & set(row)


@pytest.mark.usefixtures("interpreted")
def test_a_correct_kernel_is_timed():
    row = measure_one()
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
        (lambda x: torch.empty_like(x), "nan"),  # unwritten memory holds NaN
    ],
    ids=["wrong", "NaN", "unwritten"],
)
def test_a_wrong_kernel_is_timed_and_stays_wrong(kernel, error):
    row = measure_one(kernel=kernel)
    assert row["status"] == "WRONG"
    assert row["why"] == "error above the tolerance"
    assert row["error"] == error
    assert row["ms"] > 0
    assert row["ratio"] == row["torch_ms"] / row["call"]["ms"]


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_kernel_that_then_fails_stays_wrong():
    calls = []

    def fails_later(x):
        calls.append(0)
        return 3 * x if len(calls) == 1 else 1 / 0

    row = measure_one(kernel=fails_later)
    assert row["status"] == "WRONG"
    assert row["why"].startswith("error above the tolerance; timing: ZeroDivisionError")


@pytest.mark.usefixtures("interpreted")
def test_errors_are_computed_per_part():
    want = torch.tensor([[1e6, 1e6], [1.0, 1.0]])
    got = want + torch.tensor([[0.0, 0.0], [1e-3, 1e-3]])
    assert rows.compute_relative_error(got, want) < 1e-8
    assert rows.compute_relative_error(got, want, parts=2) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.usefixtures("interpreted")
def test_failures_are_recorded_in_their_row():
    row = measure_one(kernel=lambda x: x[:2])
    assert row["status"] == "error"
    assert "(2,); expected (3,)" in row["why"]
    assert row["torch_ms"] > 0
    row = measure_one(routes={"plain": lambda x: 1 / 0})
    assert row["status"] == "ok"
    assert "ZeroDivisionError" in row["routes"]["plain"]["why"]
    assert "ratio" not in row
    row = measure_one(inputs=lambda g: 1 / 0)
    assert row["status"] == "error"
    assert "inputs or reference: ZeroDivisionError" in row["why"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("end", [interrupts, stops])
def test_an_interrupted_run_has_sent_its_rows(end):
    sent = {}

    def send(message):
        index, row = message
        sent[index] = json.loads(json.dumps(row))

    make, late = partial(make_spoiled, call=end), time.time() + run.WHOLE
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        rows.measure_cases(send, "cpu", True, make, RATES, [0, 1, 2], late)
    assert [row["status"] for row in sent.values()] == ["ok", "running"]
    assert sent[0]["ms"] > 0


def test_rows_wait_until_the_last_turn_and_are_then_skipped():
    waiting = measure_three(make_cases, time.time(), last=False)
    assert [row["status"] for row in waiting] == ["waiting"] * 3
    skipped = measure_three(make_cases, time.time())
    assert {(row["status"], row["why"]) for row in skipped} == {("skipped", "no time remained")}


def test_a_row_interrupted_by_the_end_of_the_first_turn_waits_again(monkeypatch):
    clock = SimpleNamespace(time=lambda: clock.now, now=1000.0)

    def watch(work, *arguments, end, silence):
        yield 0, {**rows.make_row(make_cases(True)[0]), "status": "running"}
        clock.now = end
        raise RuntimeError("stopped: it took too long")

    monkeypatch.setattr(rows, "watch", watch)
    monkeypatch.setattr(rows, "time", clock)
    measured = measure_three(make_cases, 1600.0, last=False)
    assert [row["status"] for row in measured] == ["waiting"] * 3


@pytest.mark.usefixtures("interpreted")
def test_a_row_that_kills_its_process_affects_no_other():
    measured = measure_three(partial(make_spoiled, call=dies), time.time() + run.WHOLE)
    assert [row["status"] for row in measured] == ["ok", "error", "ok"]
    assert measured[1]["why"] == "its process ended with exit code 7"


def test_the_run_ends_if_workers_cannot_start():
    measured = measure_three(dies_at_once, time.time() + run.WHOLE)
    assert {row["why"] for row in measured} == {"its process ended with exit code 9"}


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_a_row_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(rows, "SILENCE", 15.0)
    measured = measure_three(partial(make_spoiled, call=hangs), time.time() + run.WHOLE)
    assert [row["status"] for row in measured] == ["ok", "error", "ok"]
    assert measured[1]["why"] == "stopped: it took too long"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_report_on_a_gpu(tmp_path):
    record = run.measure_gpu(tmp_path / "report.json", "cuda", quick=True)
    assert all(row["status"] == "ok" for row in record["rows"])
    assert all(row["kernel"]["how"].startswith(("graph", "profiler")) for row in record["rows"])
    assert record["study"]["seconds"] > 0
