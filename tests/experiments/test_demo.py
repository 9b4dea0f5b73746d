"""The complete demo of ``make sweep``, as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from repsim_kernels.experiments.inputs.networks import SMALL


@pytest.mark.slow
def test_the_demo_runs_and_a_second_run_measures_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "repsim_kernels.experiments",
        "sweep",
        "--out",
        str(tmp_path / "demo"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    table = pd.read_parquet(tmp_path / "demo" / "results.parquet")
    assert set(table["model"]) == set(SMALL)
    assert not table.duplicated(["model", "class", "layer", "cell"]).any()
    assert set(table["cell"]) == set(range(16))
    assert "Mean Spearman correlation, resnet50_small" in first.stdout
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "already done" in again.stdout
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "demo" / "results.parquet"), table, check_exact=True
    )
