"""Confidence intervals of similarities, and noise ceilings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from bench.common.inputs import count_bytes, draw_activations, make_pair
from bench.conftest import Timer

N, P, REPEATS = 200, 10_000, 8


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": "rbf"}, {"metric": "rsa", "compare": "pearson"}],
    ids=["debiased CKA", "RBF", "RSA"],
)
def test_interval(timed: Timer, request: pytest.FixtureRequest, options: dict[str, Any]) -> None:
    timed(
        "interval",
        make_pair(N, P, torch.float32),
        options=options,
        label=request.node.callspec.id,
        shape={"n": N, "p": P},
        bytes=2 * count_bytes(N, P, torch.float32),
    )


def make_repeats(g: Generator) -> tuple[Tensor]:
    signal = draw_activations(g, N, P)
    noise = [draw_activations(g, N, P) for _ in range(REPEATS)]
    return (torch.stack([signal + one for one in noise]),)


def test_ceiling(timed: Timer) -> None:
    timed(
        "ceiling",
        make_repeats,
        shape={"r": REPEATS, "n": N, "p": P},
        bytes=REPEATS * count_bytes(N, P, torch.float32),
    )
