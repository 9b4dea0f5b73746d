"""`rsa` equals the comparison of two RDMs, except where distances differ by rounding alone."""

from __future__ import annotations

import numpy as np
import pytest
from _draw import SEEDS, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import SAME, assert_close

DISTANCES = ["euclidean", "sqeuclidean", "correlation", "cosine"]
EACH_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)


def compare_by_rdms(x, y, distance, method, dtype=np.float64):
    a, b = (rk.rdm(z, distance=distance).astype(dtype) for z in (x, y))
    return rk.compare_rdms(a, b, method=method)


@EACH_DISTANCE
@pytest.mark.parametrize("compare", ["spearman", "pearson", "cosine"])
@settings(max_examples=10)
@given(
    pairs(
        n=st.integers(4, 20),
        p=st.integers(10, 40),
        kinds=("gaussian", "large mean", "duplicate rows"),
        dtypes=("float64", "float32"),
    )
)
def test_rsa_compares_the_rdms(distance, compare, pair):
    """Equal rows have equal distances to all others, which tie in both."""
    x, y = (z.numpy() for z in pair)
    want = rk.rsa(x, y, distance=distance, compare=compare)
    assert_close(compare_by_rdms(x, y, distance, compare), want, SAME)


@EACH_DISTANCE
@settings(max_examples=10)
@given(SEEDS)
def test_distances_that_differ_by_rounding_tie_in_rsa_and_in_rounded_rdms(distance, seed):
    """Tenths are not exact in float64, so that distances that should be equal differ."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (12, 6)) * 0.1
    x[:, 0] = np.arange(12) % 4 * 0.1  # no row is constant or 0, nor are all equal
    x[:, 1] = 0.7
    y = rng.standard_normal((12, 20))
    want = rk.rsa(x, y, distance=distance)
    assert_close(compare_by_rdms(x, y, distance, "spearman", np.float32), want, SAME)
    # Pearson's correlation does not depend on ties.
    want = rk.rsa(x, y, distance=distance, compare="pearson")
    assert_close(compare_by_rdms(x, y, distance, "pearson"), want, SAME)


def test_unrounded_distances_do_not_tie():
    """This is where `rsa` and the comparison of RDMs differ."""
    third = 1 / 3
    a = [third, 1 - 2 * third, 1.0]  # the second is the first, up to rounding
    assert a[0] != a[1]
    model = [1.0, 1.0, 2.0]
    assert rk.compare_rdms(a, model) < 0.9
    assert rk.compare_rdms(np.float32(a), model) == 1
