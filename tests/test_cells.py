"""Class means and the selectivity grid: every backend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import TORCH_DTYPES, TORCH_LAYOUTS, classes
from _draw import representations as drawn
from _tol import as_numpy
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk


@given(st.data())
def test_class_means(data):
    x = data.draw(drawn(dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS))
    labels = data.draw(classes(x.n))
    want = [x.values()[labels == k].mean(0) for k in range(labels.max() + 1)]
    got = rk.class_means(x.torch(), labels)
    np.testing.assert_allclose(as_numpy(got), want, rtol=1e-12, atol=1e-12)


@given(st.data(), st.sampled_from([(4, 4), (1, 3), (5, 1), (2, 7)]))
def test_selectivity_grid(data, grid):
    x = data.draw(drawn(kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS))
    labels = data.draw(classes(x.n)) * 3 + 5
    target = int(labels[0])
    got = rk.selectivity_grid(x.torch(), labels, target, grid=grid)
    assert got.dtype == torch.int64
    want = rk.selectivity_grid(x.values(), labels, target, grid=grid, backend="reference")
    np.testing.assert_array_equal(as_numpy(got), want)


def test_ties_go_by_index():
    x = np.zeros((4, 12))
    x[:, :4] = [[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    for backend in ("torch", "reference"):
        cells = rk.selectivity_grid(x, [1, 1, 0, 0], 1, grid=(3, 2), backend=backend)
        np.testing.assert_array_equal(cells, [4, 4, 5, 5, 0, 0, 1, 1, 2, 2, 3, 3])


def test_ties_are_the_same_in_every_memory_order():
    """Means that are rounded before they are compared tie in one order and not in the other."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 20_000, generator=generator).relu().to(torch.bfloat16)
    labels = np.arange(50) % 10
    want = rk.selectivity_grid(x.double().numpy(), labels, 3, backend="reference")
    for order in (x, x.mT.contiguous().mT):
        np.testing.assert_array_equal(rk.selectivity_grid(order, labels, 3), want)


def test_labels_of_any_kind_and_batches():
    x = np.random.default_rng(0).standard_normal((2, 6, 9)).astype(np.float32)
    labels = [0, 1, 1, 0, 2, 2]
    want = rk.class_means(x, labels)
    for other in (np.array(labels, np.uint8), torch.tensor(labels)):
        np.testing.assert_array_equal(rk.class_means(x, other), want)
    np.testing.assert_array_equal(want[1], rk.class_means(x[1], labels))
    np.testing.assert_array_equal(
        rk.selectivity_grid(x, labels, 2)[1], rk.selectivity_grid(x[1], labels, 2)
    )


@pytest.mark.parametrize("p", [1, 3, 15, 16, 17, 100])
def test_any_number_of_neurons_is_cut_evenly(p):
    x = np.random.default_rng(p).standard_normal((8, p))
    cells = rk.selectivity_grid(x, [0, 0, 0, 1, 1, 1, 2, 2], 1)
    sizes = np.bincount(cells, minlength=16)
    strips = sizes.reshape(4, 4)
    assert sizes.sum() == p
    assert np.ptp(strips.sum(1)) <= 1
    assert (np.ptp(strips, axis=1) <= 1).all()
