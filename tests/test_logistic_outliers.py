"""Logistic regressions on activations with outliers: fits are accurate or not ``converged``.

The oracle is scikit-learn in float64 on the same numbers. Where scikit-learn itself fails, the fits
are checked with a Newton step in extended precision, `compute_newton_decrement`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import repsim_kernels as rk
from repsim_kernels.kernels.torch import logistic

PLACES = ("one number", "one stimulus", "one neuron", "several", "tiny neuron", "first stimulus")


@dataclass(frozen=True)
class Outliers:
    """A reproducible recipe for float32 activations (n, d) and classes."""

    place: str
    size: float
    d: int = 6
    seed: int = 0

    def make(self) -> tuple[np.ndarray, np.ndarray]:
        rng, n = np.random.default_rng(self.seed), 40
        y = rng.permutation(n) % 3 == 0
        x = rng.standard_normal((n, self.d)) + 0.5 * y[:, None]
        stimulus, neuron = rng.integers(n), rng.integers(self.d)
        if self.place == "one number":
            x[stimulus, neuron] *= self.size
        elif self.place == "one stimulus":
            x[stimulus] *= self.size
        elif self.place == "first stimulus":
            x[0] = self.size
        elif self.place == "one neuron":
            x[:, neuron] *= self.size
        elif self.place == "several":
            for exponent in (1, 2 / 3, 1 / 3):
                x[rng.integers(n), rng.integers(self.d)] *= self.size**exponent
        elif self.place == "tiny neuron":  # 1e-40 is denormal
            x[:, neuron] *= 1e-40
            x[stimulus] *= self.size
        return x.astype(np.float32), y.astype(np.int64)


def fit_scikit_learn(x: np.ndarray, y: np.ndarray, C: float = 1.0) -> LogisticRegression:
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it resumes with another solver if its Hessian fails
        return model.fit(x.astype(np.float64), y)


def compare_with_scikit_learn(
    got: dict, x: np.ndarray, y: np.ndarray, C: float = 1.0
) -> tuple[float, int, int]:
    """Return the error relative to the largest coefficient, and two counts of stimuli.

    The counts are of stimuli that scikit-learn misclassifies away from its boundary, and of all
    stimuli near the boundary.
    """
    model = fit_scikit_learn(x, y, C)
    w, z = model.coef_[0], model.decision_function(x.astype(np.float64))
    error = np.abs(np.asarray(got["coef"][0], dtype=np.float64) - w).max() / np.abs(w).max()
    near = np.abs(z) < 1e-4 * np.abs(z).max().clip(max=1)
    return float(error), int((((z > 0) != y) & ~near).sum()), int(near.sum())


@given(
    st.builds(
        Outliers,
        st.sampled_from(PLACES),
        st.floats(0, 7).map(lambda e: 10.0**e),
        st.integers(2, 8),
        SEEDS,
    ),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
@example(Outliers("first stimulus", 1e7), 1.0, "float32")
@example(Outliers("one stimulus", 1e7), 1.0, "float32")
@example(Outliers("one number", 1e6), 1.0, "bfloat16")
def test_fits_with_outliers_match_scikit_learn(problem, C, dtype):
    x, y = problem.make()
    if dtype == "float16":
        x = x.clip(-6e4, 6e4)
    t = torch.from_numpy(x).to(getattr(torch, dtype))
    x = t.float().numpy()
    got = rk.logistic_fits(t, y, np.arange(problem.d)[None], C=C)
    assert got["converged"].all()
    error, wrong, near = compare_with_scikit_learn(got, x, y, C)
    assert error <= 1e-4
    assert wrong <= int(got["errors"][0]) <= wrong + near


def compute_newton_decrement(x: np.ndarray, y: np.ndarray, w: np.ndarray, c: float) -> float:
    """Return the size of a Newton step relative to the largest coefficient, in 80 digits."""
    import mpmath as mp

    with mp.workdps(80):
        a = [[mp.mpf(float(v)) for v in row] + [mp.mpf(1)] for row in x]
        v = [mp.mpf(float(u)) for u in (*w, c)]
        d, flip = x.shape[1], [-1 if label else 1 for label in y]
        p_wrong = [1 / (1 + mp.exp(-f * mp.fdot(row, v))) for f, row in zip(flip, a, strict=True)]
        gradient, h = mp.matrix(d + 1, 1), mp.matrix(d + 1)
        for row, f, r in zip(a, flip, p_wrong, strict=True):
            for i in range(d + 1):
                gradient[i] += f * r * row[i]
                for k in range(d + 1):
                    h[i, k] += r * (1 - r) * row[i] * row[k]
        for i in range(d):
            gradient[i] += v[i]
            h[i, i] += 1
        step = mp.lu_solve(h, gradient)
        return float(max(abs(s) for s in step[:d]) / max(abs(u) for u in v[:d]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [1e8, 1e10, 1e12, 1e20, 1e30])
def test_fits_beyond_scikit_learn_are_optimal_or_not_converged(place, size):
    """Relative to the median, in float64, a fit reaches the optimum or reports that it did not."""
    x, y = Outliers(place, size, d=4, seed=5).make()
    got = rk.logistic_fits(x.astype(np.float64), y, np.arange(4)[None], tol=1e-10)
    single = rk.logistic_fits(x, y, np.arange(4)[None])
    if size <= 1e12:
        assert got["converged"].all()
        assert single["converged"].all()
    if single["converged"][0] and got["converged"][0]:
        scale = np.abs(got["coef"]).max()
        np.testing.assert_allclose(single["coef"], got["coef"], rtol=0, atol=1e-4 * scale)
        assert single["errors"][0] == got["errors"][0]
    if got["converged"][0]:
        assert compute_newton_decrement(x, y, got["coef"][0], got["intercept"][0]) <= 1e-6


ORDINARY = {
    "rectified": lambda g, y: np.maximum(g, 0),
    "classes apart": lambda g, y: np.maximum(g + 0.7 * y, 0),
    "normalised": lambda g, y: (g - g.mean(0)) / g.std(0),
    "lognormal": lambda g, y: np.exp(2 * g),
    "mean of 100": lambda g, y: g + 100,
    "thirty times": lambda g, y: np.maximum(30 * g, 0),
}


def count_descents(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, int]:
    """Count the problems that descend in each dtype after this call."""
    counts = {torch.float32: 0, torch.float64: 0}
    original = logistic._Descent.__init__

    def init(self, x, *args, **options):
        counts[x.dtype] += len(x)
        original(self, x, *args, **options)

    monkeypatch.setattr(logistic._Descent, "__init__", init)
    return counts


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_activations_stay_in_float32(monkeypatch, kind):
    rng = np.random.default_rng(0)
    n, d, b = 300, 60, 8
    y = np.arange(n) % 10 == 0
    x = ORDINARY[kind](rng.standard_normal((n, 400)), y[:, None]).astype(np.float32)
    columns = np.stack([rng.choice(400, d, replace=False) for _ in range(b)])
    exact = rk.logistic_fits(x.astype(np.float64), y.astype(int), columns)
    counts = count_descents(monkeypatch)
    got = rk.logistic_fits(x, y.astype(int), columns)
    assert counts == {torch.float32: b, torch.float64: 0}
    assert got["converged"].all()
    assert (
        np.abs(got["coef"] - exact["coef"]) <= 1e-4 * np.abs(exact["coef"]).max(1)[:, None]
    ).all()
    assert (got["errors"] == exact["errors"]).all()


def test_only_problems_with_outliers_leave_float32(monkeypatch):
    x, y = Outliers("one neuron", 1.0, d=12).make()
    x[3, 5] = 1e6
    columns = np.array([[0, 1, 2], [5, 6, 7], [8, 9, 10]])
    counts = count_descents(monkeypatch)
    got = rk.logistic_fits(x, y, columns)
    assert counts == {torch.float32: 3, torch.float64: 1}
    assert got["converged"].all()


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("n", [50, 300])
def test_massive_activations_match_scikit_learn(n, size):
    """One stimulus with a third of its neurons large: tiny steps still move the boundary."""
    rng = np.random.default_rng(2)
    y = (np.arange(n) % 10 == 0).astype(int)
    x = rng.standard_normal((n, 90)).astype(np.float32)
    x[3, ::3] = size
    columns = np.stack([rng.choice(90, 60, replace=False) for _ in range(4)])
    for values, tolerance in ((x, 1e-4), (x.astype(np.float64), 1e-9)):
        got = rk.logistic_fits(values, y, columns)
        assert got["converged"].all()
        for i, selected in enumerate(columns):
            model = fit_scikit_learn(x[:, selected], y)
            error = np.abs(got["coef"][i] - model.coef_[0]).max()
            assert error <= tolerance * np.abs(model.coef_).max()
            assert got["errors"][i] == (model.predict(x[:, selected]) != y).sum()


@pytest.mark.parametrize("size", [1e10, 1e15, 1e25])
def test_fits_beyond_float64_are_not_converged(size):
    """The same outlier in both classes makes the curvature of one direction nearly infinite."""
    x, y = Outliers("one neuron", 1.0, d=4).make()
    x[[1, 2]] = np.float32(size) * np.array([1, -1, 0.5, 2], dtype=np.float32)
    y[[1, 2]] = 0, 1
    for values in (x, x.astype(np.float64)):
        assert not rk.logistic_fits(values, y, np.arange(4)[None])["converged"].any()


def test_activations_may_span_the_whole_range_of_float32():
    """Differences overflow float32."""
    x, y = Outliers("one neuron", 1.0, d=4).make()
    x[:, 1] = np.where(y == 1, 3.4e38, -3.4e38)
    got = rk.logistic_fits(x, y, np.array([[0, 1], [0, 2], [1, 3]]))
    assert not got["errors"][[0, 2]].any()
    assert got["converged"][1]
    assert np.isfinite(got["coef"]).all()


def test_constant_neurons_have_zero_coefficients():
    x, y = Outliers("one number", 1e6, d=5, seed=1).make()
    x[:, 2] = 1e30
    got = rk.logistic_fits(x, y, np.arange(5)[None])
    x[:, 2] = 0
    error, wrong, near = compare_with_scikit_learn(got, x, y)
    assert error <= 1e-4
    assert got["coef"][0, 2] == 0
    assert wrong <= got["errors"][0] <= wrong + near
    constant = rk.logistic_fits(x, y, np.array([[2, 2]]))
    assert constant["converged"].all()
    assert not constant["coef"].any()


@pytest.mark.parametrize("max_iter", [1, 2, 5])
def test_too_few_steps_are_not_converged(max_iter):
    x, y = Outliers("one stimulus", 1e5).make()
    got = rk.logistic_fits(x, y, np.arange(6)[None], max_iter=max_iter)
    assert not got["converged"].any()
    assert got["n_iter"][0] <= max_iter


def test_a_start_far_away_converges():
    x, y = Outliers("one stimulus", 1e5).make()
    start = np.full((1, 6), 10.0), np.full(1, -3.0)
    got = rk.logistic_fits(x, y, np.arange(6)[None], start=start)
    assert got["converged"].all()
    assert compare_with_scikit_learn(got, x, y)[0] <= 1e-4
