"""The published study's probe: against scikit-learn, and properties of its random draws."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import repsim_kernels as rk
from repsim_kernels.ops import probe_paper

RNG = np.random.default_rng(0)
N, P, CELLS = 40, 60, 4
Y = np.arange(N) % 4
X = np.maximum(RNG.standard_normal((N, P)) + 0.7 * RNG.standard_normal((4, P))[Y], 0)
LABELS = RNG.permutation(np.arange(P) % CELLS)


def score_with_scikit_learn(x: np.ndarray, y: np.ndarray) -> float:
    """Return exp(-log-loss) of the hard predictions on the training stimuli, as the study does."""
    model = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, y)
    return float(np.exp(-log_loss(y, model.predict(x))))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("paired", [True, False])
def test_draws_of_all_remaining_neurons_match_scikit_learn(backend, paired):
    """If a draw takes all remaining neurons, nothing is random."""
    overlapping = RNG.random((3, P)) < 0.3
    for cells in (LABELS, overlapping):
        got = rk.probe_paper(X, cells, Y, 2, size=P, draws=3, paired=paired, backend=backend)
        inside = cells == np.arange(CELLS)[:, None] if cells.ndim == 1 else cells
        want = [score_with_scikit_learn(X[:, ~cell], Y == 2) for cell in inside]
        assert got["intact"] == pytest.approx(score_with_scikit_learn(X, Y == 2), rel=1e-12)
        np.testing.assert_allclose(got["ablated"], want, rtol=1e-12)
        np.testing.assert_allclose(got["change"], got["intact"] - np.array(want), rtol=1e-12)
        assert (got["standard_error"] == 0).all()


def record_fits(monkeypatch, **options) -> tuple[dict, list[np.ndarray]]:
    """Return the result of a call, and the columns of each batch of fits."""
    calls = []
    original = probe_paper.fit_columns

    def fits(source, x, targets, columns, start, backend, **rest):
        calls.append(np.asarray(torch.as_tensor(columns)))
        return original(source, x, targets, columns, start, backend, **rest)

    monkeypatch.setattr(probe_paper, "fit_columns", fits)
    return rk.probe_paper(X, LABELS, Y, 1, draws=50, size=10, **options), calls


@pytest.mark.parametrize("paired", [True, False])
def test_scores_of_the_draws_match_scikit_learn(monkeypatch, paired):
    """Against scikit-learn's fits to the recorded draws."""
    got, (intact, *ablated) = record_fits(monkeypatch, paired=paired)
    y = Y == 1

    def losses(columns: np.ndarray) -> np.ndarray:
        return np.array([-np.log(score_with_scikit_learn(X[:, draw], y)) for draw in columns])

    before = losses(intact)
    assert got["intact"] == pytest.approx(np.exp(-before.mean()), rel=1e-9)
    assert len(ablated) == CELLS
    for c, columns in enumerate(ablated):
        assert (LABELS[columns] != c).all()
        after = losses(columns)
        if paired:
            touched = (LABELS[intact] == c).any(axis=1)
            assert len(columns) == touched.sum()
            for old, new in zip(intact[touched], columns, strict=True):
                assert set(old[LABELS[old] != c]) <= set(new)
            after = before.copy()
            after[touched] = losses(columns)
        want = np.exp(-after.mean())
        assert got["ablated"][c] == pytest.approx(want, rel=1e-9)
        assert got["change"][c] == pytest.approx(got["intact"] - want, abs=1e-9)
        # The delta method turns errors of the means into errors of exp(-mean).
        scaled = np.exp(-before.mean()) * before, want * after
        error = np.cov(*scaled) / 50
        covariance = error[0, 1] if paired else 0
        variance = error[0, 0] + error[1, 1] - 2 * covariance
        assert got["standard_error"][c] == pytest.approx(np.sqrt(max(variance, 0)), abs=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_float32_with_outliers_matches_float64(paired):
    """Scores equal those of fits in float64."""
    x = X.astype(np.float32)
    x[7, ::3] *= 1e5
    x[11, 4] = 1e7
    options = {"draws": 30, "size": 10, "paired": paired}
    got = rk.probe_paper(x, LABELS, Y, 1, **options)
    exact = rk.probe_paper(x.astype(np.float64), LABELS, Y, 1, **options, backend="reference")
    for name in got:
        np.testing.assert_allclose(got[name], exact[name], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_pairing_reduces_noise_without_bias():
    """Over seeds, pairing gives the same mean change with less spread; both estimate it well."""
    by_pairing = {}
    for paired in (True, False):
        runs = [
            rk.probe_paper(X, LABELS, Y, 0, draws=20, size=8, paired=paired, seed=s)
            for s in range(80)
        ]
        change, error = (np.array([r[k] for r in runs]) for k in ("change", "standard_error"))
        spread = change.std(axis=0, ddof=1)
        assert (np.sqrt((error**2).mean(axis=0)) / spread > 0.7).all()
        assert (np.sqrt((error**2).mean(axis=0)) / spread < 1.4).all()
        by_pairing[paired] = change.mean(axis=0), spread
    (paired_mean, paired_sd), (free_mean, free_sd) = by_pairing[True], by_pairing[False]
    assert paired_sd.mean() < 0.8 * free_sd.mean()
    error = np.hypot(paired_sd, free_sd) / np.sqrt(80)
    assert (np.abs(paired_mean - free_mean) < 4 * error).all()


@given(
    st.sampled_from([(5, 3), (300, 40), (9000, 20), (9000, 700)]),
    st.integers(1, 30),
    st.integers(0, 10**9),
)
@settings(max_examples=20)
def test_orderings_are_reproducible_and_without_repeats(shape, draws, seed):
    (p, length), source = shape, np.random.SeedSequence(seed)
    got = probe_paper._draw_orderings(source, p, draws, length)
    assert got.shape == (draws, length)
    assert got.min() >= 0
    assert got.max() < p
    assert all(len(set(row)) == length for row in got)
    assert (
        probe_paper._draw_orderings(source, p, draws, length // 2) == got[:, : length // 2]
    ).all()
    other = probe_paper._draw_orderings(np.random.SeedSequence(seed + 1), p, draws, length)
    assert (other != got).any()


@pytest.mark.parametrize(("p", "length"), [(12, 5), (8193, 2000)])
def test_neurons_are_uniform_at_every_position(p, length):
    got = probe_paper._draw_orderings(np.random.SeedSequence(3), p, 4000, length)
    group = got * 12 // p
    for place in (0, 1, length // 2, length - 1):
        count = np.bincount(group[:, place], minlength=12)
        size = np.bincount(np.arange(p) * 12 // p) / p * 4000
        assert (np.abs(count - size) < 5 * np.sqrt(size)).all()
    # Neighbours are independent: a group follows itself no more often than by chance.
    repeats = (group[:, 0] == group[:, 1]).mean()
    assert abs(repeats - (0 if p == 12 else 1 / 12)) < 5 * np.sqrt(1 / 12 / 4000)


@pytest.mark.parametrize(("p", "length"), [(7, 7), (300, 40), (8192, 30), (8193, 900), (9000, 1)])
def test_orderings_are_those_of_the_simplest_procedure(p, length):
    """Sorted random keys, or draws with replacement without their repeats."""
    got = probe_paper._draw_orderings(np.random.SeedSequence(4), p, 600, length)
    rng = np.random.default_rng(np.random.SeedSequence(4))
    if p <= 8192:
        want = rng.random((600, p)).argsort(axis=1)[:, :length]
    else:
        values = rng.integers(p, size=(2 * length + 16, 600), dtype=np.int32).T
        want = [list(dict.fromkeys(row.tolist()))[:length] for row in values]
    assert got.dtype == np.int64
    assert got.tolist() == np.array(want).tolist()


def draw_serially(function, arguments):
    yield from map(function, arguments)


@given(
    st.sampled_from([(60, 5), (300, 40), (9000, 20)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**9),
)
@settings(max_examples=20)
def test_a_thread_changes_no_bit(shape, paired, overlapping, seed):
    (p, size), rng = shape, np.random.default_rng(seed)
    x = rng.standard_normal((N, p))
    cells = rng.random((5, p)) < rng.random((5, 1)) if overlapping else rng.integers(-1, 5, p)
    options = {"draws": 7, "size": size, "paired": paired, "seed": seed}
    got = rk.probe_paper(x, cells, Y, 1, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_paper, "_call_ahead", draw_serially)
        want = rk.probe_paper(x, cells, Y, 1, **options)
    for name, values in want.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(values).tobytes(), name


@pytest.fixture
def no_thread_left():
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("paired", [True, False])
def test_neurons_are_drawn_during_the_fits_before_them(monkeypatch, paired):
    """Fits wait until the next draw has started; no draw starts more than one cell ahead."""
    # Unpaired, draw i serves fit i; paired, it serves fit i + 1, after the intact one.
    name, lead = ("_extend_orderings", 0) if paired else ("_draw", 1)
    original_draw, original_fits = getattr(probe_paper._Probe, name), probe_paper.fit_columns
    started = [threading.Event() for _ in range(7)]
    draws, fits = [], []

    def draw(self, *arguments):
        draws.append(len(fits))
        started[len(draws) - 1].set()
        return original_draw(self, *arguments)

    def fit(*arguments, **options):
        if len(fits) < 6:
            assert started[len(fits) + lead].wait(60)
        fits.append(len(draws))
        return original_fits(*arguments, **options)

    monkeypatch.setattr(probe_paper._Probe, name, draw)
    monkeypatch.setattr(probe_paper, "fit_columns", fit)
    rk.probe_paper(X, np.arange(P) % 6, Y, 1, draws=20, size=10, paired=paired)
    assert len(fits) == 7
    assert len(draws) == 6 + lead
    assert all(i - finished <= lead for i, finished in enumerate(draws))


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("place", ["_draw_orderings", "fit_columns"])
@pytest.mark.parametrize("call", [0, 1])
def test_errors_of_draws_and_fits_surface(monkeypatch, paired, place, call):
    calls, original = [], getattr(probe_paper, place)

    def fail(*arguments, **options):
        calls.append(place)
        if len(calls) > call:
            raise MemoryError(place)
        return original(*arguments, **options)

    monkeypatch.setattr(probe_paper, place, fail)
    with pytest.raises(MemoryError, match=place):
        rk.probe_paper(X, LABELS, Y, 1, draws=20, size=10, paired=paired)


def test_the_seed_alone_determines_the_draws():
    first = rk.probe_paper(X, LABELS, Y, 3, draws=15, size=9, seed=5)
    for x, backend in ((X, "reference"), (torch.from_numpy(X), None), (np.asfortranarray(X), None)):
        got = rk.probe_paper(x, LABELS, Y, 3, draws=15, size=9, seed=5, backend=backend)
        assert isinstance(got["intact"], float)
        for name in first:
            np.testing.assert_allclose(got[name], first[name], rtol=1e-12, atol=1e-14)
    assert isinstance(got["change"], np.ndarray)
    assert isinstance(rk.probe_paper(torch.from_numpy(X), LABELS, Y, 3)["change"], torch.Tensor)
    other = rk.probe_paper(X, LABELS, Y, 3, draws=15, size=9, seed=6)
    assert other["intact"] != first["intact"]


def test_empty_cells_change_nothing_and_complete_ones_give_nan():
    cells = np.zeros((4, P), dtype=bool)
    cells[1] = True
    cells[2, 3:] = True  # three neurons remain, fewer than a draw
    cells[3, P // 10 :] = True  # six remain
    got = rk.probe_paper(X, cells, Y, 0, draws=12, size=5)
    assert got["change"][0] == got["standard_error"][0] == 0
    assert np.isnan([got[k][1] for k in ("ablated", "change", "standard_error")]).all()
    assert got["ablated"][2] == pytest.approx(score_with_scikit_learn(X[:, :3], Y == 0), rel=1e-12)
    assert got["standard_error"][3] > 0
    single = rk.probe_paper(X, cells, Y, 0, draws=1, size=5)
    assert np.isnan(single["standard_error"][[0, 3]]).all()
