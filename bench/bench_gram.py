"""Gram matrices of all neurons, and of each cell of neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.common.inputs import (
    DTYPES,
    SHAPES,
    assign_cells,
    check_grams,
    count_bytes,
    get_precision,
    make_one,
    make_reference,
)
from bench.conftest import Timer


def compute_gram(x: Tensor) -> Tensor:
    c = x.double()
    c -= c.mean(0)
    return c @ c.mT


def compute_cell_grams(x: Tensor, labels: np.ndarray) -> Tensor:
    masks = [t == c for t in np.atleast_2d(labels) for c in range(t.max() + 1)]
    grams = torch.stack([compute_gram(x[:, torch.from_numpy(m).to(x.device)]) for m in masks])
    return grams.view(*labels.shape[:-1], -1, len(x), len(x))


def describe_costs(
    operation: str, n: int, p: int, dtype: torch.dtype, partitions: int = 1, grams: int = 1
) -> dict[str, Any]:
    """Return check, bytes and operations of Grams of (n, p) activations, using their symmetry."""
    return {
        "check": check_grams(operation, dtype),
        "dtype": dtype,
        "bytes": count_bytes(n, p, dtype) + 8 * grams * n**2,
        "operations": {get_precision(operation, dtype): partitions * n * (n + 1) * p},
    }


@pytest.mark.parametrize(
    ("n", "p", "dtype", "options"),
    [
        *((n, p, dtype, {}) for n, p in SHAPES for dtype in DTYPES),
        (200, 10_000, torch.float32, {"kernel": "rbf"}),
    ],
    ids=str,
)
def test_centered_gram(
    timed: Timer, n: int, p: int, dtype: torch.dtype, options: dict[str, str]
) -> None:
    timed(
        "centered_gram",
        make_one(n, p, dtype),
        options=options,
        oracle=make_reference("centered_gram", **options) if options else compute_gram,
        label="RBF" if options else "",
        shape={"n": n, "p": p},
        **describe_costs("centered_gram", n, p, dtype),
    )


@pytest.mark.parametrize(
    ("n", "p", "dtype", "n_cells", "partitions"),
    [
        *((n, p, dtype, 16, 1) for n, p in SHAPES for dtype in DTYPES),
        *((*SHAPES[0], torch.float32, n_cells, 1) for n_cells in (100, 1000)),
        (*SHAPES[0], torch.float32, 16, 4),
    ],
    ids=str,
)
def test_cell_grams(
    timed: Timer, n: int, p: int, dtype: torch.dtype, n_cells: int, partitions: int
) -> None:
    """Several partitions, as for several target classes, from a single read of the activations."""
    tables = np.stack([assign_cells(p, n_cells, seed) for seed in range(partitions)])
    labels = tables[0] if partitions == 1 else tables
    timed(
        "cell_grams",
        make_one(n, p, dtype),
        call=lambda x: rk.cell_grams(x, labels),
        oracle=lambda x: compute_cell_grams(x, labels),
        shape={"n": n, "p": p, "C": n_cells} | ({"T": partitions} if partitions > 1 else {}),
        **describe_costs("cell_grams", n, p, dtype, partitions, partitions * n_cells),
    )
