"""Class means, and cells of neurons by selectivity and magnitude: one read of the activations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from bench.common.inputs import DTYPES, SHAPES, one, reference, size
from bench.common.tolerances import SAME, assert_close

CLASSES = 10
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_shape = pytest.mark.parametrize(("n", "p"), SHAPES)


@by_dtype
@by_shape
def test_class_means(timed, n, p, dtype):
    labels = np.arange(n) % CLASSES
    timed(
        "class_means",
        lambda x: rk.class_means(x, labels),
        one(n, p, dtype),
        oracle=lambda x: torch.stack([x[k::CLASSES].double().mean(0) for k in range(CLASSES)]),
        check=partial(assert_close, tol=SAME),
        shape={"n": n, "p": p, "k": CLASSES},
        dtype=dtype,
        bytes=size(n, p, dtype) + 8 * CLASSES * p,
    )


@by_shape
@pytest.mark.parametrize("edges", ["equal", "inclusive"])
def test_selectivity_grid(timed, edges, n, p):
    """Neurons whose order rounding decides may lie in the next cell: one in ten thousand."""
    labels = np.arange(n) % CLASSES

    def check(got, want):
        assert got.shape == want.shape
        assert (np.asarray(got.cpu()) != want).mean() <= 1e-4

    timed(
        "selectivity_grid",
        lambda x: rk.selectivity_grid(x, labels, 3, edges=edges),
        one(n, p, torch.float32),
        oracle=lambda x: reference("selectivity_grid", labels=labels, target=3, edges=edges)(x),
        check=check,
        what=f"{edges} edges",
        shape={"n": n, "p": p, "C": 16},
        bytes=size(n, p, torch.float32) + (8 * p if edges == "equal" else 16 * p),
    )
