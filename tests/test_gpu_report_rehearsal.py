"""The whole GPU report on the CPU: by the command without kernels, and with some interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.common.machine import ROOT
from bench.gpu_report import run
from bench.gpu_report.cases import list_cases


def assert_rehearsed(record, printed, cases):
    assert record["finished"]
    verdict = printed.splitlines()[-1]
    assert verdict == f"verdict: {record['verdict']}"
    assert "tests not run: no GPU" in verdict
    assert {row["status"] for row in record["peers"]["rows"]} <= {"ok", "not run"}
    assert record["cache"]["why"].startswith("no --cache")
    assert record["study"]["seconds"] > 0
    assert torch.__version__.startswith(record["environment"]["torch"].partition("+")[0])
    assert min(record["ceilings"].values()) > 0
    assert len(record["rows"]) == len(cases)
    for row in record["rows"]:
        assert row["name"] in printed.rpartition("floor ms")[0]
        assert row["routes"].get("cupy", {"why": "no route"})["why"]
        assert row["torch_ms"] > 0
        assert row["floor_ms"] > 0


def test_the_command_rehearses_all_rows_without_kernels(tmp_path):
    out = tmp_path / "report.json"
    options = ["--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu-report", *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert len(list_cases(True)) > 15
    assert_rehearsed(record, done.stdout, list_cases(True))
    assert "kernels NOT RUN" in record["verdict"]
    for row in record["rows"]:
        assert row["status"] == "not run"
        assert "TRITON_INTERPRET=1" in row["why"]


def list_some(quick):
    """Return rows that the interpreter computes in seconds; the phantom device tests all."""
    return [case for case in list_cases(quick) if case.name in ("centered_gram", "cell_grams")]


@pytest.mark.slow
def test_a_rehearsal_with_kernels(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the processes that measure the rows
    record = run.measure_gpu(tmp_path / "report.json", "cpu", True, list_some)
    assert json.loads((tmp_path / "report.json").read_text()) == record
    assert_rehearsed(record, capsys.readouterr().out, list_some(True))
    assert "on no GPU" in record["verdict"]
    for row in record["rows"]:
        assert row["status"] == "ok", row
        assert row["error"] <= row["tolerance"]
        assert row["ratio"] == row["torch_ms"] / row["ms"]
        assert row["of_floor"] == row["floor_ms"] / row["ms"]
