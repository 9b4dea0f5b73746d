"""Candidates for the nearest neighbours by one kernel, against distances in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels.kernels.torch import neighbours
from repsim_kernels.kernels.triton import nearest
from repsim_kernels.kernels.triton.nearest import Launch

# Tiles and steps smaller than the drawn sizes, and several programs for each block of stimuli.
SMALL = Launch(rows=16, cols=16, block_p=16, parts=2, num_warps=4, num_stages=2)


def draw_rows(rng, n, p, spread=0.0):
    """Draw rows (n, p) of float32 whose longest has unit length."""
    z = rng.standard_normal((n, p)) * 10.0 ** (spread * rng.standard_normal((n, 1)))
    return (z / np.linalg.norm(z, axis=1).max()).astype(np.float32)


def measure(z):
    z = z.astype(np.float64)
    return np.square(z[:, None] - z[None]).sum(2)


def find(device, z, count, launch=None):
    """Find candidates; the energies are those of the float32 rows."""
    energy = np.square(z.astype(np.float64)).sum(1)
    inputs = (torch.from_numpy(a).to(device) for a in (z, energy))
    results = nearest.find_candidates(*inputs, count, launch=launch)
    indices, lower, upper = (a.cpu().numpy() for a in results)
    assert indices.shape == lower.shape == upper.shape == (len(z), count)
    assert (indices.dtype, lower.dtype, upper.dtype) == (np.int64, np.float32, np.float32)
    return indices, lower, upper


def assert_right(z, count, found):
    indices, lower, upper = found
    n = len(z)
    d2 = measure(z)
    assert (np.sort(indices, 1)[:, 1:] > np.sort(indices, 1)[:, :-1]).all()
    assert (indices != np.arange(n)[:, None]).all()
    own = np.take_along_axis(d2, indices, 1)
    assert (lower <= own).all()
    assert (own <= upper).all()
    assert (lower[:, 1:] >= lower[:, :-1]).all()
    # Bounds are tight enough to be of use.
    energy = np.square(z.astype(np.float64)).sum(1)
    assert (upper - lower <= 1e-3 * (energy[:, None] + energy[indices]) + 1e-9).all()
    # All others are at least as far away as the last bound.
    np.put_along_axis(d2, indices, np.inf, 1)
    np.fill_diagonal(d2, np.inf)
    assert (d2 >= lower[:, -1:]).all()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 70),
    p=st.integers(1, 80),
    count=st.sampled_from([1, 2, 7, 16, 17, 32]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    launch=st.sampled_from([None, SMALL]),
)
def test_candidates_are_the_nearest(device, seed, n, p, count, spread, launch):
    z = draw_rows(np.random.default_rng(seed), n, p, spread)
    count = min(count, n - 1)
    assert_right(z, count, find(device, z, count, launch))


@pytest.mark.parametrize(("n", "p"), [(300, 5), (129, 600), (40, 1000)])
def test_several_tiles_and_accumulators(device, n, p):
    z = draw_rows(np.random.default_rng(0), n, p)
    assert_right(z, 17, find(device, z, 17))


@pytest.mark.parametrize("count", [1, 16, 17, nearest.MAX_COUNT])
def test_as_many_candidates_as_others(device, count):
    z = draw_rows(np.random.default_rng(0), count + 1, 3)
    assert_right(z, count, find(device, z, count, SMALL))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(20, 70), p=st.integers(1, 4))
def test_equal_distances_are_ordered_by_number(device, seed, n, p):
    """Rows of the corners of a cube: the distances are exact, and most of them are equal."""
    corners = np.random.default_rng(seed).integers(0, 2, (n, p)) * 2 - 1
    z = (corners * 2.0 ** -np.ceil(np.log2(p) / 2)).astype(np.float32)
    indices, lower, _ = find(device, z, 12, SMALL)
    d2 = measure(z)
    np.fill_diagonal(d2, np.inf)
    np.testing.assert_array_equal(indices, np.argsort(d2, axis=1, kind="stable")[:, :12])
    assert (lower >= 0).all()


def test_repeated_rows_are_the_nearest(device):
    z = draw_rows(np.random.default_rng(0), 20, 6)[np.arange(40) % 20]
    indices, lower, _ = find(device, z, 3, SMALL)
    np.testing.assert_array_equal(indices[:, 0], (np.arange(40) + 20) % 40)
    assert (lower[:, 0] == 0).all()


def test_all_rows_zero(device):
    indices, lower, _ = find(device, np.zeros((5, 3), dtype=np.float32), 2)
    np.testing.assert_array_equal(indices, [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]])
    assert (lower == 0).all()


def test_small_rows_keep_their_bounds(device):
    """Next to a row of unit length, the others vanish in float16 or nearly do."""
    rng = np.random.default_rng(0)
    z = draw_rows(rng, 30, 10) * np.float32(1e-7)
    z[0] = draw_rows(rng, 1, 10)
    assert_right(z, 5, find(device, z, 5, SMALL))


def test_runs_are_identical_and_one_launch_does_all(device, launches):
    z = draw_rows(np.random.default_rng(0), 50, 20)
    first = find(device, z, 9, SMALL)
    assert [record["kernel"] for record in launches] == ["_candidates_kernel"]
    assert all(map(np.array_equal, first, find(device, z, 9, SMALL)))


@pytest.mark.parametrize("metric", ["mutual_knn", "jaccard_knn", "cknna"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_metrics_are_those_of_the_reference(device, launches, metric, dtype):
    """Also with repeated stimuli, whose neighbours the candidates leave open."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((40, 6))[np.arange(45) % 40])
    y = x[:, :5] + 0.3 * torch.from_numpy(rng.standard_normal((45, 5)))
    x, y = (a.to(device, getattr(torch, dtype)) for a in (x, y))
    got = getattr(neighbours, metric)(x, y, find=nearest.find_candidates, k=4)
    want = getattr(rk, metric)(x, y, k=4, backend="reference")
    assert [record["kernel"] for record in launches] == ["_candidates_kernel"] * 2
    np.testing.assert_allclose(got.cpu(), want.cpu(), rtol=0, atol=1e-12)
    assert 0.1 < float(got) < 0.9


def test_more_neighbours_than_a_list_holds(device, launches):
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.standard_normal((50, p))).to(device) for p in (3, 4))
    got = neighbours.mutual_knn(x, y, find=nearest.find_candidates, k=26)
    want = rk.mutual_knn(x, y, k=26, backend="reference")
    assert (launches, float(got)) == ([], float(want))


def test_launch_settings():
    large = nearest.choose(20_000, (9, 0))
    assert (large.rows, large.cols, large.block_p, large.parts) == (128, 128, 64, 4)
    assert nearest.choose(1024, (9, 0)).parts == 8
    assert nearest.choose(50, (9, 0)).parts == 1
    assert nearest.choose(20_000, (8, 0)).rows == 64
    assert nearest.choose(20_000, (10, 0)).cols == 64
