"""The noise of distances: its forms, how its covariance is shrunk, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sklearn.covariance
import torch
from _draw import SEEDS
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from repsim_kernels._noise import Noise
from repsim_kernels.kernels.torch.noise import make_whitener, shrink
from repsim_kernels.reference.rdm import shrink_covariance

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 5))
LABELS = np.repeat(np.arange(4), 3)
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
# `rdm` warns of residuals that contain differences between folds.
IN_SEVERAL_FOLDS = pytest.mark.filterwarnings("ignore:noise. residuals")
CLOSE = Tol(1e-8, 1e-10)


def draw_residuals(rng, m, p):
    """Draw correlated residuals, which are not centred."""
    mixing = rng.standard_normal((p, p)) * rng.choice([0.1, 1], p) + 0.2
    return rng.standard_normal((m, p)) @ mixing + rng.standard_normal(p)


def centre(residuals):
    return torch.from_numpy(residuals - residuals.mean(0))


def whitened_precision(noise, p):
    """Return what rows of the identity show of Σ⁻¹."""
    white = make_whitener(noise)(torch.eye(p, dtype=torch.float64))
    return (white @ white.mT).numpy()


@given(st.integers(3, 40), st.integers(1, 40), SEEDS)
def test_shrunk_covariances_are_those_of_scikit_learn(m, p, seed):
    residuals = draw_residuals(np.random.default_rng(seed), m, p)
    estimate = sklearn.covariance.LedoitWolf().fit(residuals)
    r = centre(residuals)
    for gram in (r.mT @ r, r @ r.mT):
        assert float(shrink(r, gram)[0]) == pytest.approx(estimate.shrinkage_, rel=1e-9, abs=1e-13)
    assert_close(shrink_covariance(r.numpy()), estimate.covariance_, CLOSE)
    want = estimate.precision_ if p > 1 else 1 / estimate.covariance_
    got = whitened_precision(Noise(residuals=r), p)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * np.abs(want).max())


@EACH_BACKEND
@given(st.integers(3, 30), st.integers(2, 30), SEEDS)
def test_residuals_whiten_by_scikit_learns_covariance(backend, m, p, seed):
    rng = np.random.default_rng(seed)
    residuals = draw_residuals(rng, m + (m == p), p)  # square ones are tested below
    x = rng.standard_normal((8, p))
    options = {"labels": np.arange(8) % 4, "backend": backend}
    covariance = sklearn.covariance.LedoitWolf().fit(residuals).covariance_
    for distance in ("mahalanobis", "crossnobis"):
        got = rk.rdm(x, distance=distance, noise=residuals, **options)
        want = rk.rdm(x, distance=distance, noise=covariance, **options)
        assert_close(got, want, Tol(1e-8, 1e-8 * float(np.abs(want).max())))
        same = rk.rdm(x, distance=distance, noise=residuals, shrinkage="ledoit-wolf", **options)
        np.testing.assert_array_equal(got, same)
        got = rk.rdm(x, distance=distance, noise=residuals, shrinkage="diagonal", **options)
        want = rk.rdm(x, distance=distance, noise=np.diag(residuals.var(0)), **options)
        assert_close(got, want, CLOSE)


@EACH_BACKEND
@given(st.integers(2, 5), st.integers(1, 20), st.booleans(), SEEDS)
def test_labels_stand_for_residuals_within_conditions(backend, n_cond, p, as_text, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(n_cond), rng.integers(2, 5, n_cond)))
    x = draw_residuals(rng, len(labels), p) + 10 * rng.standard_normal((n_cond, p))[labels]
    residuals = x - np.array([x[labels == c].mean(0) for c in range(n_cond)])[labels]
    scale = len(x) / (len(x) - n_cond)
    covariance = sklearn.covariance.LedoitWolf().fit(residuals).covariance_ * scale
    noise = [f"condition {c}" for c in labels] if as_text else labels
    options = {"distance": "mahalanobis", "backend": backend}
    got = rk.rdm(x, noise=noise, **options)
    assert_close(got, rk.rdm(x, noise=covariance, **options), CLOSE)
    got = rk.rdm(x, noise=noise, shrinkage="diagonal", **options)
    variances = residuals.var(0) * scale
    assert_close(got, rk.rdm(x, noise=np.diag(variances), **options), CLOSE)


@IN_SEVERAL_FOLDS
def test_covariances_within_conditions_are_those_of_rsatoolbox():
    """Those of `cov_from_unbalanced`; `cov_from_measurements` has other degrees of freedom."""
    rsatoolbox = pytest.importorskip("rsatoolbox")
    dataset = rsatoolbox.data.Dataset(X, obs_descriptors={"condition": LABELS})
    for theirs, ours in (("shrinkage_eye", "ledoit-wolf"), ("diag", "diagonal")):
        covariance = rsatoolbox.data.noise.cov_from_unbalanced(dataset, "condition", method=theirs)
        options = {"distance": "crossnobis", "labels": LABELS}
        got = rk.rdm(X, noise=LABELS, shrinkage=ours, **options)
        assert_close(got, rk.rdm(X, noise=covariance, **options), CLOSE)


def test_a_square_array_is_a_covariance_only_if_it_is_symmetric():
    residuals = draw_residuals(RNG, 5, 5)
    covariance = sklearn.covariance.LedoitWolf().fit(residuals).covariance_
    want = rk.rdm(X, distance="mahalanobis", noise=covariance)
    assert_close(rk.rdm(X, distance="mahalanobis", noise=residuals), want, CLOSE)
    rounded = covariance.copy()
    rounded[0, 1] *= 1 + 1e-7  # as from float32 products
    assert_close(rk.rdm(X, distance="mahalanobis", noise=rounded), want, Tol(1e-6))


@given(st.integers(1, 4), st.integers(2, 6), SEEDS)
def test_noise_of_sets_of_neurons_is_that_of_each(n_sets, k, seed):
    rng = np.random.default_rng(seed)
    p, m = 12, int(rng.integers(3, 9))  # fewer and more residuals than neurons of a set
    residuals = centre(draw_residuals(rng, m, p))
    covariance = torch.from_numpy(np.cov(rng.standard_normal((30, p)), rowvar=False))
    neurons = torch.from_numpy(np.array([rng.permutation(p)[:k] for _ in range(n_sets)]))
    z = torch.from_numpy(rng.standard_normal((n_sets, 3, k)))
    for noise in (
        Noise(covariance=covariance),
        Noise(residuals=residuals, scale=1.5),
        Noise(variances=covariance.diagonal()),
    ):
        got = make_whitener(noise.select(neurons))(z)
        for i, chosen in enumerate(neurons):
            if noise.covariance is not None:
                own = noise._replace(covariance=covariance[chosen][:, chosen])
            elif noise.residuals is not None:
                own = noise._replace(residuals=residuals[:, chosen])
            else:
                own = noise._replace(variances=noise.variances[chosen])
            want = make_whitener(own)(z[i])
            assert_close(got[i] @ got[i].mT, want @ want.mT, CLOSE)


def test_no_matrix_of_neurons_by_neurons_is_formed():
    """It would take 320 GB."""
    p = 200_000
    x, residuals = RNG.standard_normal((6, p)), RNG.standard_normal((9, p))
    labels = np.arange(6) % 3
    d = rk.rdm(x, distance="crossnobis", labels=labels, noise=residuals)
    plain = rk.rdm(x, distance="crossnobis", labels=labels)
    # White noise: Σ is nearly the identity times the variance, 8 / 9 of it as a mean is subtracted.
    np.testing.assert_allclose(d, plain * 9 / 8, atol=0.005)


@EACH_BACKEND
@pytest.mark.parametrize("m", [8, 40])
@pytest.mark.parametrize("factor", [1e-60, 1e-20, 1e20, 1e60])
def test_units_do_not_matter(backend, m, factor):
    x, residuals = RNG.standard_normal((6, 20)), draw_residuals(RNG, m, 20)
    for options in ({}, {"labels": np.arange(6) % 3}):
        options["distance"] = "crossnobis" if options else "mahalanobis"
        want = rk.rdm(x, noise=residuals, backend=backend, **options)
        got = rk.rdm(x * factor, noise=residuals * factor, backend=backend, **options)
        assert_close(got, want, CLOSE)


@EACH_BACKEND
def test_singular_covariances_are_refused(backend):
    low_rank = np.outer(np.arange(1.0, 6), np.arange(1.0, 6))
    low_rank += np.outer(X[0], X[0])
    indefinite = np.eye(5) + 2 * (np.ones((5, 5)) - np.eye(5))
    two = RNG.standard_normal((2, 5))  # what shrinks a covariance needs a third
    for noise in (low_rank, indefinite, two):
        with pytest.raises(
            rk.ConvergenceError, match="noise: its covariance is not positive definite"
        ):
            rk.rdm(X, distance="mahalanobis", noise=noise, backend=backend)


def test_poorly_conditioned_covariances_are_used():
    scales = 10.0 ** np.arange(-6, 4, 2)
    got = rk.rdm(X * scales, distance="mahalanobis", noise=np.diag(scales**2))
    assert_close(got, rk.rdm(X), CLOSE)


FLAT = X.copy()
FLAT[:, 3] = 0.1 * LABELS  # no residual, but sums of 0.1 round
CROSSED = {"distance": "crossnobis", "labels": LABELS}
MAHALANOBIS = {"distance": "mahalanobis"}
TEXT = [f"c{c}" for c in LABELS]
REFUSED = [
    ({"distance": "cityblock"}, rk.OptionError, "distance: 'cityblock'; expected one of"),
    ({"noise": LABELS}, rk.OptionError, "noise: given with distance='euclidean'; expected None"),
    ({"shrinkage": "diagonal"}, rk.OptionError, "shrinkage: given with distance='euclidean'"),
    ({"folds": LABELS}, rk.OptionError, "folds: given with distance='euclidean'"),
    (MAHALANOBIS, rk.OptionError, "noise: None with .*expected a covariance (p, p), residuals"),
    (CROSSED | {"shrinkage": "diagonal"}, rk.OptionError, "shrinkage: 'diagonal' without noise"),
    (MAHALANOBIS | {"noise": np.eye(5), "shrinkage": "ledoit-wolf"}, rk.OptionError,
     "shrinkage: 'ledoit-wolf' with a covariance; expected residuals"),
    (MAHALANOBIS | {"noise": np.eye(5), "shrinkage": "oas"}, rk.OptionError,
     "shrinkage: 'oas'; expected one of 'ledoit-wolf', 'diagonal'"),
    (MAHALANOBIS | {"noise": np.eye(4)}, rk.ShapeError, "noise: shape (4, 4), but x has 5 neurons"),
    (MAHALANOBIS | {"noise": X[:1]}, rk.ShapeError, "noise: shape (1, 5), but x has 5 neurons"),
    (MAHALANOBIS | {"noise": np.ones((2, 3, 5))}, rk.ShapeError, "noise: shape (2, 3, 5)"),
    (MAHALANOBIS | {"noise": [0, 1]}, rk.LabelError, "noise: shape (2,); expected (12,), one per"),
    (MAHALANOBIS | {"noise": X[:, 0]}, rk.DtypeError, "noise: 12 values of dtype float64"),
    (MAHALANOBIS | {"noise": np.eye(5) + 1e-4 * X[:5]}, rk.ShapeError, "noise: (5, 5) and nearly"),
    (MAHALANOBIS | {"noise": np.arange(12)}, rk.OptionError, "noise: 12 conditions of one row"),
    (MAHALANOBIS | {"noise": X * np.nan}, rk.NonFiniteError, "noise: 60 of 60 values are NaN"),
    (MAHALANOBIS | {"noise": torch.eye(5)}, rk.DeviceError, "noise: a torch array on cpu, but x"),
    (MAHALANOBIS | {"noise": "labels"}, rk.DtypeError, "noise: 'labels'; expected an array"),
    (MAHALANOBIS | {"noise": np.ones((7, 5))}, rk.ConstantError, "noise: no neuron varies"),
    (MAHALANOBIS | {"noise": np.diag([1, 1, 0, 0, 1.0])}, rk.ConstantError,
     "noise: neuron 2 has variance 0, one of 2 such neurons"),
    (MAHALANOBIS | {"noise": FLAT[:, [0] * 2 + [3] * 3] * [1, 1, 1, 0, 1], "shrinkage": "diagonal"},
     rk.ConstantError, "noise: neuron 3 has variance 0, one of 1 such neurons"),
    ({"distance": "crossnobis"}, rk.LabelError, "labels: None with distance='crossnobis'"),
    ({"labels": LABELS[:5]}, rk.LabelError, "labels: shape (5,); expected (12,), one per row of x"),
    ({"labels": LABELS * 0}, rk.LabelError, "labels: only condition 0; expected at least two"),
    ({"labels": "face"}, rk.DtypeError, "labels: 'face'; expected an array of integers"),
    ({"labels": LABELS + 0.5}, rk.DtypeError, "labels: dtype float64; expected integers"),
    (CROSSED | {"folds": LABELS * 0}, rk.LabelError, "folds: only fold 0; expected at least two"),
    (CROSSED | {"folds": LABELS[:3]}, rk.LabelError, "folds: shape (3,); expected (12,), one per"),
    (CROSSED | {"labels": [*TEXT[:11], "tree"]}, rk.LabelError,
     "labels: condition 'tree' has a single row; expected at least two"),
    (CROSSED | {"labels": [*TEXT[:10], "tree", "tree"], "folds": np.arange(12) % 3},
     rk.LabelError, "labels: condition 'c3' has a single row"),
    (CROSSED | {"labels": [*TEXT[:9], *TEXT[:3]]}, rk.LabelError,
     "labels: condition 'c1' has 3 rows, but 'c0' has 6; expected equal numbers, or folds="),
    (CROSSED | {"labels": TEXT, "folds": ["a", "b", "a"] + ["a", "b", "c"] * 3}, rk.LabelError,
     "folds: condition 'c0' has no row in fold 'c'; expected rows of every condition"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_wrong_arguments_are_refused(options, error, message):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(error, match=f"^{pattern}") as caught:
        rk.rdm(X, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_neuron_that_is_constant_within_conditions_is_named():
    options = {"noise": LABELS, "shrinkage": "diagonal"}
    with pytest.raises(rk.ConstantError, match="noise: neuron 3 has variance 0"):
        rk.rdm(FLAT, distance="mahalanobis", **options)


def test_a_batch_is_refused():
    with pytest.raises(rk.ShapeError, match=r"x: shape \(2, 12, 5\); expected \(n, p\)") as caught:
        rk.rdm(np.stack([X, X]))
    assert "batched" not in str(caught.value)


@IN_SEVERAL_FOLDS
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_labels_of_any_kind_are_accepted(kind):
    want = rk.rdm(X, distance="crossnobis", labels=LABELS, noise=LABELS)
    labels = kind(LABELS)
    np.testing.assert_array_equal(
        rk.rdm(X, distance="crossnobis", labels=labels, folds=np.arange(12) % 3, noise=labels), want
    )
    names = np.array(["a", "b", "c", "d"])[LABELS]
    for text in (names, list(names)):
        got = rk.rdm(X, distance="crossnobis", labels=text, noise=text)
        np.testing.assert_array_equal(got, want)
