"""Spheres of voxels against distances and rsatoolbox."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

import repsim_kernels as rk


@given(SEEDS, st.integers(1, 3), st.floats(0, 3), st.booleans())
def test_spheres_hold_the_voxels_within_the_radius(seed, dimensions, radius, own):
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 4, (rng.integers(1, 40), dimensions))
    centres = rng.uniform(0, 4, (rng.integers(1, 9), dimensions))
    indptr, indices = rk.spheres(points, radius, centres=None if own else centres)
    distances = cdist(points if own else centres, points)
    assert len(indptr) == len(distances) + 1
    for c, row in enumerate(distances):
        np.testing.assert_array_equal(
            indices[indptr[c] : indptr[c + 1]], np.flatnonzero(row <= radius)
        )


def test_spheres_are_those_of_rsatoolbox_below_the_radius():
    """Whole numbers of voxels at the radius itself are left out there."""
    searchlight = pytest.importorskip("rsatoolbox.util.searchlight")
    mask = np.random.default_rng(0).random((5, 6, 4)) < 0.7
    centres, neighbours = searchlight.get_volume_searchlight(
        mask, radius=2, threshold=0, truncate_at_boundary=True
    )
    indptr, indices = rk.spheres(np.argwhere(mask), 1.999)
    voxels = np.flatnonzero(mask)
    np.testing.assert_array_equal(centres, voxels)
    for c, sphere in enumerate(neighbours):
        np.testing.assert_array_equal(voxels[indices[indptr[c] : indptr[c + 1]]], np.sort(sphere))


def test_spheres_in_chunks_are_the_same(monkeypatch):
    points = np.argwhere(np.ones((4, 3, 2)))
    want = rk.spheres(points, 1.5)
    monkeypatch.setattr("repsim_kernels.ops.searchlight._CENTRES", 5)
    for a, b in zip(rk.spheres(torch.from_numpy(points), 1.5), want, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([1, 2], 1), rk.ShapeError, r"coordinates: shape \(2,\); expected \(p, 3\)"),
        (([[1, 2]], -1), rk.OptionError, "radius: -1"),
        (([[np.nan, 2]], 1), rk.NonFiniteError, "coordinates: 1 of 2 values"),
        (([["a"]], 1), rk.DtypeError, "coordinates: "),
    ],
)
def test_wrong_coordinates_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        rk.spheres(*arguments)
    with pytest.raises(rk.ShapeError, match="centres: 1 columns, but coordinates has 2"):
        rk.spheres([[1, 2]], 1, centres=[[1]])


def test_spheres_name_the_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        rk.spheres([[1, 2]], 1)
