"""Several metrics at once: of a pair, and of all pairs of two lists."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _draw import pairs
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.common.tolerances import SAME, Tol, assert_close
from repsim_kernels._metrics import METRICS
from repsim_kernels.kernels.torch import gram, representation

NAMES = [metric.name for metric in METRICS if metric.pairwise]
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
OPTIONS = {"ridge": 0.1, "form": "angular", "sigma": 0.7, "kernel": "rbf", "folds": 3, "k": 4}
OWN = {  # the options that each function has
    "cka": ("kernel", "sigma"),
    "cka_debiased": ("kernel", "sigma"),
    "cca": ("ridge",),
    "pwcca": ("ridge",),
    "linear_predictivity": ("ridge", "folds"),
    "procrustes_distance": ("form",),
    "mutual_knn": ("k",),
    "cknna": ("k",),
    "jaccard_knn": ("k",),
}


def draw_layers(n, *widths, dtype="f8"):
    rng = np.random.default_rng(n)
    shared = rng.standard_normal((n, 2))
    return [
        (shared @ rng.standard_normal((2, p)) + rng.standard_normal((n, p))).astype(dtype)
        for p in widths
    ]


def compute_alone(name, x, y, **options):
    """Call the function of one metric."""
    if name == "cka_debiased":
        return rk.cka(x, y, debiased=True, **options)
    return getattr(rk, name)(x, y, **options)


@EACH_BACKEND
@given(pairs(n=st.integers(5, 12), kinds=("gaussian", "relu")))
def test_each_value_is_that_of_the_metric_alone(backend, pair):
    x, y = (z.values() for z in pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        got = rk.similarities(x, y, backend=backend)
        for name, value in got.items():
            assert isinstance(value, np.float64)
            if name == "pwcca" and x.shape[1] + y.shape[1] >= len(x):
                continue  # its weights are not unique
            assert_close(value, compute_alone(name, x, y, backend=backend), SAME)
    assert {"cka", "svcca", "procrustes", "procrustes_distance", "cca", "pwcca"} <= set(got)


@EACH_BACKEND
@pytest.mark.parametrize("widths", [(3, 4), (30, 40), (3, 30)])
def test_options_go_to_every_metric_that_has_them(backend, widths):
    xs, ys = draw_layers(12, *widths), draw_layers(12, *widths[::-1], 5)
    table = rk.similarities(xs[0], ys[0], backend=backend, **OPTIONS)
    lists = rk.pairwise(xs, ys, metric=NAMES, backend=backend, **OPTIONS)
    itself = rk.pairwise(xs, metric=tuple(NAMES), backend=backend, **OPTIONS)
    assert list(table) == list(lists) == list(itself) == NAMES
    for name in NAMES:
        own = {option: OPTIONS[option] for option in OWN.get(name, ())}
        want = [[compute_alone(name, x, y, **own) for y in ys] for x in xs]
        assert_close(lists[name], want, Tol(1e-7, 1e-7) if "form" in own else SAME)
        assert_close(table[name], lists[name][0, 0], SAME)
        assert_close(itself[name], rk.pairwise(xs, metric=name, backend=backend, **own), SAME)


@pytest.mark.parametrize("debiased", [False, True])
def test_float32_layers_keep_the_bound_of_cka(debiased):
    """Next to other metrics it is computed from their Grams in float64."""
    xs = draw_layers(40, 300, 500, 41, dtype="f4")
    name = "cka_debiased" if debiased else "cka"
    values = rk.pairwise(xs, metric=[name, "procrustes"])
    assert_close(values[name], rk.pairwise(xs, metric=name), Tol(0, 1e-6))
    exact = rk.pairwise(xs, debiased=debiased, precision="float64")
    assert_close(values[name], exact, SAME)


def test_grams_and_spectra_are_computed_once_for_all_metrics(monkeypatch):
    made = {"linear": 0, "spectrum_of_gram": 0}

    def count(module, name):
        function = getattr(module, name)

        def counted(*arguments):
            made[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(gram, "linear")
    count(representation, "spectrum_of_gram")
    xs = draw_layers(20, 30, 40, 20, dtype="f4")
    rk.pairwise(xs, metric=NAMES, ridge=0.1)
    assert made == {"linear": 3, "spectrum_of_gram": 3}
    rk.similarities(*xs[:2], ridge=0.1)
    assert made == {"linear": 5, "spectrum_of_gram": 5}


@EACH_BACKEND
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_metrics_that_need_more_stimuli_are_left_out(backend, n):
    x, y = draw_layers(n, 6, 7)
    needed = dict.fromkeys(NAMES, 2) | {"rsa": 3, "cka_debiased": 4, "linear_predictivity": 5}
    needed |= dict.fromkeys(["mutual_knn", "cknna", "jaccard_knn"], 4)
    got = rk.similarities(x, y, ridge=0.1, k=3, backend=backend)
    assert list(got) == [name for name in NAMES if needed[name] <= n]
    for name in set(NAMES) - set(got):
        with pytest.raises(rk.RepsimError, match="expected"):
            rk.similarities(x, y, metrics=[name], backend=backend)
    assert "linear_predictivity" in rk.similarities(x, y, ridge=0.1, folds=2, backend=backend)


@EACH_BACKEND
def test_metrics_that_are_not_defined_are_left_out_unless_they_are_named(backend):
    """All stimuli of x are equally far apart, up to rounding."""
    (y,) = draw_layers(6, 8)
    got = rk.similarities(np.eye(6), y, ridge=0.1, k=3, backend=backend)
    assert set(NAMES) - set(got) == {"rsa", "cka_debiased"}
    assert np.isfinite(list(got.values())).all()
    for name in ("rsa", "cka_debiased"):
        for metrics in ([name], ["procrustes", name]):
            with pytest.raises(rk.ConstantError, match=r"^x or y: its .*; expected distances that"):
                rk.similarities(np.eye(6), y, metrics=metrics, backend=backend)
            with pytest.raises(rk.ConstantError, match=r"^x or y: its .*; expected distances that"):
                rk.pairwise([np.eye(6), y], metric=metrics, backend=backend)


def test_results_have_the_kind_of_the_input_and_the_order_of_the_names():
    x, y = map(torch.from_numpy, draw_layers(9, 4, 5))
    got = rk.similarities(x, y, metrics=["rsa", "cka", "rsa"])
    assert list(got) == ["rsa", "cka"]
    for name, value in got.items():
        assert isinstance(value, torch.Tensor)
        assert (value.dtype, value.shape) == (torch.float64, ())
        assert_close(value, compute_alone(name, x, y), SAME)
    lists = rk.pairwise([x, y], [y], metric=["svcca"])
    assert lists["svcca"].shape == (2, 1)
    assert rk.similarities(x, y, metrics=[]) == {}


def test_wrong_names_and_options_are_refused():
    x, y = draw_layers(6, 4, 5)
    nan = np.where(np.arange(6)[:, None] == 2, np.nan, x)
    for call, error, match in (
        (lambda: rk.similarities(x, y, metrics=["mse"]), rk.OptionError, "metrics: 'mse'; expect"),
        (lambda: rk.similarities(x, y, metrics="cka"), rk.OptionError, "metrics: 'cka'; expected"),
        (lambda: rk.pairwise([x], metric=[]), rk.OptionError, "metric: no names; expected one or"),
        (lambda: rk.pairwise([x], metric=["cka", 3]), rk.OptionError, "metric: 3; expected one of"),
        (
            lambda: rk.pairwise([x], metric=["cka", "rsa"], ridge=1),
            rk.OptionError,
            "ridge: not an option of metric 'cka' or 'rsa'; expected one of debiased, .*, compare",
        ),
        (
            lambda: rk.pairwise([x], metric="cka_debiased", debiased=False),
            rk.OptionError,
            "debiased: not an option of metric 'cka_debiased'; expected one of kernel, sigma",
        ),
        (lambda: rk.similarities(x, y, batched=True), rk.OptionError, "batched: not an option"),
        (
            lambda: rk.similarities(x, y, folds=7, ridge=0.1),
            rk.OptionError,
            "folds: 7; .* at most 6",
        ),
        (lambda: rk.similarities(x, y, ridge="gcv"), rk.OptionError, "ridge: 'gcv'; expected a"),
        (
            lambda: rk.similarities(x @ x.T, y @ y.T, kernel="precomputed"),
            rk.OptionError,
            "kernel: 'precomputed' with metric 'procrustes', which is computed from features",
        ),
        (lambda: rk.similarities(x, y[:5]), rk.ShapeError, "y: 5 stimuli, but x has 6"),
        (lambda: rk.similarities(x[None], y), rk.ShapeError, r"x: shape \(1, 6, 4\); expected"),
        (lambda: rk.similarities(x, 0 * y), rk.ConstantError, "y: the representation is the same"),
        (lambda: rk.similarities(nan, y), rk.NonFiniteError, "x: 4 of 24 values"),
        (lambda: rk.similarities(nan, y, metrics=["cka"]), rk.NonFiniteError, "x: 4 of 24"),
        (lambda: rk.pairwise([x, nan], metric=NAMES, k=2), rk.NonFiniteError, r"xs\[1\]: 4 of 24"),
    ):
        with pytest.raises(error, match=f"^{match}"):
            call()


def test_kernel_matrices_serve_both_forms_of_cka():
    x, y = draw_layers(9, 4, 5)
    metrics = ["cka_debiased", "cka"]
    want = rk.similarities(x, y, metrics=metrics)
    got = rk.similarities(x @ x.T, y @ y.T, metrics=metrics, kernel="precomputed")
    assert list(got) == metrics
    for name in metrics:
        assert_close(got[name], want[name], SAME)


def test_warnings_name_the_caller():
    x, y = draw_layers(6, 8, 9)
    for call in (
        lambda **ridge: rk.similarities(x, y, **ridge),
        lambda **ridge: rk.pairwise([x, y], metric=["cca", "svcca"], **ridge),
    ):
        with pytest.warns(rk.DegenerateWarning, match="every canonical correlation") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(ridge=0.1)
