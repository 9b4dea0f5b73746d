"""Linear probes: many logistic regressions against scikit-learn's loop, and ridge from the Grams.

Run all, in one process, with ``make bench``; the ratios within a group are the result. Answers are
compared with scikit-learn's before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import repsim_kernels as rk

FITS, N, D, P = 2000, 500, 100, 100_352
TARGET = (np.arange(N) % 10 == 0).astype(np.int64)


def activations(apart: float) -> torch.Tensor:
    """Rectified activations (n, p) in float32, neuron by neuron, of ten classes some way apart."""
    rng = np.random.default_rng(0)
    means = apart * rng.standard_normal((P, 10), dtype=np.float32)
    x = means[:, np.arange(N) % 10] + rng.standard_normal((P, N), dtype=np.float32)
    return torch.from_numpy(np.maximum(x, 0, out=x)).mT


@pytest.fixture(scope="module", params=[0.0, 0.7], ids=["classes alike", "classes apart"])
def drawn(request, findings):
    which = "classes apart" if request.param else "classes alike"
    x = activations(request.param)
    rng = np.random.default_rng(1)
    columns = np.stack([rng.choice(P, D, replace=False) for _ in range(FITS)])
    times: dict[str, float] = {}
    yield x, columns, times, f"{FITS:,} fits, n = {N}, d = {D}, {which}"
    one, loop = times["ours"] / FITS * 1e3, times["loop"] / FITS * 1e3
    findings.append(f"{which}: {one:.2f} ms a fit, {loop / one:.1f} times as fast as the loop")


def time(benchmark, drawn, name: str, run: Callable[[], object], rounds: int) -> None:
    *_, times, group = drawn
    benchmark.group = group
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1 if rounds > 3 else 0)
    times[name] = benchmark.stats.stats.min


def test_logistic_fits(benchmark, drawn):
    x, columns, *_ = drawn
    got = rk.logistic_fits(x, TARGET, columns)
    assert got["converged"].all()
    for i in range(5):
        values = x[:, columns[i]].double().numpy()
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(values, TARGET)
        np.testing.assert_allclose(
            got["coef"][i], model.coef_[0], atol=1e-4 * np.abs(model.coef_).max()
        )
        assert got["errors"][i] == (model.predict(values) != TARGET).sum()
    time(benchmark, drawn, "ours", lambda: rk.logistic_fits(x, TARGET, columns), rounds=5)


def test_loop(benchmark, drawn):
    """scikit-learn's defaults, as the study's code has them, on columns gathered at no cost."""
    x, columns, *_ = drawn
    values = [x[:, own].numpy() for own in columns]

    def loop() -> None:
        for v in values:
            LogisticRegression().fit(v, TARGET)

    time(benchmark, drawn, "loop", loop, rounds=2)


@pytest.mark.benchmark(group="the study's probe, 16 cells, 200 draws, p = 100,352")
@pytest.mark.parametrize("paired", [True, False])
def test_probe_paper(benchmark, findings, paired):
    x = activations(0.2)
    cells = np.random.default_rng(2).integers(0, 16, P)
    got = []

    def run() -> None:
        got.append(rk.probe_paper(x, cells, TARGET, 1, paired=paired))

    benchmark.pedantic(run, rounds=3)
    error = float(got[0]["standard_error"].mean())
    how = "paired" if paired else "independent"
    findings.append(f"probe_paper, {how} draws: standard error of a change {error:.4f}")


@pytest.mark.benchmark(group="leave-one-out ridge, 16 cells, n = 500, without the Grams' pass")
@pytest.mark.parametrize("targets", [1, 10])
def test_leave_one_out(benchmark, targets):
    """From few neurons, so that the Grams cost next to nothing."""
    x = activations(0.2)[:, :1600]
    cells, labels = np.arange(1600) % 16, np.arange(N) % 10

    def run():
        return rk.ablation_decodability(x, cells, labels, target=list(range(targets)))

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
