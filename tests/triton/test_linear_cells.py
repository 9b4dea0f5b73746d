"""A linear layer without the columns of each cell, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS, Representation, labels, representations
from _guard import pad_with_nan
from hypothesis import given
from hypothesis import strategies as st

from bench.common.tolerances import GRAM, OUTPUT, Tol, as_numpy, assert_close
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.linear_cells import (
    AOT_CASES,
    Launch,
    _plan_items,
    choose,
    floor,
    linear_cells,
)

# Triton's interpreter truncates to bfloat16, where a GPU rounds.
ROUNDING = OUTPUT | ({"bfloat16": 2 * OUTPUT["bfloat16"]} if _launch.is_interpreted() else {})
LAUNCHES = (Launch(16, 16, 16, 16, 32, 4, 1), Launch(16, 32, 16, 32, 128, 4, 2))


def remove_cells(x, cells, ids):
    """Return x without each cell, (C, n, p) in float64."""
    return np.where((cells == np.array(ids)[:, None])[:, None], 0, as_numpy(x))


def assert_is_layer(got, x, cells, ids, weight, bias, scale, activate, precision="tf32x3"):
    rows, w = remove_cells(x, cells, ids), as_numpy(weight)
    want = rows @ w.T
    # Rounding in the products is relative to the norms over all columns, not the remaining ones.
    size = np.linalg.norm(as_numpy(x), axis=-1).max() * np.linalg.norm(w, axis=-1).max()
    if scale is not None:
        want, size = want * as_numpy(scale), size * np.abs(as_numpy(scale)).max()
    if bias is not None:
        want = want + as_numpy(bias)
    if activate != "none":
        want = np.clip(want, 0, 6 if activate == "relu6" else None)
    assert got.dtype == x.dtype
    want = want.reshape(-1, len(w))
    assert_close(got, want, Tol(max(ROUNDING[str(x.dtype)[6:]], 1e-6), GRAM[precision] * size))


@st.composite
def layers(draw):
    """Draw x, cells and a selection of them, and a layer's weight, bias and scale."""
    x = draw(
        representations(
            p=st.integers(1, 90),
            kinds=("gaussian", "relu"),
            dtypes=("float32", "float16", "bfloat16"),
            layouts=("C", "F", "steps"),
        )
    ).torch()
    outs = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    weight, scale, bias = (
        torch.randn(shape, generator=generator) for shape in ((outs, x.shape[1]), outs, outs)
    )
    cells, n_cells = draw(labels(x.shape[1]))
    ids = draw(st.lists(st.integers(0, n_cells), min_size=1, max_size=6, unique=True))
    return (
        (x, weight.to(x.dtype)),
        bias.to(x.dtype) if draw(st.booleans()) else None,
        scale if draw(st.booleans()) else None,
        cells,
        ids,
    )


@given(layers(), st.sampled_from(["none", "relu", "relu6"]), st.sampled_from(LAUNCHES))
def test_layers(device, layer, activate, launch):
    tensors, bias, scale, cells, ids = layer
    x, weight = (pad_with_nan(t.to(device)) for t in tensors)
    bias, scale = (None if t is None else pad_with_nan(t.to(device)) for t in (bias, scale))
    got = linear_cells(x, cells, weight, bias, ids, scale=scale, activate=activate, launch=launch)
    assert_is_layer(got, x, cells, ids, weight, bias, scale, activate)


@pytest.mark.parametrize("precision", _launch.PRECISIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_settings(device, precision, dtype):
    x = Representation(3, 700, dtype=dtype).torch().to(device)
    weight = Representation(70, 700, dtype=dtype, seed=1).torch().to(device)
    cells = np.arange(700) % 3 // 2
    got = linear_cells(x, cells, weight, None, [1, 0], precision=precision)
    assert_is_layer(got, x, cells, [1, 0], weight, None, None, "none", precision)


def test_a_dominant_cell_costs_the_others_no_digits(device):
    x = Representation(4, 60, dtype="float32").torch().to(device)
    weight = Representation(16, 60, dtype="float32", seed=1).torch().to(device)
    cells = np.arange(60) % 3
    heavy = torch.where(torch.from_numpy(cells == 1).to(device), x * 1e6, x)
    got = linear_cells(heavy, cells, weight, None, [1], launch=LAUNCHES[0])
    assert_is_layer(got, x, cells, [1], weight, None, None, "none")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from NumPy, in the interpreter
def test_nan_and_infinity_stay_in_their_cells(device):
    x = torch.ones(3, 40, device=device)
    x[0, 0], x[1, 3], x[1, 6] = torch.nan, torch.inf, -torch.inf
    cells = (np.arange(40) + 1) % 3  # columns 0, 3 and 6 are in cell 1
    cells[6] = 2
    weight = torch.ones(5, 40, device=device)
    got = linear_cells(x, cells, weight, None, [0, 1, 2, 9], launch=LAUNCHES[0])
    nan, inf, sizes = torch.nan, torch.inf, np.bincount(cells)
    rest = 40 - sizes
    want = [[nan, nan, rest[0]], [rest[1], -inf, rest[1]], [nan, inf, rest[2]], [nan, nan, 40]]
    np.testing.assert_array_equal(as_numpy(got), np.repeat(np.reshape(want, (12, 1)), 5, 1))


def test_one_launch_for_all_cells(device, launches):
    x = torch.randn(20, 100, device=device)
    cells = np.repeat([3, 0, 1, 2], [20, 20, 40, 20])
    weight = torch.randn(33, 100, device=device)
    linear_cells(x, cells, weight, None, [3, 1], launch=LAUNCHES[0])
    # 2 items for cell 3, 3 for cell 1 and 3 for the rest; 33 outputs and 20 stimuli in tiles of 16
    assert [launch["grid"] for launch in launches] == [(8, 3, 2), (21,)]


@given(st.data(), st.integers(1, 9))
def test_items(data, chunk):
    cells, n_cells = data.draw(labels(data.draw(st.integers(1, 40))))
    ids = np.array(data.draw(st.lists(st.integers(0, n_cells + 1), min_size=1, unique=True)))
    order, items, ranges = _plan_items(cells, ids, chunk)
    assert sorted(order) == list(range(len(cells)))
    assert items[0, 0] == 0
    assert items[-1, 1] == len(cells)
    assert (items[1:, 0] == items[:-1, 1]).all()
    assert (np.diff(items) > 0).all()
    assert (np.diff(items) <= chunk).all()
    for i, (first, last) in zip(ids, ranges, strict=True):
        columns = [c for a, b in items[first:last] for c in order[a:b]]
        assert sorted(columns) == list(np.flatnonzero(cells == i))


def test_no_cells(device):
    x, weight = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)
    assert linear_cells(x, np.zeros(3, int), weight, None, []).shape == (0, 4)


def test_launch_settings():
    for n in (1, 50, 500):
        for dtype in (torch.float32, torch.bfloat16):
            conf = choose(n, dtype, "tf32x3", (9, 0))
            assert conf.chunk <= 1024
            assert conf.chunk % conf.depth == 0
            assert conf.rows >= min(n, 64)
    assert floor(50, 96, 24, 16, torch.float16, "tf32") == _launch.Floor(
        2 * (50 * 96 + 96 * 24 + 16 * 50 * 24), 2 * 50 * 96 * 24, "tf32"
    )


def test_compile_cases():
    assert [case.name for case in AOT_CASES] == ["9216 to 4096, float32", "9216 to 4096, bfloat16"]
