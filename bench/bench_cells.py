"""Class means, and cells of neurons by selectivity and magnitude."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.common.inputs import DTYPES, SHAPES, count_bytes, make_one
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
