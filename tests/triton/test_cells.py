"""Class means and the selectivity grid against their definitions, ties included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _draw import SEEDS, TORCH_LAYOUTS, Representation, classes, representations
from _guard import pad_with_nan
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.tolerances import SAME, assert_close
from repsim_kernels.kernels.torch import cells as torch_cells
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.cells import (
    Launch,
    choose,
    class_means,
    selectivity_grid,
    unsupported,
)
from repsim_kernels.reference import cells as reference_cells

DTYPES = ("float32", "float16", "bfloat16")
# One class per program and a product of several, in tiles smaller than the drawn sizes.
LAUNCHES = (None, Launch(1, 16, 4, 1), Launch(8, 16, 16, 1), Launch(16, 16, 16, 1))
GRIDS = ((4, 4), (1, 3), (5, 1), (2, 7))


def inputs(**options: Any) -> st.SearchStrategy[Representation]:
    sizes = {"n": st.integers(2, 40), "p": st.integers(1, 40)}
    return representations(dtypes=DTYPES, layouts=TORCH_LAYOUTS, **sizes, **options)


def as_integers(x: Representation) -> np.ndarray:
    """Return the values times a power of two as Python integers."""
    return np.vectorize(int, otypes=[object])(x.values() * 2.0**60)


def grid_by_definition(x: np.ndarray, is_target: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Compute the cells of integers x (n, p) without rounding; ties are ordered by index."""
    a = x[is_target].sum(0) * int((~is_target).sum())
    b = x[~is_target].sum(0) * int(is_target.sum())
    cells = np.empty(x.shape[1], dtype=np.int64)
    for strip, neurons in enumerate(split_equally(a - b, np.arange(x.shape[1]), grid[0])):
        for part, cell in enumerate(split_equally(a + b, np.sort(neurons), grid[1])):
            cells[cell] = strip * grid[1] + part
    return cells


def split_equally(values: np.ndarray, neurons: np.ndarray, count: int) -> list[np.ndarray]:
    """Sort the neurons by value and cut them into parts of equal count."""
    order = np.array(sorted(neurons, key=lambda j: values[j]), dtype=np.int64)
    part = np.arange(len(order)) * count // max(len(order), 1)
    return [order[part == k] for k in range(count)]


@given(data=st.data())
def test_class_means(data, device):
    x = data.draw(inputs())
    labels = data.draw(classes(x.n, max_classes=40))
    k = labels.max() + 1
    launch = data.draw(st.sampled_from(LAUNCHES))
    got = class_means(pad_with_nan(x.torch().to(device)), labels=labels, n_classes=k, launch=launch)
    assert got.dtype == torch.float64
    assert got.is_contiguous()
    assert_close(got, [x.values()[labels == c].mean(0) for c in range(k)], SAME)


@given(data=st.data())
def test_sums_are_exact_if_float64_can_hold_them(data, device):
    x = data.draw(inputs(kinds=("low rank", "duplicate rows")))
    labels = data.draw(classes(x.n, max_classes=40))
    k = labels.max() + 1
    launch = data.draw(st.sampled_from(LAUNCHES))
    got = class_means(pad_with_nan(x.torch().to(device)), labels=labels, n_classes=k, launch=launch)
    exact = [as_integers(x)[labels == c].sum(0) for c in range(k)]
    counts = np.bincount(labels)[:, None]
    want = np.array(exact).astype(np.float64) / 2.0**60 / counts
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@given(data=st.data())
def test_selectivity_grid(data, device):
    x = data.draw(inputs())
    labels = data.draw(classes(x.n)) * 3 + 5
    grid = data.draw(st.sampled_from(GRIDS))
    launch = data.draw(st.sampled_from(LAUNCHES))
    options = {"labels": labels, "target": int(labels[0]), "grid": grid}
    activation = pad_with_nan(x.torch().to(device))
    got = selectivity_grid(activation, **options, edges="equal", launch=launch)
    assert got.dtype == torch.int64
    want = grid_by_definition(as_integers(x), labels == labels[0], grid)
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@given(data=st.data())
def test_inclusive_edges(data, device):
    """Integers after a ReLU have exact sums, and many neurons are dead or tied."""
    activation = data.draw(inputs(kinds=("low rank",))).torch().clamp_(0, 2)
    labels = data.draw(classes(len(activation)))
    options = {"labels": labels, "target": 1, "grid": data.draw(st.sampled_from(GRIDS))}
    launch = data.draw(st.sampled_from(LAUNCHES))
    got = selectivity_grid(
        pad_with_nan(activation.to(device)), **options, edges="inclusive", launch=launch
    )
    assert got.dtype == torch.bool
    want = reference_cells.selectivity_grid(
        activation.double().numpy(), **options, edges="inclusive"
    )
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@settings(max_examples=15)
@given(
    x=inputs(kinds=("gaussian", "relu")),
    seed=SEEDS,
    grid=st.sampled_from(GRIDS),
    launch=st.sampled_from(LAUNCHES),
    edges=st.sampled_from(["equal", "inclusive"]),
)
def test_selectivity_grid_matches_torch(x, seed, grid, launch, edges, device):
    """Includes ties of dead neurons; other ties depend on the torch backend's rounding."""
    labels = np.random.default_rng(seed).permutation(np.arange(x.n) % 2)
    options = {"labels": labels, "target": 1, "grid": grid, "edges": edges}
    activation = pad_with_nan(x.torch().to(device))
    activation[:, ::3] = 0
    want = torch_cells.selectivity_grid(activation, **options)
    got = selectivity_grid(activation, **options, launch=launch)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("transposed", [False, True])
def test_neurons_that_differ_by_a_constant_are_tied(launch, transposed, device):
    """The same values reordered plus a constant have equal selectivity, though no mean is exact."""
    rng = np.random.default_rng(0)
    is_target = rng.permutation(np.arange(100) < 33)
    values = np.maximum(rng.standard_normal(100), 0).astype(np.float16)
    constants = rng.integers(0, 50, 40)
    x = np.empty((100, 40), dtype=np.float32)
    for j in range(40):
        x[is_target, j] = rng.permutation(values[is_target]) + np.float32(constants[j])
        x[~is_target, j] = rng.permutation(values[~is_target]) + np.float32(constants[j])
    memory = torch.from_numpy(x.T.copy().T if transposed else x).to(device)
    options = {"target": 1, "grid": (2, 4), "edges": "equal"}
    got = selectivity_grid(memory, labels=is_target.astype(np.int64), **options, launch=launch)
    want = np.empty(40, dtype=np.int64)
    want[np.argsort(constants[:20], kind="stable")] = np.arange(20) // 5
    want[20 + np.argsort(constants[20:], kind="stable")] = 4 + np.arange(20) // 5
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_constant_neuron_has_no_selectivity(launch, device):
    x = np.full((10, 3), 0.1, dtype=np.float32)
    x[:, 1] = 1000.7
    x[3, 2] += 1e-6
    labels = np.array([0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    options = {"target": 1, "grid": (3, 1), "edges": "equal"}
    got = selectivity_grid(torch.from_numpy(x).to(device), labels=labels, **options, launch=launch)
    np.testing.assert_array_equal(got.cpu().numpy(), [0, 1, 2])


@pytest.mark.parametrize(
    ("k", "transposed", "program"),
    [(2, False, (1, True)), (2, True, (8, False)), (10, True, (16, False)), (20, True, (16, True))],
)
def test_up_to_16_classes_are_read_in_order(k, transposed, program, device, monkeypatch):
    seen = []
    start = _launch.launch

    def spy(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        seen.append((options["CLASSES"], options["GATHER"]))
        start(kernel, grid, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", spy)
    x = Representation(41, 70, layout="F" if transposed else "C", dtype="float32", seed=k)
    labels = np.random.default_rng(k).permutation(np.arange(41) % k)
    got = class_means(pad_with_nan(x.torch().to(device)), labels=labels, n_classes=k)
    assert seen == [program]
    assert_close(got, [x.values()[labels == c].mean(0) for c in range(k)], SAME)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_class_without_stimuli_has_mean_nan(launch, device):
    x = Representation(6, 5, dtype="float32")
    labels = np.array([0, 2, 2, 0, 4, 4])
    with np.errstate(invalid="ignore"):  # of the interpreter
        got = class_means(x.torch().to(device), labels=labels, n_classes=7, launch=launch)
    want = np.full((7, 5), np.nan)
    for c in (0, 2, 4):
        want[c] = x.values()[labels == c].mean(0)
    assert_close(got, want, SAME, nan=True)


@pytest.mark.parametrize("strides", [(2**30 + 1, 1), (1, 2**30 + 1)])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_offsets_beyond_32_bits(strides, launch, device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2**32 + 16, dtype=torch.float16, device=device)
    x = memory.as_strided((5, 5), strides)
    x.copy_(torch.arange(25.0).view(5, 5))
    got = class_means(x, labels=np.array([1, 0, 0, 0, 1]), n_classes=2, launch=launch)
    np.testing.assert_array_equal(got.cpu().numpy(), [[10, 11, 12, 13, 14]] * 2)


def test_tiles_fill_whole_warps():
    for n, k in ((2, 2), (50, 10), (500, 10), (500, 2), (1000, 1000)):
        for dtype in (torch.float32, torch.bfloat16):
            for by_neuron in (False, True):
                launch = choose(n, 1000, k, by_neuron, dtype, (9, 0))
                values, rest = divmod(launch.block_p * launch.block_n, 32 * launch.num_warps)
                assert rest == 0
                assert values <= 32


def test_unsupported_dtypes():
    assert unsupported(torch.zeros(2, 3, dtype=torch.float64)) is not None
    if _launch.is_interpreted():
        assert unsupported(torch.zeros(2, 3)) is None
