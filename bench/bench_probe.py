"""Decodability after each ablation: ridge and logistic regression, and the study's probe.

Iterative fits have no fixed number of operations, so none are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.bench_logistic import TARGET, N, P, draw_classes
from bench.common.inputs import check_distances, make_reference
from bench.common.tolerances import as_numpy
from bench.conftest import Timer

CELLS, FEW = 16, 1600  # few neurons, so that the Grams cost almost nothing
LABELS = np.arange(N) % 10
SCORES = ("balanced_accuracy", "margin")


def draw_few(g: torch.Generator) -> tuple[Tensor, ...]:
    return (draw_classes(g, 0.2, FEW),)


def predict_left_out(x: Tensor, inputs: Tensor, y: Tensor, ridge: float = 1.0) -> Tensor:
    """Return outputs (r, n, k) for ``inputs`` (r, n, p), each from a fit to x without its stimulus.

    Every fit is computed, from the Gram of the remaining stimuli.
    """
    gram, cross = x @ x.mT, inputs @ x.mT
    n = len(x)
    kappa = ridge * (gram.trace() - gram.mean() * n) / n
    outputs = []
    for i in range(n):
        rest = torch.arange(n, device=x.device) != i
        k = gram[rest][:, rest]
        mean = k.mean(0)
        centred = k - mean - mean[:, None] + mean.mean()
        centred.diagonal().add_(kappa)
        weights = torch.linalg.solve(centred, y[rest] - y[rest].mean(0))
        f = cross[:, i, rest]
        f = f - f.mean(-1, keepdim=True) - mean + mean.mean()
        outputs.append(y[rest].mean(0) + f @ weights)
    return torch.stack(outputs, 1)


def score(outputs: Tensor, target: np.ndarray) -> dict[str, Tensor]:
    """Return class-balanced scores (r,) of outputs (r, n), positive for the target."""
    right = torch.where(torch.from_numpy(target).to(outputs.device), outputs, -outputs)
    accuracy = (right > 0).double()
    return {
        name: (values[:, target].mean(1) + values[:, ~target].mean(1)) / 2
        for name, values in (("balanced_accuracy", accuracy), ("margin", right))
    }


@pytest.mark.parametrize("targets", [1, 10])
def test_leave_one_out(timed: Timer, targets: int) -> None:
    labels, checked = np.arange(FEW) % CELLS, [5]

    def fit_all(x: Tensor) -> dict[str, dict[str, Tensor]]:
        x = x.double()
        masks = torch.from_numpy(labels != np.arange(CELLS)[:, None]).to(x.device)
        y = torch.from_numpy(np.eye(10)[LABELS][:, :targets]).to(x.device)
        frozen = predict_left_out(x, torch.cat([x[None], x * masks[:, None]]), y)
        copies = [x * masks[c] for c in checked]
        refit = torch.cat([predict_left_out(copy, copy[None], y) for copy in copies])
        # The one-hot columns of target and rest sum to 1, and so do their outputs.
        frozen_scores, refit_scores = (
            [score(2 * outputs[..., t] - 1, np.equal(LABELS, t)) for t in range(targets)]
            for outputs in (frozen, refit)
        )
        want: dict[str, dict[str, Tensor]] = {}
        for name in SCORES:
            values = torch.full((targets, CELLS), torch.nan, dtype=x.dtype, device=x.device)
            values[:, checked] = torch.stack([scores[name] for scores in refit_scores])
            frozen_values = torch.stack([scores[name] for scores in frozen_scores])
            want[name] = {
                "intact": frozen_values[:, 0],
                "frozen": frozen_values[:, 1:],
                "refit": values,
            }
        return want

    def check(got: Tensor, want: Tensor) -> None:
        known = ~want.isnan()
        check_distances("ablation_decodability", torch.float32)(got[known], want[known])

    timed(
        "ablation_decodability",
        draw_few,
        options={"cells": labels, "labels": LABELS, "target": range(targets), "score": SCORES},
        oracle=fit_all,
        check=check,
        label="leave-one-out ridge",
        shape={"n": N, "p": FEW, "C": CELLS, "targets": targets},
    )


@pytest.mark.parametrize(("probe", "n"), [("ridge", 500), ("logistic", 100)])
def test_folds(timed: Timer, probe: str, n: int) -> None:
    """Logistic probes get fewer stimuli, because the definition computes every fit."""
    options = {"folds": 5, "probe": probe, "score": SCORES, "target": 1}
    timed(
        "ablation_decodability",
        lambda g: (draw_few(g)[0][:n],),
        options={"cells": np.arange(FEW) % CELLS, "labels": LABELS[:n], **options},
        label=f"{probe}, 5 folds",
        shape={"n": n, "p": FEW, "C": CELLS, "targets": 1},
    )


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "independent"])
def test_probe_paper(timed: Timer, paired: bool) -> None:
    """Four draws must match the definition; 200 draws must agree with them within their noise."""
    cells = np.random.default_rng(2).integers(0, CELLS, P)
    arguments = {"cells": cells, "labels": TARGET, "target": 1, "paired": paired}
    few_draws = arguments | {"draws": 4}

    def definition(x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        return rk.probe_paper(x, **few_draws), make_reference("probe_paper", **few_draws)(x)

    def check(got: dict[str, Any], want: tuple[dict[str, Any], dict[str, Any]]) -> None:
        ours, exact = want
        for name, value in exact.items():
            check_distances("logistic_fits", torch.float32)(ours[name], value)
        noise = np.hypot(as_numpy(got["standard_error"]), exact["standard_error"])
        assert (np.abs(as_numpy(got["change"]) - exact["change"]) <= 6 * noise).all()

    timed(
        "probe_paper",
        lambda g: (draw_classes(g, 0.2),),
        options=arguments | {"draws": 200},
        oracle=definition,
        check=check,
        label="paired draws" if paired else "independent draws",
        shape={"n": N, "p": P, "C": CELLS, "draws": 200, "d": 100},
    )
