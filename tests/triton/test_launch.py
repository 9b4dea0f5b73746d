"""Every launcher's grid is within CUDA's limits, and the launch function refuses larger ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repsim_kernels.kernels.triton import (
    _launch,
    cca,
    cells,
    gram,
    layer_grams,
    linear_cells,
    logistic,
    masked_copies,
    masked_pointwise,
    riccati,
)

META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def integers(size: int) -> torch.Tensor:
    return empty(size, dtype=torch.int64)


def labels(p: int, n_cells: int) -> np.ndarray:
    return np.arange(p) % n_cells


def fit(n: int, fits: int, targets: int) -> None:
    columns = torch.empty(fits, 2, dtype=torch.int64, device="meta")
    signs = np.arange(n) % 2 == np.arange(targets)[:, None] % 2
    logistic._launch_fits(empty(8, n), columns, n, signs, 1, 1, 1, None, "tf32x3", None)


def mask_linear(n: int, p: int, outs: int, n_cells: int) -> None:
    layer = empty(outs, p)
    masked_pointwise.masked_pointwise(empty(n, p), integers(p), integers(n_cells), layer)


def multiply_layers(n: int, widths: list[int]) -> None:
    grams = empty(len(widths), n * (n + 3) // 2, dtype=torch.float64)
    xs = [empty(n, p) for p in widths]
    sums = empty(len(widths), n, dtype=torch.float64)
    layer_grams._multiply(grams, sums, xs, list(range(len(xs))), "float32", None)


def multiply_grams(n: int, rows: int, cols: int) -> None:
    h, k = (empty(count, n * (n + 3) // 2) for count in (rows, cols))
    layer_grams.gram_products(h, k, n=n, debiased=True)


def step(batch: int, m: int) -> None:
    p, f, o = (empty(batch, m, m, dtype=torch.float64) for _ in range(3))
    v = empty(m, dtype=torch.float64)
    diagonal, d = (empty(batch, m, dtype=torch.float64) for _ in range(2))
    riccati.step(p, f, diagonal, v, o, d)


COUNT = 100_000
LARGE = {
    "gram of 23,105 stimuli, the fewest with too many tiles for y": lambda: gram.centered_gram(
        empty(23_105, 4), kernel="linear", sigma=None
    ),
    "gram of 50,000 stimuli": lambda: gram.centered_gram(
        empty(50_000, 1_200_000), kernel="linear", sigma=None
    ),
    "grams of 70,000 matrices": lambda: gram.centered_gram(
        empty(70_000, 100, 3), kernel="linear", sigma=None
    ),
    "cells of 50,000 stimuli": lambda: gram.cell_statistics(
        empty(50_000, 300), labels(300, 3), 3, shifts=True
    ),
    "100,000 cells": lambda: gram.cell_statistics(
        empty(500, 1_200_000), labels(1_200_000, COUNT), COUNT, shifts=True
    ),
    "200 layers of 10,000 stimuli": lambda: multiply_layers(10_000, [1_000_000] * 200),
    "products of 70,000 layers": lambda: multiply_grams(4, 70_000, 70_000),
    "class means of 100,000 classes": lambda: cells.class_means(
        empty(1_200_000, COUNT).mT, labels=labels(COUNT, COUNT), n_classes=COUNT
    ),
    "class means by stimuli": lambda: cells.class_means(
        empty(COUNT, 1_200_000), labels=labels(COUNT, COUNT), n_classes=COUNT
    ),
    "directions": lambda: cca.variate_weights(empty(COUNT * 499, 500), empty(500, 1_200_000)),
    "masked copies": lambda: masked_copies.ablate(
        empty(50_000, 1_200_000),
        integers(1_200_000),
        integers(COUNT),
    ),
    "masked copies of one stimulus": lambda: masked_copies.ablate(
        empty(1, 3), integers(3), integers(COUNT)
    ),
    "masked linear layer": lambda: mask_linear(50, 9216, 4096, COUNT),
    "linear layer of cells": lambda: linear_cells.linear_cells(
        empty(50_000, 1_200_000),
        labels(1_200_000, COUNT),
        empty(4096, 1_200_000),
        None,
        range(COUNT),
    ),
    "Riccati steps": lambda: step(70_000, 500),
    "logistic fits": lambda: fit(52, 1_000, 70_000),
}


@pytest.mark.parametrize("name", LARGE)
def test_grids_of_large_shapes_are_within_limits(monkeypatch, name):
    """The launchers run on meta tensors, and only their grids are checked."""
    grids = []

    def launch(kernel, grid, *arguments, **options):
        _launch.check_grid(kernel.fn.__name__, grid)
        grids.append(grid)

    monkeypatch.setattr(_launch, "launch", launch)
    monkeypatch.setattr(_launch, "capability", lambda device: (9, 0))
    LARGE[name]()
    assert grids
    assert all(min(grid) > 0 for grid in grids)


class Kernel(SimpleNamespace):
    """A kernel that records its grids."""

    def __init__(self) -> None:
        super().__init__(fn=SimpleNamespace(__name__="_stub_kernel"), grids=[])

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.grids.append(grid)


@pytest.mark.parametrize(
    "grid", [(2**31,), (1, 65_536), (1, 1, 65_536), (2**31 - 1, 65_536, 1), (-1, 1)]
)
def test_grids_beyond_the_limits_are_refused(device, grid):
    kernel = Kernel()
    with pytest.raises(ValueError, match=r"_stub_kernel: -?\d+ blocks along [xyz]; expected 0 to"):
        _launch.launch(kernel, grid, torch.zeros(1, device=device))
    assert kernel.grids == []


def test_largest_grid_starts_and_empty_grid_does_not(device):
    kernel, x = Kernel(), torch.zeros(1, device=device)
    largest = (2**31 - 1, 65_535, 65_535)
    _launch.launch(kernel, largest, x)
    _launch.launch(kernel, (4, 0), x)
    assert kernel.grids == [largest]
