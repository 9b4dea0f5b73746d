"""What linear readers make of each ablation: ridge and logistic regression, and the study's probe.

No operations are given where fits iterate.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.bench_logistic import TARGET, N, P, of_classes
from bench.common.inputs import as_distances, reference
from bench.common.tolerances import as_numpy

CELLS, FEW = 16, 1600  # of few neurons the Grams cost next to nothing
LABELS = np.arange(N) % 10
SCORES = ("balanced_accuracy", "margin")


def few(g: torch.Generator) -> tuple[Tensor, ...]:
    return (of_classes(g, 0.2, FEW),)


def left_out(x: Tensor, reads: Tensor, y: Tensor, ridge: float = 1.0) -> Tensor:
    """Outputs (r, n, k) for stimuli ``reads`` (r, n, p), each by a fit to x without the stimulus.

    Every fit is made, from the Gram of those that are left.
    """
    gram, cross = x @ x.mT, reads @ x.mT
    n = len(x)
    kappa = ridge * (gram.trace() - gram.mean() * n) / n
    found = []
    for i in range(n):
        rest = torch.arange(n, device=x.device) != i
        k = gram[rest][:, rest]
        mean = k.mean(0)
        centred = k - mean - mean[:, None] + mean.mean()
        centred.diagonal().add_(kappa)
        weights = torch.linalg.solve(centred, y[rest] - y[rest].mean(0))
        f = cross[:, i, rest]
        f = f - f.mean(-1, keepdim=True) - mean + mean.mean()
        found.append(y[rest].mean(0) + f @ weights)
    return torch.stack(found, 1)


def scored(outputs: Tensor, target: np.ndarray) -> dict[str, Tensor]:
    """Of outputs (r, n) of the target less those of the rest: means over both classes, (r,)."""
    right = torch.where(torch.from_numpy(target).to(outputs.device), outputs, -outputs)
    accuracy = (right > 0).double()
    return {
        name: sum(values[:, own].mean(1) for own in (target, ~target)) / 2
        for name, values in (("balanced_accuracy", accuracy), ("margin", right))
    }


@pytest.mark.parametrize("targets", [1, 10])
def test_leave_one_out(timed, targets):
    labels, some = np.arange(FEW) % CELLS, [5]

    def every_fit(x: Tensor) -> dict[str, dict[str, Tensor]]:
        x = x.double()
        masks = torch.from_numpy(labels != np.arange(CELLS)[:, None]).to(x.device)
        y = torch.from_numpy(np.eye(10)[LABELS][:, :targets]).to(x.device)
        frozen = left_out(x, torch.cat([x[None], x * masks[:, None]]), y)
        refit = torch.cat([left_out(x * masks[c], (x * masks[c])[None], y) for c in some])
        # One-hot columns of target and rest sum to 1, and so do their outputs.
        f, r = (
            [scored(2 * outputs[..., t] - 1, t == LABELS) for t in range(targets)]
            for outputs in (frozen, refit)
        )
        want: dict[str, dict[str, Tensor]] = {}
        for name in SCORES:
            made = torch.full((targets, CELLS), torch.nan, dtype=x.dtype, device=x.device)
            made[:, some] = torch.stack([one[name] for one in r])
            both = torch.stack([one[name] for one in f])
            want[name] = {"intact": both[:, 0], "frozen": both[:, 1:], "refit": made}
        return want

    def check(got: Tensor, want: Tensor) -> None:
        made = ~want.isnan()
        as_distances("ablation_decodability", torch.float32)(got[made], want[made])

    timed(
        "ablation_decodability",
        few,
        options={"cells": labels, "labels": LABELS, "target": range(targets), "score": SCORES},
        oracle=every_fit,
        check=check,
        what="leave-one-out ridge",
        shape={"n": N, "p": FEW, "C": CELLS, "targets": targets},
    )


@pytest.mark.parametrize(("probe", "n"), [("ridge", 500), ("logistic", 100)])
def test_folds(timed, probe, n):
    """Of fewer stimuli where the definition's fits are logistic: each is made."""
    options = {"folds": 5, "probe": probe, "score": SCORES, "target": 1}
    timed(
        "ablation_decodability",
        lambda g: (few(g)[0][:n],),
        options={"cells": np.arange(FEW) % CELLS, "labels": LABELS[:n], **options},
        what=f"{probe}, 5 folds",
        shape={"n": n, "p": FEW, "C": CELLS, "targets": 1},
    )


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "independent"])
def test_probe_paper(timed, paired):
    """A few draws are held to the definition one by one, 200 to those few by their noise."""
    cells = np.random.default_rng(2).integers(0, CELLS, P)
    arguments = {"cells": cells, "labels": TARGET, "target": 1, "paired": paired}
    few_draws = arguments | {"draws": 4}

    def definition(x: Tensor) -> tuple[dict[str, object], dict[str, object]]:
        return rk.probe_paper(x, **few_draws), reference("probe_paper", **few_draws)(x)

    def check(got: dict[str, object], want: tuple[dict[str, object], dict[str, object]]) -> None:
        ours, exact = want
        for name, value in exact.items():
            as_distances("logistic_fits", torch.float32)(ours[name], value)
        noise = np.hypot(as_numpy(got["standard_error"]), exact["standard_error"])
        assert (np.abs(as_numpy(got["change"]) - exact["change"]) <= 6 * noise).all()

    timed(
        "probe_paper",
        lambda g: (of_classes(g, 0.2),),
        options=arguments | {"draws": 200},
        oracle=definition,
        check=check,
        what="paired draws" if paired else "independent draws",
        shape={"n": N, "p": P, "C": CELLS, "draws": 200, "d": 100},
    )
