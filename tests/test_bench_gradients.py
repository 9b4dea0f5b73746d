"""The benchmark of gradients: both methods compute the same, and its table."""

from __future__ import annotations

import pytest

from bench.bench_gradients import CASES, describe_gradients, measure_gradients


@pytest.fixture(scope="module")
def record():
    return measure_gradients(quick=True)


def test_every_method_has_the_same_gradient(record):
    assert [row["name"] for row in record["rows"]] == list(CASES)
    for row in record["rows"]:
        ours, plain, exact = row["errors"]
        assert max(ours, exact) < 1e-7  # of rounding to float32
        assert plain < 1e-3
        assert min(row["seconds"]) > 0
        assert min(row["bytes"]) >= 0


def test_the_page_has_times_memory_and_errors():
    row = {
        "name": "linear CKA",
        "n": 1024,
        "p": 2048,
        "seconds": [1.0, 2.0, 0.25],
        "bytes": [1e8, 2.5e9, 3e6],
        "errors": [2e-8, 3e-6, 2e-8],
    }
    environment = {
        "device": "a CPU", "torch": "2", "date": "2026-01-02T00:00", "commit": None, "changed": None
    }  # fmt: skip
    text = describe_gradients({"environment": environment, "rows": [row]})
    cells = "1 s | 2 s | 250 ms | 100 MB | 2,500 MB | 3 MB | 2e-08 | 3e-06 | 2e-08 |"
    assert f"| linear CKA, 1,024 x 2,048 | {cells}" in text
