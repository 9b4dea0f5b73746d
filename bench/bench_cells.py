"""Class means, cells of neurons by selectivity and magnitude, and sparse cells."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.common.inputs import (
    DTYPES,
    SHAPES,
    check_distances,
    count_bytes,
    get_precision,
    make_one,
    make_reference,
)  # fmt: skip
from bench.common.tolerances import SAME, assert_close
from bench.conftest import Timer

CLASSES = 10
by_shape = pytest.mark.parametrize(("n", "p"), SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_shape
def test_class_means(timed: Timer, n: int, p: int, dtype: torch.dtype) -> None:
    timed(
        "class_means",
        make_one(n, p, dtype),
        options={"labels": np.arange(n) % CLASSES},
        oracle=lambda x: torch.stack([x[k::CLASSES].double().mean(0) for k in range(CLASSES)]),
        check=partial(assert_close, tol=SAME),
        shape={"n": n, "p": p, "k": CLASSES},
        dtype=dtype,
        bytes=count_bytes(n, p, dtype) + 8 * CLASSES * p,
    )


@by_shape
@pytest.mark.parametrize("edges", ["equal", "inclusive"])
def test_selectivity_grid(timed: Timer, edges: str, n: int, p: int) -> None:
    """Rounding may move one neuron in ten thousand to a neighbouring cell."""

    def check(got: Tensor, want: np.ndarray) -> None:
        assert got.shape == want.shape
        assert (np.asarray(got.cpu()) != want).mean() <= 1e-4

    timed(
        "selectivity_grid",
        make_one(n, p, torch.float32),
        options={"labels": np.arange(n) % CLASSES, "target": 3, "edges": edges},
        check=check,
        label=f"{edges} edges",
        shape={"n": n, "p": p, "C": 16},
        bytes=count_bytes(n, p, torch.float32) + (8 * p if edges == "equal" else 16 * p),
    )


def test_sparse_cells(timed: Timer) -> None:
    """100,000 overlapping cells of 100 of 50,000 neurons, in chunks whose Grams take 1 GiB.

    Predicted before it was measured, on two cores: 1.0e11 operations for the lower triangles, n (n
    + 1) for each neuron of each cell; 1.2e11 with panels of 24 columns, 2 to 5 s. 4 GB of columns
    are gathered, and become 8 GB of float64 that are written and read twice; 5 GB of Grams are
    written and read: about 35 GB, 3 to 5 s. So 6 to 10 s. The Grams of all cells would be 8 GB;
    those of a chunk are 0.6 of the budget of 1 GiB, as one triangle is stored. Each of the eight
    chunks reads x once: 160 MB.
    """
    n, p, n_cells, size = 100, 50_000, 100_000, 100
    drawn = np.random.default_rng(1).integers(0, p // size, (n_cells, size))
    neurons = drawn + np.arange(size) * (p // size)  # one of every 500
    checked = [0, n_cells // 2]
    cka = make_reference("cka")

    def definition(x: Tensor) -> dict[str, list[float]]:
        masks = torch.ones(len(checked), p, dtype=x.dtype, device=x.device)
        for mask, cell in zip(masks, neurons[checked], strict=True):
            mask[torch.from_numpy(cell).to(x.device)] = 0
        return {"cka": [1 - cka(x, x * mask) for mask in masks]}

    def check(got: Tensor, want: list[float]) -> None:
        check_distances("ablation_distances", torch.float32)(got[checked], want)

    timed(
        "ablation_distances",
        make_one(n, p, torch.float32),
        options={
            "cells": (np.arange(n_cells + 1) * size, neurons.ravel()),
            "metrics": ["cka"],
        },
        oracle=definition,
        check=check,
        label="CKA, sparse cells",
        shape={"n": n, "p": p, "C": n_cells},
        bytes=count_bytes(n, p, torch.float32),
        operations={
            get_precision("ablation_distances", torch.float32): n * (n + 1) * n_cells * size
        },
    )
