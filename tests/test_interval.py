"""Confidence intervals: every deletion against recomputation, and what they are intervals of."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from _draw import TORCH_DTYPES, Representation, representations
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close
from repsim_kernels.errors import ConstantError, OptionError, ShapeError
from repsim_kernels.kernels.torch import interval as kernel
from repsim_kernels.ops.interval import _get_t_quantile

RNG = np.random.default_rng(0)
N = 12
X, Y, Z = (RNG.standard_normal((N, p)) for p in (6, 4, 30))
Y += X[:, :4]
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
JACKKNIFE = {
    "debiased": {},
    "cka_debiased": {"metric": "cka_debiased"},
    "biased": {"debiased": False},
    "rbf": {"kernel": "rbf", "sigma": 0.7},
    "biased rbf": {"kernel": "rbf", "debiased": False},
    "rsa pearson": {"metric": "rsa", "compare": "pearson"},
    "rsa cosine": {"metric": "rsa", "compare": "cosine", "distance": "correlation"},
}
EACH_JACKKNIFE = pytest.mark.parametrize("options", JACKKNIFE.values(), ids=JACKKNIFE)


def compute(x, y, options):
    """Return the metric by the public function of all pairs."""
    options = {"metric": "cka"} | options
    if options["metric"] == "cka":
        options = {"debiased": True} | options
    return float(rk.pairwise([x], [y], **options)[0, 0])


def compute_without_each(x, y, options):
    """Return the metric without each stimulus; an RBF kernel keeps its bandwidth."""
    if options.get("kernel") != "rbf":
        return [compute(np.delete(x, i, 0), np.delete(y, i, 0), options) for i in range(len(x))]
    kernels = [rk.centered_gram(z, kernel="rbf", sigma=options.get("sigma")) for z in (x, y)]
    options = {"kernel": "precomputed", "debiased": options.get("debiased", True)}
    deleted = [[np.delete(np.delete(k, i, 0), i, 1) for k in kernels] for i in range(len(x))]
    return [compute(*pair, options) for pair in deleted]


def compute_variance(x, y, options):
    """Return the jackknife's variance by its definition."""
    values = np.array(compute_without_each(x, y, options))
    return (len(x) - 1) / len(x) * np.sum((values - values.mean()) ** 2)


@EACH_BACKEND
@EACH_JACKKNIFE
@pytest.mark.parametrize("y", [Y, Z], ids=["related", "unrelated"])
def test_variance_is_that_of_recomputed_metrics(options, backend, y):
    result = rk.interval(X, y, backend=backend, **options)
    assert result.estimate == pytest.approx(compute(X, y, options), abs=1e-12)
    variance = compute_variance(X, y, options)
    if abs(result.estimate) < 2 * math.sqrt(variance):
        assert result.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)
    else:  # without what pairs of stimuli contribute twice
        assert variance / 4 * (1 - 1e-9) <= result.standard_error**2 < variance
    margin = stats.t.ppf(0.975, N - 1) * result.standard_error
    ends = result.estimate - margin, result.estimate + margin
    assert (result.low, result.high) == pytest.approx(ends, rel=1e-9)


@EACH_JACKKNIFE
@settings(max_examples=15)
@given(data=st.data(), n=st.integers(6, 14))
def test_torch_agrees_with_the_reference(options, data, n):
    dtypes = ("float64", "float32", "float16")
    draw = representations(n=st.just(n), dtypes=dtypes)
    x, y = (data.draw(draw).numpy() for _ in range(2))
    try:
        want = rk.interval(x, y, backend="reference", **options)
    except ConstantError:
        with pytest.raises(ConstantError):
            rk.interval(x, y, **options)
        return
    assert_close(np.array(rk.interval(x, y, **options)), np.array(want), Tol(1e-6, 1e-7))


def test_correction_is_what_pairs_move():
    """Twice the sum, over all pairs, of the squared derivative by the weight of a pair."""
    u, v = (kernel._u_centre(torch.from_numpy(z @ z.T)) for z in (X, Z))
    form = kernel._choose_form(N, "cka", {"debiased": True})
    result = kernel._jackknife(kernel._prepare(u, form), kernel._prepare(v, form), form)

    def compare(weights):
        xy, xx, yy = ((weights * a * b).sum() for a, b in ((u, v), (u, u), (v, v)))
        return xy / (xx * yy).sqrt()

    moves = torch.func.grad(compare)(torch.ones_like(u))
    assert float(result[0]) == pytest.approx(float(compare(torch.ones_like(u))), rel=1e-12)
    assert float(result[2]) == pytest.approx(float(2 * (moves**2).sum()), rel=1e-10)
    assert float(result[2]) < 0.75 * float(result[1])


@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("cka", {"debiased": True, "kernel": "linear", "sigma": None}),
        ("cka", {"debiased": False, "kernel": "linear", "sigma": None}),
        ("rsa", {"distance": "euclidean", "compare": "pearson"}),
    ],
)
def test_an_outlier_costs_few_digits(size, metric, options):
    """Without it, sums are differences of far larger ones."""
    x, y = X.copy(), Y.copy()
    x[3, 0] += size
    y[5, 1] -= size
    sides = [torch.from_numpy(x)], [torch.from_numpy(y)]
    variance = float(kernel.interval(*sides, metric=metric, **options)["variance"])
    assert variance == pytest.approx(compute_variance(x, y, {"metric": metric} | options), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"metric": "rsa", "compare": "cosine"}])
def test_layers_give_the_interval_of_each_pair(options):
    result = rk.interval([X, Z], (Y, X, Z), **options)
    for name, values in result._asdict().items():
        assert values.shape == (2, 3)
        for (i, a), (j, b) in itertools.product(enumerate([X, Z]), enumerate([Y, X, Z])):
            single = getattr(rk.interval(a, b, **options), name)
            assert np.shape(single) == ()
            assert values[i, j] == pytest.approx(float(single), abs=1e-14)
    column = rk.interval([X, Z], Y, **options)
    np.testing.assert_array_equal(column.estimate, result.estimate[:, :1])
    assert_close(column.low, result.low[:, :1], SAME)


def test_a_copy_has_no_width():
    for options in ({}, {"debiased": False}, {"metric": "rsa", "compare": "pearson"}):
        np.testing.assert_allclose(rk.interval(X, X * 3 + 5, **options), (1, 1, 1, 0), atol=1e-7)
        np.testing.assert_array_equal(rk.interval(X, X, **options), (1, 1, 1, 0))


@pytest.mark.parametrize("metric", ["procrustes", "svcca", "rsa", "linear_predictivity"])
def test_subsampling_is_that_of_subsets(metric):
    result = rk.interval(X, Y, metric=metric, method="subsampling", seed=3)
    rng, values = np.random.default_rng(3), []
    for _ in range(200):
        rows = np.sort(rng.permutation(N)[: N - N // 4])
        values.append(compute(X[rows], Y[rows], {"metric": metric}))
    assert result.estimate == pytest.approx(compute(X, Y, {"metric": metric}), rel=1e-12)
    assert result.standard_error == pytest.approx(math.sqrt(3) * np.std(values), rel=1e-9)
    margin = stats.t.ppf(0.975, N - 1) * result.standard_error
    assert result.high - result.estimate == pytest.approx(margin, rel=1e-9)
    assert rk.interval(X, Y, metric=metric, method="subsampling", seed=3) == result
    assert rk.interval(X, Y, metric=metric, method="subsampling").low != result.low


def test_both_methods_agree_for_many_stimuli():
    x = Representation(300, 8, "relu").values()
    y = x + RNG.standard_normal(x.shape)
    exact = rk.interval(x, y)
    drawn = rk.interval(x, y, method="subsampling")
    assert drawn.standard_error == pytest.approx(exact.standard_error, rel=0.25)
    assert drawn.estimate == pytest.approx(exact.estimate, rel=1e-12)


def test_kernel_matrices_are_deleted_in_both_directions():
    k, m = X @ X.T, Y @ Y.T
    for method in ("jackknife", "subsampling"):
        result = rk.interval(k, m, kernel="precomputed", method=method)
        np.testing.assert_allclose(result, rk.interval(X, Y, method=method), rtol=1e-9)
    with pytest.raises(ShapeError, match=r"x: 4 stimuli; expected at least 5"):
        rk.interval(k[:4, :4], m[:4, :4], kernel="precomputed")


def test_a_bootstrap_misses_what_it_resamples():
    """Why there is no method "bootstrap": copies of a stimulus are alike in both."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 50, 20))
    observed = compute(x, y, {})
    rows = rng.integers(0, 50, (200, 50))
    values = [compute(x[r], y[r], {}) for r in rows]
    assert np.quantile(values, 0.025) > observed
    result = rk.interval(x, y)
    assert result.low < 0 < result.high


@pytest.mark.parametrize("freedom", [*range(1, 30), 99, 199, 998, 4000])
def test_quantiles_are_those_of_student(freedom):
    for level in (0.01, 0.5, 0.9, 0.95, 0.999):
        want = stats.t.ppf((1 + level) / 2, freedom)
        assert _get_t_quantile(level, freedom) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_and_kind_of_array(dtype):
    x, y = (Representation(20, p, dtype=dtype, seed=p).torch() for p in (5, 9))
    want = rk.interval(x.double().numpy(), y.double().numpy())
    for options in ({}, {"backend": "reference"}):
        result = rk.interval(x, y, **options)
        for got, value in zip(result, want, strict=True):
            assert isinstance(got, torch.Tensor)
            assert got.dtype == torch.float64
            assert float(got) == pytest.approx(value, rel=1e-6)
    assert rk.interval(X.tolist(), Y.tolist()) == rk.interval(X, Y)


LEVELS = (0.5, 0.9, 0.99)


def test_a_higher_level_is_wider_with_the_same_standard_error():
    results = [rk.interval(X, Y, level=level) for level in LEVELS]
    assert len({r.standard_error for r in results}) == 1
    assert results[0].low > results[1].low > results[2].low


ERRORS = [
    ({"level": 0}, OptionError, "level: 0; expected a finite number above 0"),
    ({"level": 1}, OptionError, "level: 1; expected a finite number above 0 and below 1$"),
    ({"level": 95}, OptionError, "level: 95; expected .* below 1$"),
    ({"method": "bootstrap"}, OptionError, "method: 'bootstrap'; expected one of 'jackknife', "),
    ({"metric": "procrustes"}, OptionError, "method: 'jackknife' with .*; expected 'subsampling'"),
    ({"metric": "rsa"}, OptionError, "method: .* 'rsa' with compare='spearman'; expected 'subsa"),
    ({"metric": "rsa", "debiased": False}, OptionError, "debiased: False with metric 'rsa'"),
    ({"metric": "cka_debiased", "debiased": False}, OptionError, "debiased: False with metric"),
    ({"debiased": None}, OptionError, "debiased: None; expected True or False"),
    ({"precision": "float32"}, OptionError, "precision: not an option here"),
    ({"folds": 3}, OptionError, "folds: not an option of metric 'cka'"),
    ({"metric": ["cka"]}, OptionError, r"metric: \['cka'\]; expected one of"),
    ({"seed": -1}, OptionError, "seed: -1; expected a whole number of at least 0"),
    ({"x": None}, ShapeError, r"x: NoneType; expected an array \(n, p\), or a list of arrays \("),
    ({"y": X[:4]}, ShapeError, "y: 4 stimuli"),
    ({"x": X[:4], "y": Y[:4]}, ShapeError, "x: 4 stimuli .*; expected at least 5"),
    ({"x": [X[:3]], "y": Y[:3], "debiased": False}, ShapeError, r"x\[0\]: 3 stim.* at least 4"),
    ({"x": X * 0}, ConstantError, "x: the representation is the same for every stimulus"),
    ({"x": np.eye(N)}, ConstantError, "x or y: its kernel matrix is zero after centring"),
]


@EACH_BACKEND
@pytest.mark.parametrize(("changed", "error", "match"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors_name_the_argument(changed, error, match, backend):
    with pytest.raises(error, match=match) as caught:
        rk.interval(**({"x": X, "y": Y, "backend": backend} | changed))
    assert len(str(caught.value).splitlines()) == 1


@EACH_BACKEND
@pytest.mark.parametrize("debiased", [False, True])
def test_a_representation_that_rests_on_one_stimulus_is_refused(backend, debiased):
    """The other stimuli are all equal or, which debiased CKA can't compare, equally far apart."""
    x = np.eye(N) if debiased else np.zeros((N, N))
    x[4] = x[5] + 1 - debiased
    options = {"backend": backend, "debiased": debiased}
    with pytest.raises(ConstantError, match=r"^x or y: without one of its stimuli"):
        rk.interval(x, Y, **options)
    with pytest.raises(ConstantError, match=f"not defined for 9 of the {N} stimuli"):
        rk.interval(x, Y, method="subsampling", **options)


def test_subsampling_needs_as_many_stimuli_as_the_metric():
    options = {"metric": "linear_predictivity", "folds": 5, "method": "subsampling"}
    with pytest.raises(ShapeError, match=r"^x: 5 stimuli .*; expected at least 6"):
        rk.interval(X[:5], Y[:5], **options)
    rk.interval(X[:6], Y[:6], **options)


def test_warnings_of_the_metric_appear_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rk.interval(X, Z, metric="cca", method="subsampling")
    assert len([w for w in caught if w.category is rk.DegenerateWarning]) == 1
