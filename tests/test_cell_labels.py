"""Cells of an activation: channels, heads, positions, random ones, and groups by scores."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from _draw import SEEDS, classes, representations
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
LAST = st.sampled_from([None, False, True])


def find_channel_axis(shape, channels_last):
    if channels_last is None:
        channels_last = len(shape) == 2
    return len(shape) - 1 if channels_last else 0


@given(SHAPES, LAST)
def test_a_channel_is_an_index_of_its_dimension(shape, channels_last):
    axis = find_channel_axis(shape, channels_last)
    got = rk.cells.channels(shape, channels_last=channels_last)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got.reshape(shape), np.indices(shape)[axis])


@given(SHAPES, LAST)
def test_a_position_is_the_index_without_the_channel(shape, channels_last):
    axis = find_channel_axis(shape, channels_last)
    got = rk.cells.positions(shape, channels_last=channels_last)
    assert got.dtype == np.int64
    others = [index for i, index in enumerate(np.indices(shape)) if i != axis]
    lengths = [length for i, length in enumerate(shape) if i != axis]
    want = np.ravel_multi_index(others, lengths) if others else np.zeros(shape, int)
    np.testing.assert_array_equal(got.reshape(shape), want)


@given(SHAPES, LAST, st.integers(1, 4))
def test_heads_are_equal_slices_of_the_channels(shape, channels_last, n_heads):
    axis = find_channel_axis(shape, channels_last)
    shape = (*shape[:axis], shape[axis] * n_heads, *shape[axis + 1 :])
    got = rk.cells.heads(shape, n_heads, channels_last=channels_last).reshape(shape)
    for head, part in enumerate(np.split(got, n_heads, axis)):
        assert (part == head).all()


@given(st.integers(1, 60), st.data())
def test_random_cells_are_a_partition_into_equal_sizes(p, data):
    n_cells, seed = data.draw(st.integers(1, p)), data.draw(SEEDS)
    got = rk.cells.random(p, n_cells, seed)
    assert got.shape == (p,)
    assert np.ptp(np.bincount(got, minlength=n_cells)) <= 1
    np.testing.assert_array_equal(got, rk.cells.random(p, n_cells, seed))


def test_random_cells_depend_on_the_seed():
    assert (rk.cells.random(100, 4) != rk.cells.random(100, 4, seed=1)).any()
    assert (rk.cells.random(100, 4) != np.sort(rk.cells.random(100, 4))).any()


@given(st.data(), st.sampled_from([(4, 4), (1, 3), (5, 1), (2, 7)]))
def test_selectivity_and_magnitude_make_the_selectivity_grid(data, grid):
    """The values are small integers, with many ties; means are multiplied to stay exact."""
    x = data.draw(representations(kinds=("low rank",))).values()
    is_target = data.draw(classes(len(x), max_classes=2)) == 1
    inside = x[is_target].sum(0) * (~is_target).sum()
    outside = x[~is_target].sum(0) * is_target.sum()
    scores = [inside - outside, inside + outside]
    got = rk.cells.by(scores, grid)
    np.testing.assert_array_equal(got, rk.selectivity_grid(x, is_target.astype(int), 1, grid=grid))
    np.testing.assert_array_equal(rk.cells.by(torch.from_numpy(np.stack(scores)), grid), got)


@given(st.data())
def test_groups_by_three_scores_are_nested_and_ordered(data):
    p = data.draw(st.integers(1, 40))
    scores = np.random.default_rng(data.draw(SEEDS)).integers(0, 6, (3, p)) * 1.0
    cells = rk.cells.by(scores, (2, 3, 2))
    np.testing.assert_array_equal(rk.cells.by(scores[:2], (2, 3)), cells // 2)
    np.testing.assert_array_equal(rk.cells.by(scores[0], 2), cells // 6)
    for outer in np.unique(cells // 2):
        low, high = (scores[2, cells == 2 * outer + i] for i in (0, 1))
        assert abs(len(low) - len(high)) <= 1
        assert low.max(initial=-1) <= high.min(initial=9)


def test_infinite_scores_are_sorted():
    np.testing.assert_array_equal(rk.cells.by([np.inf, 0, -np.inf, 1], 4), [3, 1, 0, 2])


REFUSED = [
    (lambda: rk.cells.channels(()), rk.ShapeError, r"shape: \(\); expected the shape"),
    (lambda: rk.cells.channels(5), rk.ShapeError, r"shape: 5; expected the shape"),
    (lambda: rk.cells.channels((3, 0)), rk.ShapeError, "shape: 0; expected a whole number"),
    (lambda: rk.cells.positions((2.5, 1)), rk.ShapeError, "shape: 2.5; expected a whole number"),
    (lambda: rk.cells.channels((3, 2), channels_last=1), rk.OptionError, "channels_last: 1;"),
    (lambda: rk.cells.heads((4, 10), 3), rk.CellError, r"n_heads: 3, but shape \(4, 10\) has 10"),
    (lambda: rk.cells.heads((10, 4, 4), 4), rk.CellError, "has 10 channels; expected a divisor"),
    (lambda: rk.cells.heads((4, 10), 0), rk.OptionError, "n_heads: 0; expected a whole number"),
    (lambda: rk.cells.random(3, 4), rk.CellError, "n_cells: 4 for 3 neurons; expected at most 3"),
    (lambda: rk.cells.random(0, 1), rk.OptionError, "p: 0; expected a whole number"),
    (lambda: rk.cells.random(3, 2, -1), rk.OptionError, "seed: -1; expected a whole number"),
    (lambda: rk.cells.by([1.0, np.nan], 2), rk.NonFiniteError, "scores: 1 of 2 values are NaN"),
    (lambda: rk.cells.by([1.0, 2.0], (2, 2)), rk.OptionError, "grid: 2 numbers for 1 scores"),
    (lambda: rk.cells.by(np.ones((2, 3)), 4), rk.OptionError, "grid: 1 numbers for 2 scores"),
    (lambda: rk.cells.by([1.0, 2.0], 0), rk.OptionError, "grid: 0; expected a whole number"),
    (lambda: rk.cells.by([1.0, 2.0], "4"), rk.OptionError, "grid: '4'; expected a whole number"),
    (lambda: rk.cells.by(np.ones((1, 2, 3)), 2), rk.ShapeError, r"scores: shape \(1, 2, 3\)"),
    (lambda: rk.cells.by([], 2), rk.ShapeError, r"scores: shape \(0,\)"),
    (lambda: rk.cells.by(["a", "b"], 2), rk.DtypeError, "scores: dtype <U1; expected real"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_what_does_not_fit_is_refused_by_name(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "; expected" in str(caught.value)


def test_labels_of_a_shape_need_no_framework():
    code = (
        "import sys, repsim_kernels as rk; assert 'cells' in dir(rk);"
        "rk.cells.channels((3, 4)), rk.cells.heads((3, 4), 2), rk.cells.positions((3, 4));"
        "rk.cells.random(9, 3); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
