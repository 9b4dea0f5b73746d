"""Which tensors have gradients, in which dtype and batches; and what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from _draw import Representation
from _gradients import (
    CASES,
    EACH_CASE,
    assert_same_gradients,
    call,
    differentiate,
    draw_pair,
    plain,
)
from torch import Tensor

import repsim_kernels as rk

EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])

# Kinds of arguments


@EACH_CASE
@EACH_BACKEND
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["C", "F", "steps"])
def test_values_and_gradients_of_all_kinds_of_tensors(name, backend, dtype, layout):
    """Values are bit-identical; gradients are those in float64, rounded to the dtype."""
    xs = [Representation(9, p, "gaussian", dtype, layout, seed=p).torch() for p in (5, 14)]
    leaves = [x.requires_grad_() for x in xs]
    value = call(name, backend=backend)(*leaves)
    assert torch.equal(value, call(name, backend=backend)(*(x.detach() for x in leaves)))
    assert value.requires_grad
    assert value.dtype == torch.float64
    value.backward()
    got = [leaf.grad for leaf in leaves]
    assert [str(g.dtype) for g in got] == [f"torch.{dtype}"] * 2
    exact = [x.detach().double().contiguous() for x in xs]
    tolerance = max(1e-13, torch.finfo(got[0].dtype).eps)
    assert_same_gradients(exact, got, differentiate(call(name), *exact), tolerance)


@EACH_CASE
def test_either_side_or_both_may_require_grad(name):
    x, y = draw_pair(np.random.default_rng(0), 8, 5, 12)
    both = differentiate(call(name), x, y)
    (gx,) = torch.autograd.grad(call(name)(x, y.detach()), x)
    (gy,) = torch.autograd.grad(call(name)(x.detach(), y), y)
    assert torch.equal(gx, both[0])
    assert torch.equal(gy, both[1])
    (only_y,) = torch.autograd.grad(call(name)(x, y), y)  # although x requires grad too
    assert torch.equal(only_y, both[1])
    # The gradients of one tensor in both places add up, here to 0.
    (gx,) = torch.autograd.grad(call(name)(x, x), x)
    assert float(gx.abs().max()) < 1e-12


@EACH_CASE
def test_gradients_flow_through_views_and_other_operations(name):
    x, y = draw_pair(np.random.default_rng(1), 8, 12, 5)

    def loss(similarity: partial[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (1 - similarity((3 * x[:, ::2]).tanh(), y.mT.contiguous().mT)) ** 2

    got = differentiate(partial(loss, call(name)), x, y)
    assert_same_gradients([x, y], got, differentiate(partial(loss, plain(name)), x, y))


@EACH_CASE
@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (2, 1)), ((), (2,)), ((2, 3), ())])
def test_batches_have_the_gradients_of_their_items(name, shapes):
    """Also where a side is repeated along a dimension of the batch."""
    rng = np.random.default_rng(0)
    x, y = (
        torch.from_numpy(rng.standard_normal((*lead, 6, p)))
        for lead, p in zip(shapes, (4, 9), strict=True)
    )
    weights = torch.from_numpy(rng.standard_normal(np.broadcast_shapes(*shapes)))

    def loop(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.expand(*weights.shape, 6, 4), y.expand(*weights.shape, 6, 9)
        return sum(weights[i] * call(name)(x[i], y[i]) for i in np.ndindex(*weights.shape))

    got = differentiate(lambda x, y: weights * call(name, batched=True)(x, y), x, y)
    for a, b in zip(got, differentiate(loop, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_integers_and_frozen_tensors_may_be_the_other_side():
    rng = np.random.default_rng(0)
    x, _ = draw_pair(rng, 6, 4, 1)
    y = torch.from_numpy(rng.integers(0, 5, (6, 3)))
    for name in CASES:
        got, _ = differentiate(lambda x, _, name=name: call(name)(x, y), x, x)
        want, _ = differentiate(call(name), x, y.double())
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@EACH_CASE
def test_a_scaled_loss_does_not_underflow(name):
    """The factor reaches the gradient before it is rounded to float16."""
    x, y = (z.detach().half() * 100 for z in draw_pair(np.random.default_rng(0), 30, 40, 9))
    scale = 2.0**16
    got = differentiate(call(name), x, y, upstream=scale)
    exact = differentiate(call(name), x.double(), y.double())
    scaled = [x.double() / scale, y.double() / scale]
    assert_same_gradients(scaled, got, [g * scale for g in exact], 1e-3)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
@pytest.mark.parametrize("name", [name for name in CASES if "rbf" not in name])
def test_gradients_neither_overflow_nor_underflow(name, scale):
    x, y = draw_pair(np.random.default_rng(0), 6, 4, 9)
    got = differentiate(call(name), x * scale, y)
    want = differentiate(call(name), x, y)
    assert_same_gradients([x, y], [got[0] * scale, got[1]], want)


# What is refused


@EACH_CASE
def test_a_second_derivative_is_refused(name):
    x, y = draw_pair(np.random.default_rng(0), 6, 4, 3)
    first = torch.autograd.grad(call(name)(x, y), (x, y), create_graph=True)
    assert all(map(torch.equal, first, differentiate(call(name), x, y)))
    function = CASES[name][0].__name__
    for target in (x, y):
        message = f"^{function}: second derivatives are not computed.*without create_graph$"
        with pytest.raises(rk.GradientError, match=message):
            torch.autograd.grad(first[0].square().sum(), target, retain_graph=True)
    assert issubclass(rk.GradientError, RuntimeError)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@EACH_CASE
def test_nothing_is_recorded_without_grad_mode(name, mode):
    x, y = draw_pair(np.random.default_rng(0), 6, 4, 3)
    with mode():
        value = call(name)(x, y)
    assert not value.requires_grad
    assert torch.equal(value, call(name)(x.detach(), y.detach()))


def test_undefined_similarities_are_still_errors():
    x, y = (z.detach() for z in draw_pair(np.random.default_rng(0), 6, 4, 3))
    for name in CASES:
        with pytest.raises(rk.ConstantError):
            call(name)(torch.ones_like(x).requires_grad_(), y)
        bad = x.clone()
        bad[1, 2] = torch.nan
        with pytest.raises(rk.NonFiniteError, match=r"y: 1 of 24 values"):
            call(name)(y, bad.requires_grad_())
    with pytest.raises(rk.DeviceError, match="y: a numpy array"):
        rk.cka(x.requires_grad_(), y.numpy())


def test_ranks_are_refused_unless_no_gradient_is_required():
    x, y = draw_pair(np.random.default_rng(0), 6, 4, 3)
    message = "compare: 'spearman' of a tensor that requires grad; expected 'pearson' or 'cosine'"
    for arguments in ((x, y), (x.detach(), y), (x, y.detach())):
        with pytest.raises(rk.OptionError, match=message):
            rk.rsa(*arguments)
    with torch.no_grad():
        assert torch.equal(rk.rsa(x, y), rk.rsa(x.detach(), y.detach()))
