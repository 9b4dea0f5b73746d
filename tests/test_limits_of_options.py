"""Ridges, penalties and bandwidths at the limits of their ranges and beyond."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk

CELLS, LABELS = [0, 0, 1, 1], [0, 0, 1, 1, 2, 2]


def draw_pair(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((6, 4)) * scale, rng.standard_normal((6, 2))


def list_ridge_calls(x, y, backend, **options):
    """Yield a call of every function that takes a ridge and a penalty."""
    g, options = x @ x.T, {"backend": backend} | options
    names = ["cca", "cca_squared"]
    yield lambda: rk.cca(x, y, **options)
    yield lambda: rk.cca(x, y, squared=True, **options)
    yield lambda: rk.pwcca(x, y, **options)
    yield lambda: rk.pairwise([x, y], metric="pwcca", **options)
    options = {"ridge": 0.0} | options
    yield lambda: rk.ablation_distances(x, CELLS, metrics=[*names, "pwcca"], **options)
    yield lambda: rk.gram_ablation_distances(g, g[None] / 2, metrics=names, **options)


def flatten_result(result):
    arrays = result.values() if isinstance(result, dict) else [result]
    return np.concatenate([np.ravel(values) for values in arrays])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@settings(max_examples=5)
@given(SEEDS)
def test_the_largest_ridges_leave_no_similarity(backend, scale, seed):
    x, y = draw_pair(seed, scale)
    for options in ({"ridge": 1e10}, {"penalty": 1e150}):
        for call in list_ridge_calls(x, y, backend, **options):
            values = flatten_result(call())
            assert np.isfinite(values).all()
            assert ((np.abs(values) < 1e-6) | (np.abs(values - 1) < 1e-6)).all()


def test_ridges_above_the_limit_are_refused():
    x, y = draw_pair(0)
    for name, value in (("ridge", 1.1e10), ("penalty", 1.1e150), ("ridge", 1e300)):
        for call in list_ridge_calls(x, y, None, **{name: value}):
            with pytest.raises(rk.OptionError, match=f"{name}: 1.* and at most 1e"):
                call()


@pytest.mark.parametrize("name", ["ridge", "penalty"])
@given(SEEDS, st.sampled_from([1e-300, 1e-30, 1e-17, 1e-15, 1e-12, 0.9e-10]))
def test_a_ridge_that_rounding_hides_raises(name, seed, share):
    """Removing two of four neurons leaves half of the four correlations."""
    x, _ = draw_pair(seed)
    energy = np.sum((x - x.mean(0)) ** 2) / len(x)
    for metric in ("cca", "cca_squared"):
        options = {"metrics": [metric], "ridge": 0.0}
        too_small, large_enough = (
            {name: s * (1 if name == "ridge" else energy)} for s in (share, 1.1e-10)
        )
        with pytest.raises(rk.ConvergenceError, match=f"{name}: .* leaves a matrix singular to"):
            rk.ablation_distances(x, CELLS, **options | too_small)
        got = rk.ablation_distances(x, CELLS, **options | large_enough)[metric]
        np.testing.assert_allclose(got, 0.5, atol=1e-4)
    # Other metrics ignore the ridge.
    got = rk.ablation_distances(x, CELLS, metrics=["cka", "svcca"], ridge=share)
    np.testing.assert_equal(got, rk.ablation_distances(x, CELLS, metrics=["cka", "svcca"]))


def test_solver_failure_is_not_blamed_on_the_ridge(monkeypatch):
    def fail(*arguments, **options):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    x, y = draw_pair(0)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(rk.ConvergenceError, match=r"^pwcca: linalg\.svd: the algorithm failed"):
        rk.pwcca(x, y, ridge=0.1)
    with pytest.raises(rk.ConvergenceError, match=r"^pairwise: linalg\.svd: the algorithm"):
        rk.pairwise([x, y], metric="pwcca", ridge=0.1)


@pytest.mark.parametrize("folds", [None, 2])
@pytest.mark.parametrize("probe", ["ridge", "logistic"])
@settings(max_examples=10)
@given(SEEDS)
def test_the_smallest_ridge_of_a_probe_matches_the_reference(probe, folds, seed):
    """The torch backend derives held-out outputs from one inverse; the reference fits each fold."""
    x, _ = draw_pair(seed)
    call = lambda ridge, backend="torch": rk.ablation_decodability(  # noqa: E731
        x, CELLS, LABELS, ridge=ridge, folds=folds, probe=probe, score="margin", backend=backend
    )
    with pytest.raises(rk.OptionError, match=r"ridge: 9e-07; .* least 1e-06 and at most 1e"):
        call(9e-7)
    if folds is None and probe == "logistic":
        return
    got, want = call(1e-6), call(1e-6, "reference")
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(SEEDS)
def test_the_widest_kernel_is_linear(backend, seed):
    """The centred exp(-d² / 2b²) differs from the linear kernel by a share of about 1 / sigma²."""
    x, y = draw_pair(seed)
    linear = rk.cka(x, y, backend=backend)
    for sigma in (1e4, 1e5):
        got = rk.cka(x, y, kernel="rbf", sigma=sigma, backend=backend)
        assert got == pytest.approx(linear, abs=1e-6)
    for call in (
        lambda sigma: rk.cka(x, y, kernel="rbf", sigma=sigma),
        lambda sigma: rk.centered_gram(x, kernel="rbf", sigma=sigma),
        lambda sigma: rk.pairwise([x, y], kernel="rbf", sigma=sigma),
    ):
        for sigma in (5e-324, 1e-11, 1e6, 1e300):
            with pytest.raises(
                rk.OptionError, match=r"sigma: .* of at least 1e-10 and at most 1000"
            ):
                call(sigma)
