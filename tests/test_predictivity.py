"""Linear predictivity against scikit-learn's ridge regression, fitted for each fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import NUMPY_DTYPES, NUMPY_LAYOUTS, SEEDS, TORCH_DTYPES, TORCH_LAYOUTS, pairs
from hypothesis import given
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close

BACKENDS = ("torch", "reference")
RIDGES = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)


def compute_kappa(x, ridge):
    return ridge * np.var(x, axis=0).sum()


def compute_r2(y, predicted):
    return r2_score(y, predicted, multioutput="variance_weighted")


def score_with_scikit_learn(x, y, ridge, folds):
    """Return R² from ridge regression, on a kernel if neurons outnumber stimuli."""
    alpha, predicted = compute_kappa(x, ridge), np.empty_like(y)
    if x.shape[1] <= len(x):
        predicted = cross_val_predict(Ridge(alpha=alpha), x, y, cv=KFold(folds))
        return compute_r2(y, predicted.reshape(y.shape))
    for train, test in KFold(folds).split(x):
        mean_x, mean_y = x[train].mean(0), y[train].mean(0)
        model = KernelRidge(alpha=alpha).fit(x[train] - mean_x, y[train] - mean_y)
        predicted[test] = model.predict(x[test] - mean_x) + mean_y
    return compute_r2(y, predicted)


def make_pair(n, p, q, seed=0):
    """Draw x (n, p), and y (n, q) that x predicts in part."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x[:, :3] @ rng.standard_normal((min(p, 3), q)) + rng.standard_normal((n, q))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    pairs(n=st.integers(2, 12), dtypes=NUMPY_DTYPES, layouts=NUMPY_LAYOUTS), RIDGES, st.integers()
)
def test_numpy_arrays_match_scikit_learn(backend, pair, ridge, folds):
    x, y = pair
    folds = 2 + folds % (x.n - 1)
    got = rk.linear_predictivity(x.numpy(), y.numpy(), ridge=ridge, folds=folds, backend=backend)
    # Dividing by a small ridge magnifies the rounding of a mean of 1000.
    assert_close(
        got, score_with_scikit_learn(x.values(), y.values(), ridge, folds), Tol(1e-7, 1e-7)
    )


@given(pairs(n=st.integers(5, 12), dtypes=TORCH_DTYPES, layouts=TORCH_LAYOUTS), RIDGES)
def test_tensors_match_the_reference(pair, ridge):
    x, y = pair
    got = rk.linear_predictivity(x.torch(), y.torch(), ridge=ridge)
    want = rk.linear_predictivity(x.values(), y.values(), ridge=ridge, backend="reference")
    assert got.dtype == torch.float64
    assert_close(got, want, Tol(1e-9, 1e-9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folds", [2, 5, 7, 23])
@pytest.mark.parametrize(("p", "q"), [(4, 6), (4, 90), (90, 4), (90, 70), (23, 23)])
def test_any_number_of_neurons_matches_scikit_learn(backend, folds, p, q):
    """Neurons or Grams on each side, uneven folds, and leave-one-out."""
    x, y = make_pair(23, p, q, seed=p)
    for ridge in (1e-4, 1.0, 1e3):
        got = rk.linear_predictivity(x, y, ridge=ridge, folds=folds, backend=backend)
        assert_close(got, score_with_scikit_learn(x, y, ridge, folds), SAME)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("p", "q"), [(4, 6), (4, 90), (15, 4), (15, 30)])
def test_gcv_minimises_the_generalised_error(backend, p, q):
    x, y = make_pair(20, p, q, seed=p + q)
    a, t = x - x.mean(0), y - y.mean(0)

    def criterion(ridge):
        hat = a @ a.T @ np.linalg.inv(a @ a.T + compute_kappa(x, ridge) * np.eye(20))
        return np.sum((t - hat @ t) ** 2) / np.trace(np.eye(20) - 1 / 20 - hat) ** 2

    ridges = 10 ** np.linspace(-6, 6, 2401)
    best = ridges[np.argmin([criterion(ridge) for ridge in ridges])]
    assert 1e-5 < best < 1e5
    got = rk.linear_predictivity(x, y, ridge="gcv", backend=backend)
    around = [score_with_scikit_learn(x, y, best * step, 5) for step in (0.99, 1, 1.01)]
    assert min(around) - 1e-12 <= got <= max(around) + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@given(SEEDS, RIDGES)
def test_rotation_scale_and_shift_do_not_change_the_score(backend, seed, ridge):
    """Rotation, scale and shift of either side, and duplicated columns."""
    rng = np.random.default_rng(seed)
    x, y = make_pair(11, 6, 4, seed)

    def score(x, y):
        return rk.linear_predictivity(x, y, ridge=ridge, folds=3, backend=backend)

    want = score(x, y)
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    assert_close(score(3 * x @ rotation + rng.standard_normal(6), y), want, SAME)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert_close(score(x, 7 * y @ rotation + rng.standard_normal(4)), want, SAME)
    assert_close(score(np.hstack([x, x]), np.hstack([y, y, y, y])), want, SAME)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_reach_1_and_fall_below_0(backend):
    x, y = make_pair(40, 5, 3)
    linear = x @ np.ones((5, 2)) + 7

    def score(x, y, ridge):
        return rk.linear_predictivity(x, y, ridge=ridge, folds=4, backend=backend)

    assert 1 - 1e-9 < score(x, linear, 1e-6) <= 1
    assert score(x, linear, 1.0) < 0.99
    # With a huge ridge, predictions are the means of the training folds.
    means = np.repeat([np.delete(y, np.r_[i : i + 10], 0).mean(0) for i in range(0, 40, 10)], 10, 0)
    assert score(x, y, 1e10) == pytest.approx(compute_r2(y, means), abs=1e-9)
    assert score(x, y, 1e10) < 0
    assert abs(score(x, y, 1.0) - score(y, x, 1.0)) > 0.01  # x predicts y


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_options_are_refused(backend):
    x, y = make_pair(6, 4, 3)

    def match(pattern, error=rk.OptionError):
        return pytest.raises(error, match=pattern)

    for call in (rk.linear_predictivity, rk.pairwise):
        arguments = (x, y) if call is rk.linear_predictivity else ([x], [y])
        more = {} if call is rk.linear_predictivity else {"metric": "linear_predictivity"}
        more |= {"backend": backend}
        for folds in (1, 7, 2.0, True, "5", None):
            with match("^folds: .* whole number of at least 2 and at most 6$"):
                call(*arguments, folds=folds, **more)
        for ridge in (0, 1e-7, 1e11, np.nan, True):
            with match("^ridge: .* of at least 1e-06 and at most 1e\\+10, or 'gcv'$"):
                call(*arguments, ridge=ridge, **more)
        with match("^ridge: 'loo'; expected a finite number .*, or 'gcv'$"):
            call(*arguments, ridge="loo", **more)
    with match("^y: the representation is the same for every stimulus", rk.ConstantError):
        rk.linear_predictivity(x, np.full((6, 2), 0.1), backend=backend)
    with match("^x: the representation is the same for every stimulus", rk.ConstantError):
        rk.linear_predictivity(np.ones((6, 2)), y, backend=backend)
    with match("^folds: 5; expected .* at most 4$"):
        rk.linear_predictivity(x[:4], y[:4], backend=backend)
