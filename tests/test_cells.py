"""Class means and the selectivity grid: each backend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import TORCH_DTYPES, TORCH_LAYOUTS, classes, representations
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import repsim_kernels as rk
from bench.common.tolerances import as_numpy
from repsim_kernels.forward import AblatedForward

GRIDS = st.sampled_from([(4, 4), (1, 3), (5, 1), (2, 7)])


@given(st.data())
def test_class_means_match_numpy(data):
    x = data.draw(representations(dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS))
    labels = data.draw(classes(x.n))
    want = [x.values()[labels == k].mean(0) for k in range(labels.max() + 1)]
    got = rk.class_means(x.torch(), labels)
    np.testing.assert_allclose(as_numpy(got), want, rtol=1e-12, atol=1e-12)


@given(st.data(), GRIDS)
def test_selectivity_grid_matches_the_reference(data, grid):
    x = data.draw(representations(kinds=("gaussian", "relu"), layouts=TORCH_LAYOUTS))
    labels = data.draw(classes(x.n)) * 3 + 5
    target = int(labels[0])
    got = rk.selectivity_grid(x.torch(), labels, target, grid=grid)
    assert got.dtype == torch.int64
    want = rk.selectivity_grid(x.values(), labels, target, grid=grid, backend="reference")
    np.testing.assert_array_equal(as_numpy(got), want)


def test_ties_are_broken_by_index():
    x = np.zeros((4, 12))
    x[:, :4] = [[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    for backend in ("torch", "reference"):
        cells = rk.selectivity_grid(x, [1, 1, 0, 0], 1, grid=(3, 2), backend=backend)
        np.testing.assert_array_equal(cells, [4, 4, 5, 5, 0, 0, 1, 1, 2, 2, 3, 3])


def test_ties_are_the_same_in_every_memory_order():
    """Means that were rounded before the comparison would tie in one order only."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 20_000, generator=generator).relu().to(torch.bfloat16)
    labels = np.arange(50) % 10
    want = rk.selectivity_grid(x.double().numpy(), labels, 3, backend="reference")
    for order in (x, x.mT.contiguous().mT):
        np.testing.assert_array_equal(rk.selectivity_grid(order, labels, 3), want)


def test_labels_of_any_kind_and_batches_are_accepted():
    x = np.random.default_rng(0).standard_normal((2, 6, 9)).astype(np.float32)
    labels = [0, 1, 1, 0, 2, 2]
    want = rk.class_means(x, labels, batched=True)
    for variant in (np.array(labels, np.uint8), torch.tensor(labels)):
        np.testing.assert_array_equal(rk.class_means(x, variant, batched=True), want)
    np.testing.assert_array_equal(want[1], rk.class_means(x[1], labels))
    np.testing.assert_array_equal(
        rk.selectivity_grid(x, labels, 2, batched=True)[1], rk.selectivity_grid(x[1], labels, 2)
    )


@pytest.mark.parametrize("p", [1, 3, 15, 16, 17, 100])
def test_cells_have_even_sizes(p):
    x = np.random.default_rng(p).standard_normal((8, p))
    cells = rk.selectivity_grid(x, [0, 0, 0, 1, 1, 1, 2, 2], 1)
    sizes = np.bincount(cells, minlength=16)
    strips = sizes.reshape(4, 4)
    assert sizes.sum() == p
    assert np.ptp(strips.sum(1)) <= 1
    assert (np.ptp(strips, axis=1) <= 1).all()


def make_stimuli_without_ties():
    """Return stimuli, their three classes, and the cells of the neurons with inclusive edges."""
    x = np.random.default_rng(3).standard_normal((9, 40))
    labels = np.arange(9) % 3
    return x, labels, rk.selectivity_grid(x, labels, 1, grid=(3, 2), edges="inclusive")


@given(st.data(), GRIDS, st.sampled_from(["ties", "zeros", "unchanged"]))
def test_inclusive_edges_match_the_reference(data, grid, change):
    """Rectified integers tie, often for a whole strip."""
    x = data.draw(
        representations(kinds=("low rank", "relu"), dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS)
    )
    labels = data.draw(classes(x.n))
    x = x.torch()
    if change == "ties":
        x.clamp_(0, 2).round_()
    elif change == "zeros":
        x[:, data.draw(st.integers(0, 3)) :: 2] = 0
    options = {"grid": grid, "edges": "inclusive"}
    got = rk.selectivity_grid(x, labels, 1, **options)
    assert got.dtype == torch.bool
    want = rk.selectivity_grid(as_numpy(x), labels, 1, **options, backend="reference")
    np.testing.assert_array_equal(got, want)


@given(st.data(), GRIDS)
def test_inclusive_edges_do_not_depend_on_the_order_of_neurons(data, grid):
    x = data.draw(representations(kinds=("low rank",))).values().clip(0, 2)
    labels = data.draw(classes(len(x)))
    order = np.array(data.draw(st.permutations(range(x.shape[1]))))
    got = rk.selectivity_grid(x[:, order], labels, 0, grid=grid, edges="inclusive")
    want = rk.selectivity_grid(x, labels, 0, grid=grid, edges="inclusive")[:, order]
    np.testing.assert_array_equal(got, want)


@given(st.data(), GRIDS)
def test_a_neuron_between_the_edges_is_in_one_strip(data, grid):
    x = data.draw(representations(kinds=("low rank",), p=st.integers(1, 60))).values()
    is_target = data.draw(classes(len(x), max_classes=2)) == 1
    inside = x[is_target].sum(0) * (~is_target).sum()
    outside = x[~is_target].sum(0) * is_target.sum()
    selectivity = (inside - outside).astype(int)
    p = x.shape[1]
    edges = [sorted(selectivity)[i * p // grid[0]] for i in range(grid[0])] + [max(selectivity)]
    cells = rk.selectivity_grid(x, is_target.astype(int), 1, grid=grid, edges="inclusive")
    strips = cells.reshape(*grid, p).any(1)
    for neuron in np.flatnonzero(~np.isin(selectivity, edges)):
        strip = np.searchsorted(edges, selectivity[neuron]) - 1
        np.testing.assert_array_equal(np.flatnonzero(strips[:, neuron]), [strip])


def test_a_zero_layer_and_a_single_neuron_give_empty_cells():
    for x in (np.zeros((4, 30)), np.array([[3.0], [1], [0], [0]])):
        for backend in ("torch", "reference"):
            cells = rk.selectivity_grid(x, [1, 1, 0, 0], 1, edges="inclusive", backend=backend)
            np.testing.assert_array_equal(cells, np.zeros((16, x.shape[1]), bool))


def test_batches_with_inclusive_edges_match_single_calls():
    x = np.random.default_rng(0).integers(0, 3, (2, 3, 6, 30))
    options = {"grid": (2, 2), "edges": "inclusive"}
    labels = [0, 1, 1, 0, 2, 2]
    for backend in ("torch", "reference"):
        got = rk.selectivity_grid(x, labels, 2, **options, batched=True, backend=backend)
        assert got.dtype == bool
        want = [[rk.selectivity_grid(z, labels, 2, **options) for z in y] for y in x]
        np.testing.assert_array_equal(got, want)


def test_inclusive_cells_are_ablated_like_labels():
    x, y, members = make_stimuli_without_ties()
    assert (members.sum(0) > 1).any()
    distances = rk.ablation_distances(x, members)
    accuracy = rk.ablation_decodability(x, members, y)
    grams = rk.cell_grams(x, members)
    for c, cell in enumerate(members):
        labels = np.where(cell, 0, -1)
        single = rk.ablation_distances(x, labels)
        for name, values in distances.items():
            np.testing.assert_allclose(values[c], single[name][0], rtol=1e-9, atol=1e-14)
        for kind in ("refit", "frozen"):
            assert accuracy[kind][c] == rk.ablation_decodability(x, labels, y)[kind][0]
        np.testing.assert_allclose(grams[c], rk.cell_grams(x, labels)[0], atol=1e-12)


def test_inclusive_strips_add_the_lowest_neuron_of_the_strip_above():
    """Without ties, the least selective neuron of a strip is also in the strip below."""
    x, y, _ = make_stimuli_without_ties()
    selectivity = x[y == 1].mean(0) - x[y != 1].mean(0)
    equal = rk.selectivity_grid(x, y, 1, grid=(4, 1))
    for strip, cell in enumerate(rk.selectivity_grid(x, y, 1, grid=(4, 1), edges="inclusive")):
        want = set(np.flatnonzero(equal == strip))
        above = np.flatnonzero(equal == strip + 1)
        want |= {above[selectivity[above].argmin()]} if len(above) else set()
        edges = {min(want, key=selectivity.item), max(want, key=selectivity.item)}
        assert want - edges <= set(np.flatnonzero(cell)) <= want


def test_forward_pass_ablates_inclusive_cells():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 3)).eval()
    forward = AblatedForward(model, "1")
    images = torch.randn(8, 5)
    with torch.no_grad():
        x = model[:2](images)
    cells = rk.selectivity_grid(x, np.arange(8) % 2, 0, grid=(2, 2), edges="inclusive")
    with torch.no_grad():
        want = torch.stack([model[2](x.masked_fill(cell, 0)) for cell in cells])
    torch.testing.assert_close(forward.logits(forward.prefix(images), cells), want)
