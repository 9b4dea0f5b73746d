"""The values of docs/metrics.md, "Reference values", from every backend."""

from __future__ import annotations

import numpy as np
import pytest

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close

BACKENDS = ["reference", "torch"]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

# The paper prints five digits.
FIVE = Tol(0.0, 5e-6)
# The second table comes from float64 code with another order of operations.
EXACT = Tol(1e-11)


@pytest.fixture(scope="module")
def demo():
    """The data of Kornblith et al.'s demo."""
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return x, rng.randn(100, 10) + x


@pytest.fixture(scope="module")
def ablated():
    """A representation, a cell of every sixteenth neuron, and the copy with that cell zeroed."""
    b = np.random.default_rng(7).standard_normal((40, 300)) ** 2
    cell = np.arange(300) % 16 == 0
    return b, cell, np.where(cell, 0, b)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("cka", {}, 0.55761),
        ("cka", {"debiased": True}, 0.51346),
        ("cka", {"kernel": "rbf", "sigma": 0.5}, 0.65483),
        ("cca", {"squared": True}, 0.54540),
        ("cca", {}, 0.73101),
        ("procrustes", {}, 0.73626),
    ],
)
def test_metrics_of_the_demo(demo, name, options, value, backend):
    got = getattr(rk, name)(*demo, **options, backend=backend)
    assert_close(got, value, FIVE)


# The published code divides the sums of correlations by n = 40 although the rank is 39.
CCA, CCA_SQUARED = 0.338625738993648 * 40 / 39, 0.126156202711178 * 40 / 39


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("cka", {}, 1 - 0.008479237556763),
        ("procrustes_distance", {}, 0.004981709003618),
        ("procrustes", {}, 1 - 0.004981709003618 / 2),
        ("pwcca", {"penalty": 1e3}, 1 - 0.624139326215972),
        ("cca", {"penalty": 1e3}, CCA),
        ("cca", {"penalty": 1e3, "squared": True}, CCA_SQUARED),
    ],
)
@pytest.mark.parametrize("remove", [False, True])
def test_metrics_of_one_ablation(ablated, name, options, value, remove, backend):
    original, cell, zeroed = ablated
    other = original[:, ~cell] if remove else zeroed
    assert_close(getattr(rk, name)(original, other, **options, backend=backend), value, EXACT)


def test_distances_of_one_ablation(ablated, backend):
    original, cell, _ = ablated
    want = {
        "cka": 0.008479237556763,
        "procrustes": 0.004981709003618,
        "pwcca": 0.624139326215972,
        "cca": 1 - CCA,
        "cca_squared": 1 - CCA_SQUARED,
    }
    got = rk.ablation_distances(
        original, cell[None], metrics=list(want), penalty=1e3, backend=backend
    )
    assert list(got) == list(want)
    for name, value in want.items():
        assert_close(got[name], [value], EXACT)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("shift", [10, 1000])
def test_debiased_cka_ignores_a_shift(dtype, shift, backend):
    rng = np.random.default_rng(0)
    x, y = rng.integers(-8, 9, (30, 40)), rng.integers(-8, 9, (30, 25))
    y[:, :20] += x[:, :20]
    # Small integers, so that the shifted input is exact in each dtype.
    options = {"debiased": True, "precision": "float64", "backend": backend}
    unshifted = rk.cka(x.astype(dtype), y.astype(dtype), **options)
    shifted = rk.cka((x + shift).astype(dtype), (y - shift).astype(dtype), **options)
    assert unshifted > 0.1
    assert_close(shifted, unshifted, SAME)
