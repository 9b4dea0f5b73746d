"""Gram matrices: of all neurons, and one for each cell of neurons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.common.inputs import DTYPES, SHAPES, as_grams, cells, one, products, reference, size

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def plain(x: Tensor) -> Tensor:
    c = x.double()
    c -= c.mean(0)
    return c @ c.mT


def plain_cells(x: Tensor, labels: np.ndarray) -> Tensor:
    tables = [t == c for t in np.atleast_2d(labels) for c in range(t.max() + 1)]
    grams = torch.stack([plain(x[:, torch.from_numpy(own).to(x.device)]) for own in tables])
    return grams.view(*labels.shape[:-1], -1, len(x), len(x))


@by_dtype
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_centered_gram(timed, n, p, dtype):
    timed(
        "centered_gram",
        rk.centered_gram,
        one(n, p, dtype),
        oracle=plain,
        check=as_grams("centered_gram", dtype),
        shape={"n": n, "p": p},
        dtype=dtype,
        bytes=size(n, p, dtype) + 8 * n**2,
        # One of two symmetric elements.
        operations={products("centered_gram", dtype): n * (n + 1) * p},
    )


def test_rbf(timed):
    n, p, dtype = 200, 10_000, torch.float32
    timed(
        "centered_gram",
        lambda x: rk.centered_gram(x, kernel="rbf"),
        one(n, p, dtype),
        oracle=reference("centered_gram", kernel="rbf"),
        check=as_grams("centered_gram", dtype),
        what="RBF",
        shape={"n": n, "p": p},
        dtype=dtype,
        bytes=size(n, p, dtype) + 8 * n**2,
        operations={products("centered_gram", dtype): n * (n + 1) * p},
    )


def cell_grams(timed, n, p, dtype, n_cells, partitions=1):
    tables = np.stack([cells(p, n_cells, seed) for seed in range(partitions)])
    labels = tables[0] if partitions == 1 else tables
    timed(
        "cell_grams",
        lambda x: rk.cell_grams(x, labels),
        one(n, p, dtype),
        oracle=lambda x: plain_cells(x, labels),
        check=as_grams("cell_grams", dtype),
        shape={"n": n, "p": p, "C": n_cells} | ({"T": partitions} if partitions > 1 else {}),
        dtype=dtype,
        bytes=size(n, p, dtype) + 8 * partitions * n_cells * n**2,
        operations={products("cell_grams", dtype): partitions * n * (n + 1) * p},
    )


@by_dtype
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_cell_grams(timed, n, p, dtype):
    cell_grams(timed, n, p, dtype, 16)


@pytest.mark.parametrize("n_cells", [100, 1000])
def test_many_cells(timed, n_cells):
    cell_grams(timed, *SHAPES[0], torch.float32, n_cells)


def test_partitions(timed):
    """Of several target classes, from one read of the activations."""
    cell_grams(timed, *SHAPES[0], torch.float32, 16, partitions=4)
