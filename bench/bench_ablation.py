"""Every metric of every ablation of one representation, from one pass over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.bench_gram import plain
from bench.bench_spectral import by_svd
from bench.common.inputs import (
    DEVICE,
    DTYPES,
    SHAPES,
    as_distances,
    cells,
    one,
    products,
    reference,
    size,
)  # fmt: skip

PAPER = ("cka", "procrustes", "pwcca", "cca", "cca_squared")
FIVE = "CKA, Procrustes, PWCCA, mean and mean squared CCA"


@pytest.mark.parametrize("n_cells", [100, 1000])
def test_debiased_cka(timed, n_cells):
    """AlexNet's first layer at 224 pixels, the 50 images of a class."""
    n, p = SHAPES[0]
    labels, some = cells(p, n_cells), [0, n_cells // 2]
    cka = reference("cka", debiased=True)

    def definition(x: Tensor) -> dict[str, list[float]]:
        kept = [torch.from_numpy(labels != c).to(x.device) for c in some]
        return {"cka_debiased": [1 - cka(x, x * mask) for mask in kept]}

    def check(got: Tensor, want: list[float]) -> None:
        as_distances("ablation_distances", torch.float32)(got[some], want)

    timed(
        "ablation_distances",
        one(n, p, torch.float32),
        options={"cells": labels, "metrics": ["cka_debiased"]},
        oracle=definition,
        check=check,
        what="debiased CKA",
        shape={"n": n, "p": p, "C": n_cells},
        bytes=size(n, p, torch.float32),
        operations={products("ablation_distances", torch.float32): n * (n + 1) * p},
    )


@pytest.mark.parametrize(
    ("n", "p", "dtype"),
    [*((*SHAPES[0], dtype) for dtype in DTYPES), (*SHAPES[1], torch.float32)],
    ids=str,
)
def test_paper_metrics(timed, n, p, dtype):
    """One Gram, and PWCCA's products of every cell's variates with the neurons."""
    n_cells, cell = 16, 3
    labels = cells(p, n_cells)
    # On a CPU the Gram is float64, and the second pass float32 unless the activations aren't.
    reading = products("ablation_distances", dtype)
    weighing = "ieee" if DEVICE == "cpu" and dtype != torch.float64 else reading
    close = as_distances("ablation_distances", dtype)

    def definition(x: Tensor) -> dict[str, Tensor]:
        whole, part = plain(x), plain(x[:, torch.from_numpy(labels == cell).to(x.device)])
        rows = x.double()
        rows -= rows.mean(0)
        return by_svd(whole, part[None], PAPER, lambda h: (h @ rows).abs().sum(-1))

    operations = {reading: n * (n + 1) * p}
    operations[weighing] = operations.get(weighing, 0) + 2 * n_cells * (n - 1) * n * p
    timed(
        "ablation_distances",
        one(n, p, dtype),
        options={"cells": labels, "metrics": PAPER},
        oracle=definition,
        check=lambda got, want: close(got[cell : cell + 1], want),
        what=FIVE,
        shape={"n": n, "p": p, "C": n_cells},
        dtype=dtype,
        bytes=2 * size(n, p, dtype),
        operations=operations,
    )
