"""Activations of more than two dimensions, and tensors that are part of a derivative."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from _inputs import CELLS, DIFFERENTIABLE, LABELS, PAIRS, SINGLES, T, X, Y, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels import forward
from repsim_kernels._metrics import METRICS

# More than two dimensions


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.booleans())
def test_more_than_two_dimensions_are_refused(maps, tensor):
    x = np.random.default_rng(0).standard_normal((6, *maps))
    flat = Y
    if tensor:
        x, flat = torch.from_numpy(x), torch.from_numpy(Y)
    message = (
        r"{0}: shape \(6, .*\); expected \(n, p\).*{0}\.flatten\(1\).*batched=True for a batch"
    )
    for f, options in PAIRS.items():
        for a, b, name in ((x, flat, "x"), (flat, x, "y"), (x, x[..., :1], "x")):
            with pytest.raises(rk.ShapeError, match=message.format(name)):
                getattr(rk, f)(a, b, **options)
    for f, arguments in SINGLES.items():
        with pytest.raises(rk.ShapeError, match=message.format("x")):
            getattr(rk, f)(x, *arguments)
    for name, call in (
        ("x", lambda: rk.logistic_fits(x, LABELS, [[0]])),
        ("x", lambda: rk.probe_paper(x, CELLS, LABELS, 1)),
        (r"xs\[1\]", lambda: rk.pairwise([flat, x])),
        (r"ys\[0\]", lambda: rk.pairwise([flat], [x])),
    ):
        with pytest.raises(rk.ShapeError, match=rf"{name}: .*{name}\.flatten\(1\)") as caught:
            call()
        assert "batched" not in str(caught.value)


def test_feature_maps_are_refused_until_they_are_flattened():
    x, y = torch.randn(6, 3, 8, 8), torch.randn(6, 5, 4, 4)
    for f, options in PAIRS.items():
        with pytest.raises(rk.ShapeError, match=r"x: shape .*x\.flatten\(1\).*batched=True"):
            getattr(rk, f)(x, y, **options)
        result = getattr(rk, f)(x.flatten(1), y.flatten(1), **options)
        assert result.shape == ()


@pytest.mark.parametrize("f", [*SINGLES, *PAIRS])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_batch_gives_the_results_of_its_items(f, backend):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 4))
    options = {"backend": backend} | PAIRS.get(f, {})
    arguments = SINGLES.get(f, (Y,))
    result = getattr(rk, f)(x, *arguments, batched=True, **options)
    expected = [getattr(rk, f)(item, *arguments, **options) for item in x]
    single = getattr(rk, f)(x[0], *arguments, batched=True, **options)
    for i, item in enumerate(expected):
        if isinstance(item, dict):
            for name, values in item.items():
                np.testing.assert_allclose(result[name][i], values, rtol=1e-12, atol=1e-13)
        else:
            np.testing.assert_allclose(result[i], item, rtol=1e-12, atol=1e-13)
    np.testing.assert_equal(single, expected[0])


@pytest.mark.parametrize("f", [*SINGLES, *PAIRS])
def test_bad_batches_are_refused(f):
    function, arguments = partial(getattr(rk, f), **PAIRS.get(f, {})), SINGLES.get(f, (Y,))
    with pytest.raises(rk.OptionError, match="batched: 1; expected True or False"):
        function(X, *arguments, batched=1)
    with pytest.raises(rk.ShapeError, match=r"x: an empty batch, shape \(0, 6, 4\)"):
        function(X[None][:0], *arguments, batched=True)
    with pytest.raises(rk.ShapeError, match=r"x: shape \(6,\); expected \(…, n, p\)"):
        function(X[:, 0], *arguments, batched=True)


def test_pairwise_has_no_option_batched():
    with pytest.raises(rk.OptionError, match="batched: not an option of metric 'cka'"):
        rk.pairwise([X], batched=True)


# Gradients


@pytest.mark.parametrize(
    "x",
    [
        T.clone().requires_grad_(),
        T.clone().requires_grad_() * 2,
        torch.nn.Parameter(T.clone()),
        [row.clone().requires_grad_() for row in T],
        tuple(torch.nn.Parameter(T.clone())),
        [[1.0, 2, 3, torch.tensor(4.0, requires_grad=True)]] * 6,
    ],
    ids=["leaf", "result", "parameter", "list of leaves", "tuple of rows", "nested list"],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_tensors_that_require_grad_are_refused(x, mode):
    with mode():
        if isinstance(x, torch.Tensor):
            expected = (
                ".detach(), or whole tensors to cka, procrustes or rsa, the only functions that"
            )
            assert_refused(x, expected, without=DIFFERENTIABLE)
            x = [x]
        for f in DIFFERENTIABLE:
            message = r"x\[0\].* requires grad.*pass x\[.*\.detach\(\), or whole tensors to cka"
            with pytest.raises(rk.DtypeError, match=message):
                getattr(rk, f)(x, Y)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp
def test_derivatives_are_refused_in_both_modes():
    y = torch.from_numpy(Y)
    for transform, message in (
        (lambda f: torch.func.grad(f)(T), r"requires grad.*x\.detach\(\)"),
        (lambda f: torch.func.jvp(f, (T,), (T,)), r"with a tangent.*x\.detach\(\)"),
        (lambda f: torch.autograd.functional.jacobian(f, T), r"requires grad.*x\.detach\(\)"),
    ):
        with pytest.raises(rk.DtypeError, match=rf"x: .*{message}"):
            transform(lambda x: rk.cca(x, y, ridge=0.1))
    for f in DIFFERENTIABLE:
        with pytest.raises(rk.DtypeError, match=r"x: .*inside torch\.func.*plain tensor"):
            torch.func.grad(lambda x, f=f: getattr(rk, f)(x, y))(T)
        with pytest.raises(rk.DtypeError, match=r"x: .*with a tangent.*x\.detach\(\)"):
            torch.func.jvp(lambda x, f=f: getattr(rk, f)(x, y), (T,), (T,))


def test_detached_tensors_are_accepted():
    x = T.clone().requires_grad_()
    assert rk.cka(x.detach(), torch.from_numpy(Y)) == rk.cka(T, torch.from_numpy(Y))
    with torch.inference_mode():
        assert rk.cka(T + 0, torch.from_numpy(Y)) == rk.cka(T, torch.from_numpy(Y))


def test_activations_of_a_trainable_model_are_accepted():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
    images = torch.randn(6, 1, 5, 5, requires_grad=True)
    state = forward.AblatedForward(model.eval(), "1").prefix(images)
    result = rk.centered_gram(state.activation.flatten(1))
    expected = rk.centered_gram(model[:2](images).detach().flatten(1))
    torch.testing.assert_close(result, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_pairwise_refuses_anything_but_lists_of_arrays():
    nested = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(3, 4)])
    for xs in (3, None, nested, "cka", np.ones((4, 3)), torch.ones(4, 3)):
        with pytest.raises(rk.ShapeError, match=r"xs: .*; expected a list of arrays"):
            rk.pairwise(xs)


def test_a_target_of_none_is_refused_and_no_metrics_are_allowed():
    x = np.random.default_rng(0).standard_normal((6, 4))
    with pytest.raises(rk.LabelError, match="target: None; expected an integer label"):
        rk.selectivity_grid(x, [0, 1] * 3, None)
    assert rk.ablation_distances(x, [0, 0, 1, 1], metrics=[]) == {}


def test_every_metric_of_pairs_is_tried_with_wrong_input():
    assert set(PAIRS) == {metric.name for metric in METRICS if metric.has_function}
