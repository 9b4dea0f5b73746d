"""A study of two layers with every kernel: its rows match those of the torch backend."""

from __future__ import annotations

import numpy as np
from _toy import toy_study

from bench.common.tolerances import DISTANCE, assert_close
from repsim_kernels.experiments.columns import METRICS, PERFORMANCE, PROBES

KEYS = ["model", "class", "layer", "cell", "size"]


def test_rows_match_the_torch_backend(device, launches, monkeypatch, tmp_path):
    monkeypatch.setenv("REPSIM_BACKEND", "torch")
    study = toy_study(targets=[0, 2], grid=(2, 3), device=device)
    expected = study.run(out=tmp_path / "torch").table
    assert not launches
    monkeypatch.setenv("REPSIM_BACKEND", "triton")
    rows = study.run(out=tmp_path / "triton").table
    names = {launch["kernel"] for launch in launches}
    assert names >= {"_write_kernel", "_gram_kernel", "_sum_kernel", "_one_plane_weights_kernel"}
    assert rows[KEYS].equals(expected[KEYS])
    assert len(rows) == 2 * 2 * 6
    for name in METRICS:
        assert_close(rows[name].to_numpy(), expected[name].to_numpy(), DISTANCE["float32"])
    for name in (*PERFORMANCE, *PROBES["ridge"]):
        np.testing.assert_allclose(
            rows[name], expected[name], atol=1e-4, equal_nan=True, err_msg=name
        )
