"""Representational similarity analysis of a pair of layers; ranks are sorted, not multiplied."""

from __future__ import annotations

import pytest

import repsim_kernels as rk
from bench.common.inputs import DTYPES, as_distances, pair, reference, size

N, P = 200, 10_000  # the definition takes a pass over the neurons for each stimulus


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("distance", "compare"), [("euclidean", "spearman"), ("correlation", "pearson")]
)
def test_rsa(timed, distance, compare, dtype):
    timed(
        "rsa",
        lambda x, y: rk.rsa(x, y, distance=distance, compare=compare),
        pair(N, P, dtype),
        oracle=reference("rsa", distance=distance, compare=compare),
        check=as_distances("rsa", dtype),
        what=f"{distance}, {compare}",
        shape={"n": N, "p": P},
        dtype=dtype,
        bytes=2 * size(N, P, dtype),
    )
