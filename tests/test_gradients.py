"""Gradients against finite differences and autograd through plain PyTorch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from _draw import SEEDS, pairs
from _gradients import (
    CASES,
    EACH_CASE,
    assert_same_gradients,
    call,
    differentiate,
    draw_pair,
    offsets_matter,
    plain,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import repsim_kernels as rk
from bench.bench_gradients import compute_cka
from repsim_kernels.kernels.torch import features, gradients

# Values of the gradient


@EACH_CASE
@given(st.integers(0, 5), st.integers(0, 8), st.integers(0, 8), SEEDS)
def test_gradients_match_finite_differences(name, more_n, more_p, more_q, seed):
    """Also with fewer neurons than stimuli, or more, and an even or odd number of distances."""
    min_n, min_p = CASES[name][3:]
    rng = np.random.default_rng(seed)
    x, y = draw_pair(rng, min_n + more_n, min_p + more_p, min_p + more_q)
    torch.autograd.gradcheck(call(name), (x, y), atol=1e-6, rtol=1e-4, fast_mode=True)


@EACH_CASE
@given(pairs(n=st.integers(5, 40), p=st.integers(3, 60), kinds=("gaussian", "large mean")))
def test_gradients_match_plain_torch(name, pair):
    xs = [z.torch() for z in pair]
    want = differentiate(plain(name), *(x - x.mean(0) for x in xs))
    if offsets_matter(name):
        want = differentiate(plain(name), *xs)
    # A mean of 1000 costs plain torch six digits of the distances between such rows.
    tolerance = 1e-9 if all(z.kind == "gaussian" for z in pair) else 1e-5
    assert_same_gradients(xs, differentiate(call(name), *xs), want, tolerance)


@EACH_CASE
@given(pairs(n=st.integers(4, 12), p=st.integers(3, 20), dtypes=("float64",)))
def test_gradients_are_orthogonal_to_what_has_no_effect(name, pair):
    """Moving x along itself only scales it, and a constant column is a translation."""
    xs = [z.torch() for z in pair]
    try:
        got = differentiate(call(name), *xs)
    except rk.ConstantError:
        assume(False)
    for x, g in zip(xs, got, strict=True):
        assert torch.isfinite(g).all()
        centred = x if offsets_matter(name) else x - x.mean(0)
        size = float(centred.norm())
        assert abs(float((g * centred).sum())) <= 1e-9 * max(1, size * float(g.norm()))
        if not offsets_matter(name):
            assert float(g.sum(0).abs().max()) <= 1e-9 * max(1 / size, float(g.norm()))


@pytest.mark.parametrize("n", [3, 4, 5, 6])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_the_bandwidth_moves_with_the_median(n, sigma):
    """Entrywise, for an odd and an even number of squared distances, zeros included."""
    x, y = draw_pair(np.random.default_rng(n), n, 3, n + 1)
    torch.autograd.gradcheck(partial(rk.cka, kernel="rbf", sigma=sigma), (x, y), atol=1e-7)


@given(st.integers(4, 8), st.booleans(), SEEDS)
def test_kernel_matrices_have_gradients(n, debiased, seed):
    x, y = draw_pair(np.random.default_rng(seed), n, 3, n + 2)
    kernels = [(z @ z.T).detach().requires_grad_() for z in (x, y)]
    function = partial(rk.cka, kernel="precomputed", debiased=debiased)
    torch.autograd.gradcheck(function, kernels, atol=1e-6, fast_mode=True)
    # Those of linear CKA follow by the chain rule.
    got = differentiate(lambda x, y: function(x @ x.T, y @ y.T), x, y)
    assert_same_gradients([x, y], got, differentiate(partial(rk.cka, debiased=debiased), x, y))


@pytest.mark.parametrize("name", [name for name in CASES if name != "procrustes"])
@pytest.mark.parametrize("shape", [(9, 5, 2), (5, 9, 3)])
def test_low_rank_is_differentiable(name, shape):
    n, p, rank = shape
    rng = np.random.default_rng(p)
    x = torch.from_numpy(rng.standard_normal((n, rank)) @ rng.standard_normal((rank, p)))
    _, y = draw_pair(rng, n, 1, 7)
    torch.autograd.gradcheck(call(name), (x.requires_grad_(), y), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
@given(pairs(n=st.integers(4, 9), p=st.integers(3, 6), kinds=("low rank", "duplicate rows")))
def test_the_order_of_stimuli_does_not_matter(name, pair):
    """Neither where distances tie, also at the median, nor where stimuli are equal."""
    x, y = (z.torch() for z in pair)
    order = torch.from_numpy(np.random.default_rng(x.shape[1]).permutation(len(x)))
    try:
        want = differentiate(call(name), x, y)
    except rk.ConstantError:
        assume(False)
    got = differentiate(call(name), x[order], y[order])
    assert_same_gradients([x, y], got, [g[order] for g in want], 1e-7)


@pytest.mark.parametrize(("n", "p"), [(9, 5), (5, 9)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_procrustes_is_differentiable_where_the_other_side_has_no_higher_rank(n, p, rank):
    rng = np.random.default_rng(rank)
    x, _ = draw_pair(rng, n, p, 1)
    y = torch.from_numpy(rng.standard_normal((n, rank)) @ rng.standard_normal((rank, 7)))
    torch.autograd.gradcheck(lambda x: rk.procrustes(x, y), (x,), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "corr" not in name])
@pytest.mark.parametrize(("n", "p"), [(9, 4), (5, 20)])
def test_neurons_that_are_zero_have_no_gradient(name, n, p):
    """Procrustes has no derivative there; 0 is its smallest subgradient."""
    x, y = draw_pair(np.random.default_rng(0), n, p, 6)
    padded = torch.cat([x, torch.zeros(n, 2, dtype=x.dtype)], 1)
    got = differentiate(call(name), padded, y)
    assert (got[0][:, p:] == 0).all() or offsets_matter(name)
    assert float(got[0][:, p:].abs().max()) < 1e-12
    assert_same_gradients([x, y], [got[0][:, :p], got[1]], differentiate(call(name), x, y))


@pytest.mark.parametrize("name", [name for name in CASES if "rbf" in name or "rsa" in name])
def test_equal_stimuli_have_finite_gradients(name):
    """The distance between equal rows adds nothing: what they do together is differentiable."""
    distinct, y = (z.detach() for z in draw_pair(np.random.default_rng(3), 5, 4, 6))
    index = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    y = torch.cat([y, torch.from_numpy(np.random.default_rng(4).standard_normal((2, 6)))])
    torch.autograd.gradcheck(lambda x: call(name)(x[index], y), (distinct.requires_grad_(),))
    gradient, _ = differentiate(call(name), distinct[index], y)
    assert torch.isfinite(gradient).all()


# How they are computed


@pytest.mark.parametrize("debiased", [False, True])
@given(st.integers(10, 30), st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_few_neurons_need_no_gram(debiased, n, p, q, seed):
    x, y = draw_pair(np.random.default_rng(seed), n, p, q)
    assert features.are_cheaper([x, y], comparisons=1)
    function = partial(rk.cka, debiased=debiased)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "_centre_kernel", None)  # raises if it is called
        got = differentiate(function, x, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "are_cheaper", lambda *_, **__: False)
        patch.setattr(gradients, "_differentiate_features", None)
        want = differentiate(function, x, y)
    assert_same_gradients([x, y], got, want)


def test_an_outlier_leaves_the_digits_to_the_gram(monkeypatch):
    """U-centring cancels nearly all of a norm of features; the Gram of stimuli keeps the rest."""
    x, y = (z.detach() for z in draw_pair(np.random.default_rng(0), 40, 2, 3))
    x[0] += 1e4
    calls = []
    centre = gradients._centre_kernel
    monkeypatch.setattr(
        gradients, "_centre_kernel", lambda *a, **o: [calls.append(a), centre(*a, **o)][1]
    )
    got = differentiate(partial(rk.cka, debiased=True), x, y)
    assert len(calls) == 2
    want = differentiate(partial(compute_cka, debiased=True), x, y)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-9)


@EACH_CASE
@pytest.mark.parametrize("p", [3, 40])
def test_only_the_arguments_are_kept(name, p):
    x, y = draw_pair(np.random.default_rng(0), 20, p, p)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: [kept.append(t), t][1], lambda t: t):
        value = call(name)(x, y)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), y.data_ptr()]
    value.backward()


@EACH_CASE
def test_arguments_must_not_change_before_the_backward_pass(name):
    x, y = draw_pair(np.random.default_rng(0), 6, 4, 3)
    value = call(name)(x, y)
    with torch.no_grad():
        x[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_settings_of_the_caller_change_nothing():
    x, y = (z.detach().float() for z in draw_pair(np.random.default_rng(0), 12, 30, 20))
    for name in CASES:
        want = differentiate(call(name), x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = differentiate(call(name), x, y)
        assert all(map(torch.equal, got, want))


def test_blocks_of_neurons_are_joined(monkeypatch):
    x, y = draw_pair(np.random.default_rng(0), 6, 50, 20)
    want = [differentiate(call(name), x, y) for name in CASES]
    monkeypatch.setattr("repsim_kernels.kernels.torch.memory.BLOCK", 6 * 7)
    for name, gradient in zip(CASES, want, strict=True):
        assert_same_gradients([x, y], differentiate(call(name), x, y), gradient)
