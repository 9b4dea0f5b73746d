"""All pairs of a network's layers: each Gram and each spectrum is made once."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.inputs import activations, as_distances, products, reference, size

LAYERS, N, P = 12, 100, 5_000
METRICS = {
    "cka": {},
    "cca": {"ridge": 0.1},
    "svcca": {},
    "pwcca": {"ridge": 0.1},
    "procrustes": {},
    "rsa": {},
}


def layers(g: Generator) -> tuple[Tensor, ...]:
    """Each has something of the one before."""
    found = [activations(g, N, P)]
    for _ in range(LAYERS - 1):
        found.append(found[-1].roll(1, 1) / 2 + activations(g, N, P))
    return tuple(found)


@pytest.mark.parametrize("metric", METRICS)
def test_pairwise(timed, metric):
    """The definitions, of some pairs: PWCCA is not symmetric."""
    some = [(0, 0), (0, 1), (1, 0), (2, LAYERS - 1)]
    grams = {products("pairwise", torch.float32): LAYERS * N * (N + 1) * P}
    definition = reference(metric, **METRICS[metric])

    def check(got: Tensor, want: list[float]) -> None:
        as_distances("pairwise", torch.float32)(torch.stack([got[i, j] for i, j in some]), want)

    timed(
        "pairwise",
        layers,
        call=lambda *xs: rk.pairwise(xs, metric=metric, **METRICS[metric]),
        oracle=lambda *xs: [float(definition(xs[i], xs[j])) for i, j in some],
        check=check,
        what=metric,
        shape={"L": LAYERS, "n": N, "p": P},
        bytes=LAYERS * size(N, P, torch.float32),
        operations=grams if metric == "cka" else None,
    )
