"""Every metric for every ablation of one representation, from a single pass over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.bench_gram import compute_gram
from bench.bench_spectral import compute_by_svd
from bench.common.inputs import (
    DEVICE,
    DTYPES,
    SHAPES,
    assign_cells,
    check_distances,
    count_bytes,
    get_precision,
    make_one,
    make_reference,
)  # fmt: skip
from bench.conftest import Timer

PAPER = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
FIVE = "CKA, Procrustes, PWCCA, mean and mean squared CCA"


@pytest.mark.parametrize("n_cells", [100, 1000])
def test_debiased_cka(timed: Timer, n_cells: int) -> None:
    """AlexNet's first layer at 224 pixels, for the 50 images of a class."""
    n, p = SHAPES[0]
    labels, checked = assign_cells(p, n_cells), [0, n_cells // 2]
    cka = make_reference("cka", debiased=True)

    def definition(x: Tensor) -> dict[str, list[float]]:
        masks = [torch.from_numpy(labels != c).to(x.device) for c in checked]
        return {"cka_debiased": [1 - cka(x, x * mask) for mask in masks]}

    def check(got: Tensor, want: list[float]) -> None:
        check_distances("ablation_distances", torch.float32)(got[checked], want)

    timed(
        "ablation_distances",
        make_one(n, p, torch.float32),
        options={"cells": labels, "metrics": ["cka_debiased"]},
        oracle=definition,
        check=check,
        label="debiased CKA",
        shape={"n": n, "p": p, "C": n_cells},
        bytes=count_bytes(n, p, torch.float32),
        operations={get_precision("ablation_distances", torch.float32): n * (n + 1) * p},
    )


@pytest.mark.parametrize(
    ("n", "p", "dtype"),
    [*((*SHAPES[0], dtype) for dtype in DTYPES), (*SHAPES[1], torch.float32)],
    ids=str,
)
def test_paper_metrics(timed: Timer, n: int, p: int, dtype: torch.dtype) -> None:
    """One Gram, and the products of every cell's variates with the neurons for PWCCA."""
    n_cells, cell = 16, 3
    labels = assign_cells(p, n_cells)
    # On a CPU the Gram is float64; the second pass is float32, or float64 for float64 activations.
    gram_precision = get_precision("ablation_distances", dtype)
    low = DEVICE == "cpu" and dtype != torch.float64
    weight_precision = "ieee" if low else gram_precision
    assert_distances = check_distances("ablation_distances", dtype)

    def definition(x: Tensor) -> dict[str, Tensor]:
        in_cell = torch.from_numpy(labels == cell).to(x.device)
        whole, part = compute_gram(x), compute_gram(x[:, in_cell])
        rows = x.double()
        rows -= rows.mean(0)
        return compute_by_svd(whole, part[None], PAPER, lambda h: (h @ rows).abs().sum(-1))

    operations = {gram_precision: n * (n + 1) * p}
    weights = 2 * n_cells * (n - 1) * n * p
    operations[weight_precision] = operations.get(weight_precision, 0) + weights
    timed(
        "ablation_distances",
        make_one(n, p, dtype),
        options={"cells": labels, "metrics": PAPER},
        oracle=definition,
        check=lambda got, want: assert_distances(got[cell : cell + 1], want),
        label=FIVE,
        shape={"n": n, "p": p, "C": n_cells},
        dtype=dtype,
        bytes=2 * count_bytes(n, p, dtype),
        operations=operations,
    )
