"""Budgets of launches and host synchronisations for one call with 16 cells and 128 stimuli.

`_phantom_counts.py` says what counts as either. ``pytest -s`` prints the counts, and lists them by
line of the package; a failed test does so too. CuPy is absent: a stand-in for cuSOLVER
solves the batches of eigenproblems, and PyTorch the original's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from _phantom_counts import Counts

import repsim_kernels as rk
from repsim_kernels.kernels.triton import riccati

C, N, P = 16, 128, 256
STIMULI = ["rsa_euclidean", "rsa_cosine", "rsa_correlation", "cka_rbf", "mutual_knn"]
FIVE = ["cka", "cca", "pwcca", "svcca", "procrustes"]
RNG = np.random.default_rng(0)
X, Y = (torch.from_numpy(RNG.standard_normal((P, N), dtype=np.float32)).mT for _ in range(2))
# Light cells, each 3 % of the neurons; half of the neurons belong to none.
CELLS = np.where(np.arange(P) % 32 < C, np.arange(P) % 32, -1)
LABELS = np.arange(N) % 4
SPHERES = [np.arange(start, start + 12) for start in range(C)]
CONDITIONS = np.arange(N) % 32
Call = Callable[[Any, Any], Any]


class Budget(NamedTuple):
    """A call with its launches and syncs: as today's code reaches them, and as they were asked."""

    call: Call
    reached: tuple[int, int]
    asked: tuple[int, int] | None = None
    per_step: int = 0  # launches asked for each step of the Riccati iteration, in addition
    most: int = 0  # launches asked whatever the number of steps


BUDGETS = {
    "ablation_distances, five metrics": Budget(
        lambda x, y: rk.ablation_distances(x, CELLS, metrics=FIVE),
        reached=(141, 16),
        asked=(110, 16),
        per_step=2,
        most=180,
    ),
    "ablation_distances, CKA": Budget(
        lambda x, y: rk.ablation_distances(x, CELLS, metrics=["cka"]),
        reached=(25, 3),
        asked=(40, 4),
    ),
    "ablation_distances, RSA, RBF CKA and mutual kNN": Budget(
        lambda x, y: rk.ablation_distances(x, CELLS, metrics=STIMULI),
        reached=(1685, 250),
    ),
    "ablation_decodability": Budget(
        lambda x, y: rk.ablation_decodability(x, CELLS, LABELS),
        reached=(119, 5),
        asked=(200, 12),
    ),
    "cell_grams": Budget(lambda x, y: rk.cell_grams(x, CELLS), reached=(16, 2)),
    "centered_gram": Budget(lambda x, y: rk.centered_gram(x), reached=(16, 2)),
    "selectivity_grid": Budget(
        lambda x, y: rk.selectivity_grid(x, LABELS, 1, grid=(4, 4)), reached=(39, 4)
    ),
    "probe_paper": Budget(
        lambda x, y: rk.probe_paper(x, CELLS, LABELS, target=1, draws=3, size=4),
        reached=(235, 67),
    ),
    "cka": Budget(lambda x, y: rk.cka(x, y, debiased=True), reached=(54, 6)),
    "rdm, crossnobis": Budget(
        lambda x, y: rk.rdm(x, distance="crossnobis", labels=CONDITIONS, noise=y), reached=(92, 7)
    ),
    "pairwise": Budget(lambda x, y: rk.pairwise([x, y]), reached=(37, 14)),
    "calibrate": Budget(
        lambda x, y: rk.calibrate([x, y], permutations=20, debiased=True), reached=(178, 24)
    ),
    "rdm": Budget(lambda x, y: rk.rdm(x), reached=(45, 8)),
    "compare_rdms": Budget(lambda x, y: rk.compare_rdms(x[:, :253], y[:8, :253]), reached=(64, 3)),
    "searchlight": Budget(lambda x, y: rk.searchlight(x, SPHERES), reached=(17, 4)),
    "searchlight, crossnobis compared with models": Budget(
        lambda x, y: rk.searchlight(
            x, SPHERES, distance="crossnobis", labels=LABELS, compare_to=y[:3, :6]
        ),
        reached=(84, 9),
    ),
    "mutual_knn": Budget(lambda x, y: rk.mutual_knn(x, y), reached=(560, 24)),
}


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one program take a whole Riccati step: as many launches, and an interpreter in time."""
    choose = riccati.choose

    def choose_whole(batch: int, m: int) -> riccati.Launch:
        return dataclasses.replace(choose(batch, m), block_m=128, block_n=128)

    monkeypatch.setattr(riccati, "choose", choose_whole)


def meets(budget: Budget, counts: Counts) -> bool:
    """Whether a call needs no more than was asked."""
    if budget.asked is None:
        return True
    launches, syncs = budget.asked
    if budget.per_step:
        replayed = riccati.STEPS * counts.count("launch", "graph replay")
        steps = counts.count("launch", "_riccati_step_kernel") + replayed
        launches = min(launches + budget.per_step * steps, budget.most)
    return counts.launches <= launches and counts.syncs <= syncs


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", BUDGETS)
def test_calls_stay_within_their_budgets(phantom, name):
    budget = BUDGETS[name]
    x, y = X.cuda(), Y.cuda()
    with phantom.count() as counts:
        budget.call(x, y)
    print(f"{name}: {counts.launches} launches, {counts.syncs} syncs\n{counts.explain()}")
    launches, syncs = budget.reached
    assert counts.launches <= launches
    assert counts.syncs <= syncs
    assert meets(budget, counts)
