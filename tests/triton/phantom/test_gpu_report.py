"""The GPU report's quick rows on the phantom device: every kernel is correct, and was timed."""

from __future__ import annotations

import time
from typing import Any

import pytest
from _phantom_cuda import phantom_device

from bench import roofline
from bench.common import timing
from bench.gpu_report import rows, study
from bench.gpu_report.cases import list_cases
from bench.gpu_report.report import format_row
from bench.gpu_report.variants import record_launches

RATES = dict.fromkeys(("copy", *roofline.PRECISIONS), 1e9)
QUICK = list_cases(True)
# Rows that the interpreter computes in about a second.
FAST = {"centered_gram", "cell_grams", "class_means", "variate_weights"}


def list_rows() -> list[Any]:
    seen, params = set[str](), []
    for i, case in enumerate(QUICK):
        marks = () if case.name in FAST - seen else pytest.mark.slow
        seen.add(case.name)
        params.append(pytest.param(i, marks=marks, id=f"{i}: {case.name}"))
    return params


@pytest.fixture(autouse=True)
def no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_profile", lambda call, inputs: None)


@pytest.mark.parametrize("index", list_rows())
def test_row(index):
    case = QUICK[index]
    row = rows.make_row(case)
    with phantom_device():
        rows.measure(row, case, "cuda", True, RATES, lambda: None)
    print(*format_row(row))
    assert row["status"] == "ok", row
    assert "kernel" in row
    assert not row["kernel"].get("spoiled")


def test_launches_on_the_phantom_device_can_be_recorded():
    """`prepare` records what these tests launch, since no other tests choose kernels by device."""
    case, variants = QUICK[0], {}
    with record_launches(variants), phantom_device():
        case.kernel(*timing.make_inputs(case.inputs, "cuda")[0])
    pointers = [a for v in variants for a in v.arguments if a.kind == "pointer"]
    assert pointers
    assert {v.module.rpartition(".")[0] for v in variants} == {"repsim_kernels.kernels.triton"}


def test_ceilings():
    with phantom_device():
        rates = timing.measure_ceilings("cuda", True, 0.01)
    assert set(rates) == set(RATES)


@pytest.mark.slow
def test_study(monkeypatch):
    """With PyTorch's kernels, since the interpreter would need an hour."""
    monkeypatch.setenv("REPSIM_BACKEND", "torch")
    sent = []
    with phantom_device():
        study.time_networks(lambda networks: sent.append(networks), "cuda", True, time.time() + 600)
    (network,) = sent[-1]
    assert network["failed"] == []
    assert study.extrapolate(network)["seconds"] > 0
