"""Which null `calibrate` uses: permutations, strata and moments; and what it refuses."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from _draw import SEEDS, make_layers
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import Tol, assert_close
from repsim_kernels import _check_permutations


def test_permutations_depend_on_the_seed_alone():
    x, y = make_layers(10)[:2]
    first, again, other = (rk.calibrate(x, y, seed=seed).null for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    strata = np.zeros(10, np.int64)
    indices = _check_permutations.draw_permutations(strata, 200, 0)
    np.testing.assert_array_equal(rk.calibrate(x, y, indices=indices).null, first)
    # Every stimulus comes to every place equally often.
    many = _check_permutations.draw_permutations(strata, 20_000, 3)
    counts = np.stack([np.bincount(column, minlength=10) for column in many.T])
    assert scipy.stats.chisquare(counts, axis=None).pvalue > 1e-3


def draw_ties(kind, rng, n):
    """Draw integers in which many distances from a stimulus are equal."""
    if kind == "classes":
        return np.eye(4)[rng.integers(4, size=n)]
    if kind == "repeats":
        return rng.standard_normal((5, 3))[rng.integers(5, size=n)]
    return rng.integers(1, 4, size=(n, 2)).astype(float)


@pytest.mark.parametrize("metric", ["mutual_knn", "cknna", "jaccard_knn"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("ignore:5 permutations:")
@pytest.mark.parametrize("kind", ["classes", "repeats", "grid"])
@settings(max_examples=10)
@given(seed=SEEDS)
def test_ties_count_in_the_order_of_the_permuted_stimuli(kind, dtype, metric, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(12, 40))
    layers = [draw_ties(kind, rng, n).astype(dtype) for _ in range(2)]
    layers.append(rng.standard_normal((n, 4)).astype(dtype))
    indices = np.stack([rng.permutation(n) for _ in range(5)])
    got = rk.calibrate(layers, layers, metric=metric, k=4, indices=indices)
    function = getattr(rk, metric)
    want = [
        [[float(function(x, y[order], k=4)) for y in layers] for x in layers] for order in indices
    ]
    np.testing.assert_allclose(got.null, want, rtol=0, atol=1e-6 if metric == "cknna" else 1e-12)


@given(st.lists(st.integers(-2, 2), min_size=6, max_size=20), SEEDS)
def test_strata_are_not_mixed(labels, seed):
    labels = np.array(labels)
    strata = _check_permutations.check_strata(labels, len(labels))
    indices = _check_permutations.draw_permutations(strata, 50, seed)
    np.testing.assert_array_equal(labels[indices], np.tile(labels, (50, 1)))
    np.testing.assert_array_equal(np.sort(indices), np.tile(np.arange(len(labels)), (50, 1)))


def test_what_differs_between_sessions_is_significant_only_without_strata():
    rng = np.random.default_rng(0)
    session = np.repeat([0, 1, 2], 20)
    x, y = (rng.standard_normal((60, 20)) + 2 * np.eye(3, 20)[session] for _ in range(2))
    assert rk.calibrate(x, y, debiased=True).p_value < 0.01
    within = rk.calibrate(x, y, debiased=True, strata=session)
    assert within.p_value > 0.05
    for labels in (
        ["abc"[i] for i in session],
        torch.from_numpy(session),
        np.array([*"abc"])[session],
    ):
        np.testing.assert_array_equal(
            rk.calibrate(x, y, debiased=True, strata=labels).null, within.null
        )


@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"kernel": "rbf"}], ids=str)
def test_moments_are_those_of_all_permutations(options):
    xs, ys = make_layers(6, widths=(3, 9)), make_layers(6, 1, (2, 5, 8))
    every = np.array([*itertools.permutations(range(6))])
    for left, right in ((xs, ys), (ys, xs), (xs, None)):
        score, _, _, _, null = rk.calibrate(left, right, indices=every, **options)
        got = rk.calibrate(left, right, null="moments", **options)
        want = null.mean(0), null.var(0), scipy.stats.skew(null)
        assert_close(got.null, np.stack(want), Tol(1e-8, 1e-10))
        assert_close(got.score, score, Tol(0, 1e-10))
        distribution = scipy.stats.pearson3(want[2], want[0], np.sqrt(want[1]))
        assert_close(got.p_value, distribution.sf(got.score), Tol(1e-6, 1e-9))
        assert_close(got.threshold, distribution.isf(0.05), Tol(1e-6, 1e-9))


def test_moments_give_the_p_value_of_many_permutations():
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2, 40, 3))
    y += 0.3 * x
    got = rk.calibrate(x, y, null="moments")
    drawn = rk.calibrate(x, y, permutations=100_000)
    assert 1e-3 < drawn.p_value < 2e-3
    assert got.p_value == pytest.approx(float(drawn.p_value), rel=0.25)  # 3 standard errors
    assert got.threshold == pytest.approx(float(drawn.threshold), abs=2e-3)
    mean, variance, _ = got.null
    assert scipy.stats.norm.sf(got.score, mean, math.sqrt(variance)) < drawn.p_value / 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "rsa"}, "null: 'moments' with metric 'rsa'; expected 'permutation'"),
        ({"strata": [0] * 12}, r"strata: \[0, 0.* but null='moments' has none"),
        ({"indices": [[*range(12)]]}, "indices: .*, but null='moments' has none"),
        ({"aggregate": "max"}, "aggregate: 'max', but null='moments' has none"),
        ({"permutations": 500}, "permutations: 500, but null='moments' has none"),
        ({"seed": 1}, "seed: 1, but null='moments' has none"),
    ],
)
def test_moments_are_of_all_permutations_alone(options, message):
    x, y, _ = make_layers(12)
    with pytest.raises(rk.OptionError, match=message):
        rk.calibrate(x, y, null="moments", **options)
    with pytest.raises(rk.ShapeError, match=r"xs: 5 stimuli in .*; expected at least 6"):
        rk.calibrate(x[:5], y[:5], null="moments")
    k, m = (a[:5] @ a[:5].T for a in (x, y))
    with pytest.raises(rk.ShapeError, match="xs: 5 stimuli with null='moments'; expected at least"):
        rk.calibrate(k, m, null="moments", kernel="precomputed")


def test_moments_have_no_reference(monkeypatch):
    x, y, _ = make_layers(12)
    message = (
        "^null: 'moments' with backend 'reference'; expected 'permutation', or backend 'torch'$"
    )
    with pytest.raises(rk.BackendUnavailable, match=message):
        rk.calibrate(x, y, null="moments", backend="reference")
    monkeypatch.setenv("REPSIM_BACKEND", "reference")
    with pytest.raises(rk.BackendUnavailable, match=message):
        rk.calibrate(x, y, null="moments")
    assert 0 < rk.calibrate(x, y, null="moments", backend="torch").p_value < 1


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (rk.ShapeError, "ys: 11 stimuli, but xs has 12", {"ys": np.eye(11)}),
        (rk.ShapeError, r"ys\[1\]: 11 stimuli, but xs has 12", {"ys": [np.eye(12), np.eye(11)]}),
        (rk.OptionError, "alpha: 1; expected a finite number above 0 and below 1$", {"alpha": 1}),
        (rk.OptionError, "alpha: 0; expected", {"alpha": 0}),
        (rk.OptionError, "permutations: 0; expected", {"permutations": 0}),
        (rk.OptionError, "aggregate: 'min'; expected one of 'max', 'mean'", {"aggregate": "min"}),
        (rk.OptionError, "null: 'normal'; expected", {"null": "normal"}),
        (rk.OptionError, "ridge: not an option of metric 'cka'", {"ridge": 1.0}),
        (rk.LabelError, "strata: 12 strata of one stimulus each", {"strata": range(12)}),
        (rk.LabelError, r"strata: shape \(2,\); expected \(12,\)", {"strata": ["a", "b"]}),
        (rk.OptionError, r"indices: shape \(12,\); expected \(K, 12\)", {"indices": range(12)}),
        (rk.OptionError, "indices: row 1 is not a permutation",
         {"indices": [[*range(12)], [0, *range(11)]]}),
        (rk.OptionError, "seed: together with indices", {"indices": [[*range(12)]], "seed": 1}),
        (rk.OptionError, "strata: together with indices",
         {"indices": [[*range(12)]], "strata": [0] * 12}),
        (rk.OptionError, "permutations: together with indices",
         {"indices": [[*range(12)]], "permutations": 9}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, arguments):
    x, y, _ = make_layers(12)
    with pytest.raises(error, match=f"^{message}"):
        rk.calibrate(**{"xs": x, "ys": y} | arguments)


def test_too_few_permutations_are_warned_about_with_the_number_that_would_do():
    x, y, _ = make_layers(12)
    with pytest.warns(rk.DegenerateWarning, match="^18 permutations: .*; at least 19 are needed$"):
        rk.calibrate(x, y, permutations=18)
    with pytest.warns(rk.DegenerateWarning, match="^1 permutation: .*; at least 99 are needed$"):
        rk.calibrate(x, y, indices=[[*range(12)]], alpha=0.01)
    strata = [0, 0, 0, *range(1, 10)]
    with pytest.warns(rk.DegenerateWarning, match="only 6 different permutations"):
        rk.calibrate(x, y, strata=strata)
    with pytest.warns(rk.DegenerateWarning, match="only 6 different permutations"):
        rk.calibrate(x[:3], y[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.calibrate(x, y, permutations=19)
        rk.calibrate(x, y, strata=[0, 0, 0, 1, 1, *range(2, 9)], alpha=0.1)


def test_undefined_similarities_are_named():
    x, y, _ = make_layers(12)
    with pytest.raises(rk.ConstantError, match=r"xs\[1\]: the representation is the same"):
        rk.calibrate([x, np.ones((12, 3))], y)
    with pytest.raises(rk.NonFiniteError, match="ys: 1 of"):
        rk.calibrate(x, np.where(np.arange(12)[:, None] == 3, np.nan, y)[:, :1])
    with pytest.raises(rk.ConstantError, match="distances that differ"):
        rk.calibrate(x, np.eye(12), metric="rsa")


def test_cca_without_a_ridge_warns_as_it_does_for_a_pair():
    x, y = np.random.default_rng(0).standard_normal((2, 8, 9))
    with pytest.warns(rk.DegenerateWarning, match="without a ridge"):
        got = rk.calibrate(x, y, metric="cca", squared=True)
    assert got.p_value == 1
