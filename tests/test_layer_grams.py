"""Grams of several layers and the inner products of all pairs, against formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _draw import TORCH_DTYPES
from _layer_grams import assert_products_close, compare, layers, make_grams, multiply_grams
from hypothesis import given
from hypothesis import strategies as st

from bench.common.tolerances import SAME, assert_close
from repsim_kernels import _dispatch
from repsim_kernels._arrays import Source
from repsim_kernels.reference.cka import u_centre

BACKENDS = ("reference", "torch")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def product(x, y, debiased):
    """Return the inner product of centred Grams, or n (n - 3) HSIC₁ (Song et al. 2012, eq. 5)."""
    x, y = (a.double().numpy() - a[0].double().numpy() for a in (x, y))
    n = len(x)
    if not debiased:
        k, m = ((a - a.mean(0)) @ (a - a.mean(0)).T for a in (x, y))
        return np.sum(k * m)
    k, m = (a @ a.T * (1 - np.eye(n)) for a in (x, y))
    quadruples = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return np.sum(k * m) + quadruples - 2 / (n - 2) * (k.sum(0) @ m.sum(0))


def all_products(xs, ys, debiased):
    return (
        np.array([[product(x, y, debiased) for y in ys] for x in xs]),
        *(np.array([product(x, x, debiased) for x in side]) for side in (xs, ys)),
    )


@every_backend
@given(data=st.data(), debiased=st.booleans())
def test_products_match_the_formula(backend, data, debiased):
    xs = data.draw(layers(4 if debiased else 2, ("float64",)))
    ys = [x**2 for x in xs[:2]]
    _, *norms = all_products(xs, ys, False)
    got = compare(xs, ys, backend, debiased)
    assert_products_close(got, all_products(xs, ys, debiased), norms, 1e-11)
    assert all(a.dtype == torch.float64 for a in got)


@every_backend
@pytest.mark.parametrize("n", [5, 64, 200])  # one panel, and several
@pytest.mark.parametrize("debiased", [False, True])
def test_unpacked_grams_match_the_formula(backend, n, debiased):
    x = torch.randn(n, 30, generator=torch.Generator().manual_seed(n)).double()
    vectors, _, _ = make_grams([x, x**2], backend, debiased)
    for vector, features in zip(vectors, (x, x**2), strict=True):
        gram = _dispatch.call("unpack_gram", backend, Source("torch", "cpu"), vector, n=n)
        c = (features - features.mean(0)).numpy()
        want = u_centre(c @ c.T) if debiased else c @ c.T
        assert gram.dtype == torch.float64
        np.testing.assert_allclose(gram.numpy(), want, rtol=0, atol=1e-12 * np.abs(want).max())


@every_backend
@given(data=st.data(), debiased=st.booleans())
def test_traces_and_floors_match_the_formula(backend, data, debiased):
    xs = data.draw(layers(4 if debiased else 2, TORCH_DTYPES))
    _, traces, floors = make_grams(xs, backend, debiased)
    n = len(xs[0])
    want = [float(x.double().var(0, correction=0).sum()) * n for x in xs]
    assert_close(traces, want, SAME)
    eps = np.finfo(float).eps
    assert_close(floors, (n * eps * np.array(want)) ** 2 / (n - 1) * debiased, SAME)


@every_backend
@given(data=st.data(), debiased=st.booleans())
def test_grams_of_neurons_add_up(backend, data, debiased):
    xs = data.draw(layers(4 if debiased else 2, ("float64",)))
    whole = [torch.cat([x, x**2], 1) for x in xs]
    parts = [make_grams(side, backend, debiased)[:2] for side in (xs, [x**2 for x in xs])]
    grams, traces = (a + b for a, b in zip(*parts, strict=True))
    got = multiply_grams(grams, grams, len(xs[0]), backend, debiased)
    norms = compare(whole, whole, "reference", False)[1:]
    assert_products_close(got, compare(whole, whole, backend, debiased), norms, 1e-11)
    assert_close(traces, make_grams(whole, backend, debiased)[1], SAME)


@given(st.data())
def test_float32_products_are_close(data):
    xs = data.draw(layers(4, ("float16", "bfloat16", "float32")))
    want = compare(xs, xs, "reference", True)
    norms = compare(xs, xs, "reference", False)[1:]
    assert_products_close(compare(xs, xs, "torch", True, "float32"), want, norms, 1e-5)


def test_a_layer_that_is_not_finite_affects_its_own_products_alone():
    xs = list(torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0)))
    for backend in BACKENDS:
        want = compare(xs, xs, backend, True)
        for bad in (torch.nan, torch.inf):
            wrong = [xs[0], xs[1].clone(), xs[2]]
            wrong[1][3, 4] = bad
            xy, xx, _ = compare(wrong, xs, backend, True)
            assert xy[1].isnan().all()
            assert xx[1].isnan()
            assert torch.equal(xy[::2], want[0][::2])
            assert torch.equal(xx[::2], want[1][::2])


@every_backend
@pytest.mark.parametrize("debiased", [False, True])
def test_the_gram_of_a_constant_layer_is_zero(backend, debiased):
    xs = [torch.full((5, 3), 0.1, dtype=torch.float64), torch.eye(5, dtype=torch.float64)[:, :4]]
    _, traces, floors = make_grams(xs, backend, debiased)
    xy, xx, yy = compare(xs, xs, backend, debiased)
    assert traces[0] == floors[0] == xx[0] == yy[0] == 0
    assert (xy[0] == 0).all()


def test_grams_may_be_stored_in_float32():
    xs = list(torch.randn(3, 40, 90, generator=torch.Generator().manual_seed(1)))
    h, k = make_grams(xs, "torch", True)[0], make_grams(xs[:2], "torch", True)[0]
    want = multiply_grams(h, k, 40, "torch", True)
    got = multiply_grams(h.float(), k.float(), 40, "torch", True)
    assert all(a.dtype == torch.float64 for a in got)
    assert_products_close(got, want, want[1:], 1e-6)


def test_products_do_not_depend_on_the_length_of_blocks(monkeypatch):
    xs = list(torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(2)).double())
    want = compare(xs, xs[:2], "torch", True)
    monkeypatch.setattr("repsim_kernels.kernels.torch.memory.BLOCK", 35)  # 7 columns
    assert_products_close(compare(xs, xs[:2], "torch", True), want, want[1:], 1e-13)


@pytest.mark.parametrize("n", [33, 50, 64, 65])
@pytest.mark.parametrize("mean", [0.0, 20.0, 3000.0])  # float32 loses too many digits of the last
@pytest.mark.parametrize("debiased", [False, True])
def test_many_neurons_are_multiplied_block_by_block(n, mean, debiased):
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(n, 5, generator=generator)
    xs = [
        mean
        + shared @ torch.randn(5, p, generator=generator)
        + torch.randn(n, p, generator=generator)
        for p in (9000, 20, 8192)
    ]
    got = [
        multiply_grams(h, h, n, "torch", debiased)
        for h in (
            make_grams(xs, "torch", debiased, "float32")[0],
            torch.cat([make_grams([x], "torch", debiased, "float32")[0] for x in xs]),
        )
    ]
    want = compare(xs, xs, "reference", debiased)
    for products in got:
        assert_products_close(products, want, want[1:], 2e-6)
