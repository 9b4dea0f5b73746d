"""All pairs of a network's layers: each Gram and each spectrum is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.inputs import (
    check_distances,
    count_bytes,
    draw_activations,
    get_cka_precision,
    make_reference,
)
from bench.conftest import Timer

LAYERS, N, P = 12, 100, 5_000
METRICS: dict[str, dict[str, Any]] = {
    "cka": {},
    "cca": {"ridge": 0.1},
    "svcca": {},
    "pwcca": {"ridge": 0.1},
    "procrustes": {},
    "rsa": {},
}


def make_layers(g: Generator) -> tuple[Tensor, ...]:
    """Return layers that each share features with the previous one."""
    layers = [draw_activations(g, N, P)]
    for _ in range(LAYERS - 1):
        layers.append(layers[-1].roll(1, 1) / 2 + draw_activations(g, N, P))
    return tuple(layers)


@pytest.mark.parametrize("metric", METRICS)
def test_pairwise(timed: Timer, metric: str) -> None:
    """Check a few pairs; two differ only in order, since PWCCA is not symmetric."""
    checked = [(0, 0), (0, 1), (1, 0), (2, LAYERS - 1)]
    grams = {get_cka_precision(torch.float32): LAYERS * N * (N + 1) * P}
    definition = make_reference(metric, **METRICS[metric])

    def check(got: Tensor, want: list[float]) -> None:
        values = torch.stack([got[i, j] for i, j in checked])
        check_distances("pairwise", torch.float32)(values, want)

    timed(
        "pairwise",
        make_layers,
        call=lambda *xs: rk.pairwise(xs, metric=metric, **METRICS[metric]),
        oracle=lambda *xs: [float(definition(xs[i], xs[j])) for i, j in checked],
        check=check,
        label=metric,
        shape={"L": LAYERS, "n": N, "p": P},
        bytes=LAYERS * count_bytes(N, P, torch.float32),
        operations=grams if metric == "cka" else None,
    )
