"""Many logistic regressions at once, against scikit-learn and the optimality condition."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _draw import SEEDS, TORCH_LAYOUTS
from hypothesis import assume, example, given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

import repsim_kernels as rk

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-4, "bfloat16": 1e-4}
KINDS = ("noise", "1:9", "separable", "constant", "duplicated", "few stimuli", "mean of 100")


@dataclass(frozen=True)
class Problem:
    """A reproducible recipe for x (n, p), classes and columns."""

    kind: str
    d: int
    dtype: str = "float64"
    layout: str = "C"
    seed: int = 0
    b: int = 3

    def make(self) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        n, p = max(2, self.d // 2) if self.kind == "few stimuli" else 40, self.d + 7
        y = np.zeros(n, dtype=np.int64)
        y[: max(1, n // (10 if self.kind == "1:9" else 2))] = 1
        rng.shuffle(y)
        x = np.maximum(rng.standard_normal((n, p)), 0)
        columns = np.stack([rng.choice(p, self.d, replace=False) for _ in range(self.b)])
        if self.kind == "separable":
            x += 3 * y[:, None]
        elif self.kind == "constant":
            x[:, columns[:, 0]] = 0.7
        elif self.kind == "duplicated":
            x[:, columns[:, -1]] = x[:, columns[:, :1]].mean(axis=2)
            x[:, columns[0, -1]] = x[:, columns[0, 0]]
        elif self.kind == "mean of 100":
            x += 100
        t = torch.from_numpy(x).to(getattr(torch, self.dtype))
        if self.layout == "F":
            t = t.mT.contiguous().mT
        elif self.layout == "steps":
            t = t.repeat_interleave(2, 1)[:, ::2]
        return t, y, columns


problems = st.builds(
    Problem,
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.sampled_from(tuple(TOLERANCE)),
    st.sampled_from(TORCH_LAYOUTS),
    SEEDS,
)


def fit_scikit_learn(x: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    with warnings.catch_warnings():
        # When losses no longer differ, it warns and resumes with another solver.
        warnings.simplefilter("ignore")
        return model.fit(x, y)


def assert_same(got, i: tuple[int, ...], x: np.ndarray, w: np.ndarray, c: float, tolerance: float):
    """Compare coefficients relative to the largest, and the intercept to the sums it offsets."""
    largest = np.abs(w).max() + 1e-4
    assert np.abs(got["coef"][i].numpy() - w).max() <= tolerance * largest
    scale = max(1, abs(c), (np.abs(w) * np.abs(x.mean(0))).sum())
    assert abs(float(got["intercept"][i]) - c) <= tolerance * scale


@given(problems, st.sampled_from([0.1, 1.0, 100.0]), st.sampled_from(["torch", "reference"]))
def test_fits_match_scikit_learn(problem, C, backend):
    x, y, columns = problem.make()
    got = rk.logistic_fits(x, y, columns, C=C, backend=backend)
    assert got["converged"].all()
    assert got["coef"].dtype == got["intercept"].dtype
    assert got["coef"].dtype == (
        torch.float64 if problem.dtype == "float64" or backend == "reference" else torch.float32
    )
    for i, selected in enumerate(columns):
        values = x.double().numpy()[:, selected]
        model = fit_scikit_learn(values, y, C)
        assert_same(
            got, (i,), values, model.coef_[0], model.intercept_[0], TOLERANCE[problem.dtype]
        )
        undecided = (np.abs(model.decision_function(values)) < 1e-6).sum()
        assert abs(got["errors"][i] - (model.predict(values) != y).sum()) <= undecided


def compute_newton_step(
    x: np.ndarray, y: np.ndarray, C: float, w: np.ndarray, c: float
) -> np.ndarray:
    """Return the Newton step from (w, c), which is 0 only at the optimum."""
    a, flip = np.column_stack([x - x.mean(0), np.ones(len(x))]), np.where(y == 1, -1.0, 1.0)
    penalised = np.append(np.ones(x.shape[1]), 0)
    v = np.append(w, c + x.mean(0) @ w)
    p_wrong = 1 / (1 + np.exp(np.minimum(-flip * (a @ v), 700)))
    gradient = C * a.T @ (flip * p_wrong) + penalised * v
    hessian = C * (a.T * (p_wrong * (1 - p_wrong))) @ a + np.diag(penalised)
    return np.linalg.solve(hessian, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_fits_are_optimal(kind, C, backend):
    x, y, columns = Problem(kind, 10, seed=3, b=70).make()
    got = rk.logistic_fits(x, y, columns, C=C, backend=backend)
    assert got["converged"].all()
    for i, selected in enumerate(columns):
        w, c = got["coef"][i].numpy(), got["intercept"][i].item()
        step = compute_newton_step(x.numpy()[:, selected], y, C, w, c)
        assert np.abs(step[:-1]).max() <= 1e-8 * np.abs(w).max()
        assert abs(step[-1]) <= 1e-8 * max(1, abs(c))


@given(problems, st.sampled_from([-60, -20, -7, 7, 12]))
@example(Problem("duplicated", 8, "float32"), 12)
@example(Problem("few stimuli", 12, "float32"), 12)
@example(Problem("1:9", 3, "bfloat16", seed=3), -60)
@example(Problem("noise", 3, "float32"), -70)  # the penalty overflows float32
@example(Problem("noise", 3, "float64"), -70)
def test_scaled_activations_equal_a_scaled_penalty(problem, exponent):
    """Scaling activations by s, a power of two, equals dividing the penalty by s²."""
    assume(problem.dtype != "float16")  # its range is too small
    x, y, columns = problem.make()
    scale = 2.0**exponent
    got = rk.logistic_fits(x * scale, y, columns)
    want = rk.logistic_fits(x.double(), y, columns, C=scale**2, backend="reference", max_iter=2000)
    assert got["converged"].all()
    assert want["converged"].all()
    scaled = {"coef": got["coef"].double() * scale, "intercept": got["intercept"].double()}
    for i, selected in enumerate(columns):
        values, tolerance = x.double().numpy()[:, selected], max(TOLERANCE[problem.dtype], 1e-7)
        assert_same(
            scaled, (i,), values, want["coef"][i].numpy(), float(want["intercept"][i]), tolerance
        )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("exponent", [20, 60, 100])
def test_huge_activations_are_separated(dtype, exponent):
    """With almost no penalty, separable classes are separated and nothing overflows."""
    x, y, columns = Problem("separable", 5, dtype, b=20).make()
    got = rk.logistic_fits(x * 2.0**exponent, y, columns)
    assert not got["errors"].any()
    for i, selected in enumerate(columns):
        w, c = got["coef"][i].double().numpy() * 2.0**exponent, got["intercept"][i].item()
        assert ((x.double().numpy()[:, selected] @ w + c > 0) == (y == 1)).all()


def test_float32_matches_float64_at_the_size_of_the_published_study():
    """500 stimuli, 100 neurons, and several batches of problems that end at different steps.

    The float32 results match float64 and scikit-learn, and hard predictions are equal.
    """
    rng = np.random.default_rng(0)
    y = (np.arange(500) % 10 == 0).astype(int)
    x = np.maximum(
        rng.standard_normal((500, 1500)) + 0.3 * rng.standard_normal(1500) * y[:, None], 0
    )
    x[:, :500] *= 30
    columns = np.stack([rng.choice(500 * (1 + i % 3), 100, replace=False) for i in range(60)])
    single = torch.from_numpy(x).float()
    got = rk.logistic_fits(single, y, columns)
    exact = rk.logistic_fits(single.double(), y, columns)
    largest = exact["coef"].abs().amax(1)
    assert ((got["coef"] - exact["coef"]).abs().amax(1) <= 1e-4 * largest).all()
    assert (got["errors"] == exact["errors"]).all()
    assert got["n_iter"].min() < got["n_iter"].max() - 5
    assert (got["converged"] & exact["converged"]).all()
    for i in (0, 1, 2, 59):
        values = single.double().numpy()[:, columns[i]]
        model = fit_scikit_learn(values, y, 1.0)
        assert_same(exact, (i,), values, model.coef_[0], model.intercept_[0], 1e-9)
        assert exact["errors"][i] == (model.predict(values) != y).sum()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_one_against_the_rest_matches_scikit_learn(backend):
    rng = np.random.default_rng(1)
    y = np.arange(60) % 4
    x = rng.standard_normal((60, 9)) + rng.standard_normal((4, 9))[y]
    columns = np.array([[0, 3, 5], [8, 2, 1]])
    got = rk.logistic_fits(x, y, columns, backend=backend)
    assert {name: value.shape[:2] for name, value in got.items()} == dict.fromkeys(got, (2, 4))
    for i, selected in enumerate(columns):
        model = LogisticRegression(solver="newton-cholesky", tol=1e-12)
        for k, binary in enumerate(OneVsRestClassifier(model).fit(x[:, selected], y).estimators_):
            np.testing.assert_allclose(got["coef"][i, k], binary.coef_[0], atol=1e-9)
            np.testing.assert_allclose(got["intercept"][i, k], binary.intercept_[0], atol=1e-9)
            assert got["errors"][i, k] == (binary.predict(x[:, selected]) != (y == k)).sum()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_start_and_limits_change_the_number_of_steps(backend):
    x, y, columns = Problem("noise", 10, "float32", b=5).make()
    cold = rk.logistic_fits(x, y, columns, backend=backend)
    near = cold["coef"] * 1.01, cold["intercept"] + 0.01
    warm = rk.logistic_fits(x, y, columns, start=near, backend=backend)
    np.testing.assert_allclose(warm["coef"], cold["coef"], atol=1e-4)
    assert (warm["n_iter"] < cold["n_iter"]).all()
    short = rk.logistic_fits(x, y, columns, max_iter=2, backend=backend)
    assert not short["converged"].any()
    assert (short["n_iter"] == 2).all()
    loose = rk.logistic_fits(x, y, columns, tol=0.1, backend=backend)
    assert (loose["n_iter"] < cold["n_iter"]).all()
    fine = rk.logistic_fits(x, y, columns, tol=1e-9, backend=backend)
    exact = rk.logistic_fits(x.double(), y, columns)
    np.testing.assert_allclose(fine["coef"], exact["coef"], atol=2e-7 * exact["coef"].abs().max())
    classes = rk.logistic_fits(x, np.arange(40) % 3, columns, backend=backend)
    again = classes["coef"], classes["intercept"]
    warm = rk.logistic_fits(x, np.arange(40) % 3, columns, start=again, backend=backend)
    assert (warm["n_iter"] < classes["n_iter"]).all()


def test_threads_and_kinds_of_arrays_do_not_change_results():
    """Results are bit-identical for any number of threads and every kind of array."""
    x, y, columns = Problem("1:9", 12, "float32", b=400).make()
    wide = np.repeat(columns, 9, axis=1)  # 108 neurons: several batches
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(rk.logistic_fits(x.repeat(13, 1), np.tile(y, 13), wide))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    torch_, numpy_ = rk.logistic_fits(x, y, columns), rk.logistic_fits(x.numpy(), y, columns)
    assert isinstance(numpy_["coef"], np.ndarray)
    np.testing.assert_array_equal(torch_["coef"], numpy_["coef"])
    whole = rk.logistic_fits(np.rint(x.numpy() * 10).astype(np.int32), y, columns[:2])
    assert whole["coef"].dtype == np.float64
    rounded = rk.logistic_fits(x.half(), y, columns[:3])
    exact = rk.logistic_fits(x.half().float(), y, columns[:3])
    assert torch.equal(rounded["coef"], exact["coef"])
