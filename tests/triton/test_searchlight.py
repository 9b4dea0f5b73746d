"""RDMs of searchlights by one kernel, against SciPy and the definition of crossnobis."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from _guard import pad_with_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from repsim_kernels.kernels.triton import searchlight
from repsim_kernels.kernels.triton.searchlight import Launch

DISTANCES = ["euclidean", "sqeuclidean", "correlation", "cosine", "crossnobis"]
# Tiles smaller than the drawn numbers of patterns, so that there are several.
SMALL = Launch(tile=16, block=16, num_warps=2)


def draw_slabs(rng, voxels, folds, n, spread=0.0):
    """Draw values (voxels, folds, n); the scales of patterns differ."""
    scale = 10.0 ** (spread * rng.standard_normal((folds, n)))
    return (rng.standard_normal((voxels, folds, n)) + rng.standard_normal((folds, 1))) * scale


def draw_spheres(rng, sizes, voxels):
    """Draw voxels for spheres of the given sizes: indptr and indices."""
    return np.cumsum([0, *sizes]), rng.integers(0, voxels, sum(sizes))


def count_folds(distance):
    return 3 if distance == "crossnobis" else 1


def measure(device, slabs, indptr, indices, distance, launch=None):
    arrays = (torch.from_numpy(a).to(device) for a in (indptr, indices))
    return compute(pad_with_nan(torch.from_numpy(slabs).to(device)), *arrays, distance, launch)


def compute(slabs, indptr, indices, distance, launch=None):
    with np.errstate(invalid="ignore"):  # as the dispatcher does: NaN means "not defined" here
        rdms = searchlight.searchlight_rdms(
            slabs, indptr, indices, distance=distance, launch=launch
        )
    assert rdms.dtype == torch.float32
    return rdms.cpu().numpy()


def define(patterns, distance):
    """Return the RDM of patterns (k, folds, n) of one sphere."""
    k, folds, n = patterns.shape
    if k == 0:
        return np.full(n * (n - 1) // 2, np.nan)
    if distance != "crossnobis":
        return pdist(patterns[:, 0].T, distance)
    i, j = np.triu_indices(n, 1)
    difference = patterns[:, :, i] - patterns[:, :, j]
    pairs = permutations(range(folds), 2)
    return np.mean([(difference[:, f] * difference[:, g]).sum(0) for f, g in pairs], 0) / k


def assert_right(got, slabs, indptr, indices, distance, tolerance=1e-12):
    assert got.shape == (len(indptr) - 1, slabs.shape[2] * (slabs.shape[2] - 1) // 2)
    i, j = np.triu_indices(slabs.shape[2], 1)
    for rdm, (start, stop) in zip(got, pairwise(indptr), strict=True):
        patterns = slabs[indices[start:stop]]
        want = define(patterns, distance)
        np.testing.assert_array_equal(np.isnan(rdm), np.isnan(want))
        # Errors are relative to what is added, the energies of both patterns or of unit length,
        # until distances are rounded to float32.
        energy = np.square(patterns).sum((0, 1))
        size = 1 if distance in ("correlation", "cosine") else energy[i] + energy[j]
        size = np.sqrt(size) if distance == "euclidean" else size
        limit = tolerance * size + 2.0**-24 * np.abs(want)
        assert (np.isnan(want) | (np.abs(rdm - want) <= limit)).all()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    distance=st.sampled_from(DISTANCES),
    n=st.integers(2, 40),
    sizes=st.lists(st.sampled_from([0, 1, 2, 5, 16, 17, 40]), max_size=4),
    spread=st.sampled_from([0.0, 2.0]),
    launch=st.sampled_from([None, SMALL]),
)
def test_rdms_match_their_definition(device, seed, distance, n, sizes, spread, launch):
    rng = np.random.default_rng(seed)
    folds = int(rng.integers(2, 6)) if distance == "crossnobis" else 1
    slabs = draw_slabs(rng, 50, folds, n, spread)
    indptr, indices = draw_spheres(rng, sizes, 50)
    got = measure(device, slabs, indptr, indices, distance, launch)
    assert_right(got, slabs, indptr, indices, distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("n", [64, 65, 130])
def test_more_patterns_than_a_tile_holds(device, distance, n):
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 30, count_folds(distance), n)
    indptr, indices = draw_spheres(rng, [20, 3], 30)
    got = measure(device, slabs, indptr, indices, distance)
    assert_right(got, slabs, indptr, indices, distance)


@pytest.mark.parametrize("launch", [None, SMALL])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_patterns_have_a_distance_of_zero(device, distance, launch):
    """Exactly, also next to patterns that are far away, and as do those of an empty volume."""
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 50, count_folds(distance), 20, spread=1.0)
    slabs[:, :, [3, 17]] = slabs[:, :, [1, 2]]
    indptr, indices = draw_spheres(rng, [17, 3], 50)
    got = measure(device, slabs, indptr, indices, distance, launch)
    i, j = np.triu_indices(20, 1)
    equal = ((i == 1) & (j == 3)) | ((i == 2) & (j == 17))
    assert (got[:, equal] == 0).all()
    assert (got[:, ~equal] != 0).all()
    if distance not in ("correlation", "cosine"):
        assert (measure(device, 0 * slabs, indptr, indices, distance, launch) == 0).all()


@pytest.mark.parametrize("launch", [None, SMALL])
@pytest.mark.parametrize("distance", DISTANCES)
def test_small_distances_keep_their_digits(device, distance, launch):
    """Products alone would lose all of them."""
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 50, count_folds(distance), 20)
    slabs[:, :, 18] = slabs[:, :, 4] + 1e-8 * rng.standard_normal(slabs.shape[:2])
    indptr, indices = draw_spheres(rng, [20], 50)
    got = measure(device, slabs, indptr, indices, distance, launch)[0]
    want = define(slabs[indices].astype(np.longdouble), distance)
    if distance in ("correlation", "cosine"):  # SciPy's loses them too
        a, b = slabs[indices, 0][:, [4, 18]].T.astype(np.longdouble)
        if distance == "correlation":
            a, b = a - a.mean(), b - b.mean()
        small = np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum() / 2
    i, j = np.triu_indices(20, 1)
    at = (i == 4) & (j == 18)
    small = small if distance in ("correlation", "cosine") else want[at][0]
    np.testing.assert_allclose(got[at], float(small), rtol=1e-6)


@pytest.mark.parametrize("launch", [None, SMALL])
def test_distances_of_integers_are_exact(device, launch):
    """So equal distances are equal bit for bit, whichever tile they are in."""
    rng = np.random.default_rng(0)
    slabs = rng.integers(-3, 4, (50, 1, 20)).astype(np.float64)
    indptr, indices = draw_spheres(rng, [40, 5, 33], 50)
    got = measure(device, slabs, indptr, indices, "sqeuclidean", launch)
    want = [define(slabs[indices[a:b]], "sqeuclidean") for a, b in pairwise(indptr)]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("distance", DISTANCES)
def test_undefined_distances_are_nan(device, distance):
    """Empty spheres; a pattern that is constant or 0 in a sphere, of one voxel for example."""
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 20, count_folds(distance), 5)
    slabs[:10, :, 2] = 0.1  # adding it up rounds
    slabs[:10, :, 3] = 0
    indptr, indices = np.array([0, 0, 10, 11, 18]), np.r_[np.arange(10), 15, 10:17]
    got = measure(device, slabs, indptr, indices, distance)
    i, j = np.triu_indices(5, 1)
    constant = {"correlation": [2, 3], "cosine": [3]}.get(distance, [])
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(np.isnan(got[1]), np.isin(i, constant) | np.isin(j, constant))
    assert np.isnan(got[2]).all() == (distance == "correlation") == np.isnan(got[2]).any()
    assert not np.isnan(got[3]).any()


def test_spheres_do_not_affect_each_other(device):
    """Part of the spheres may be given: the first one starts anywhere among the indices."""
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 50, 1, 9)
    indptr, indices = draw_spheres(rng, [12, 30, 1, 7], 50)
    want = measure(device, slabs, indptr, indices, "correlation")
    got = measure(device, slabs, indptr[1:4], indices, "correlation")
    np.testing.assert_array_equal(got, want[1:3])
    slabs[indices[:12]] = np.nan
    others = np.isin(indices, indices[:12])
    got = measure(device, slabs, indptr, np.where(others, indices[-1], indices), "euclidean")
    slabs[np.isnan(slabs)] = 0
    want = measure(device, slabs, indptr, np.where(others, indices[-1], indices), "euclidean")
    np.testing.assert_array_equal(got, want)


def test_one_launch_whose_runs_are_identical(device, launches):
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 50, 3, 40)
    indptr, indices = draw_spheres(rng, [12, 0, 30], 50)
    first = measure(device, slabs, indptr, indices, "crossnobis", SMALL)
    assert [record["kernel"] for record in launches] == ["_searchlight_rdms_kernel"]
    assert launches[0]["grid"] == (3 * 6,)
    assert launches[0]["SAME"] is False
    np.testing.assert_array_equal(
        first, measure(device, slabs, indptr, indices, "crossnobis", SMALL)
    )


def test_no_spheres(device):
    got = measure(device, np.zeros((3, 1, 4)), np.array([0]), np.zeros(0, dtype=int), "euclidean")
    assert got.shape == (0, 6)


def test_views_are_copied(device):
    rng = np.random.default_rng(0)
    slabs = draw_slabs(rng, 30, 2, 6)
    indptr, indices = draw_spheres(rng, [9, 4], 30)
    x = torch.from_numpy(slabs.swapaxes(0, 2).copy()).to(device).transpose(0, 2)
    arrays = (torch.from_numpy(np.repeat(a, 2)).to(device)[::2] for a in (indptr, indices))
    got = compute(x, *arrays, "crossnobis")
    assert_right(got, slabs, indptr, indices, "crossnobis")


def test_offsets_beyond_32_bits(device, tmp_path):
    """A sparse file, of which only what is written or read needs memory."""
    voxels, n = 2**28 + 3, 8
    slabs = np.memmap(tmp_path / "slabs", np.float64, "w+", shape=(voxels, 1, n))
    last = slabs[-20:] = draw_slabs(np.random.default_rng(0), 20, 1, n)
    indptr, indices = np.array([0, 12, 20]), np.arange(voxels - 20, voxels)
    arrays = (torch.from_numpy(a).to(device) for a in (slabs, indptr, indices))
    got = compute(*arrays, "euclidean")
    assert_right(got, last, indptr, np.arange(20), "euclidean")


def test_which_arrays_are_supported(device):
    slabs = torch.ones(1, 1, 2, dtype=torch.float64, device=device)
    indptr = torch.tensor([0, 1], device=device)
    assert searchlight.unsupported(slabs, indptr, indptr[:1]) is None


def test_launch_settings():
    assert searchlight.choose(2, (9, 0)) == searchlight.choose(16, (8, 0)) == Launch(16, 16, 2)
    assert searchlight.choose(17, (9, 0)) == searchlight.choose(32, (8, 0)) == Launch(32, 16, 2)
    assert searchlight.choose(33, (9, 0)) == searchlight.choose(1000, (8, 0)) == Launch(64, 16, 8)
    assert searchlight.choose(17, (10, 0)) == searchlight.choose(99, (10, 0)) == Launch(32, 16, 8)
    assert searchlight.choose(9, (10, 0)) == Launch(16, 16, 4)
