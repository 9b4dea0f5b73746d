"""`compare`: a metric between all layers of two networks."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from _small_network import Returns
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import repsim_kernels as rk

N = 23
# Bytes that do not hold the features of all layers: with the first, the networks run several times,
# and Grams wait in files; with the second, batches are held.
SMALL, HELD = 16_000, 107_000


def make_network(seed, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 5),
    )  # fmt: skip


# In float64, so that a network's own rounding does not depend on the size of its batches.
A, B = make_network(0).double(), make_network(1, width=7).double()
IMAGES = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def split(x, sizes):
    """Split stimuli into batches of the sizes, repeated as needed."""
    batches, start = [], 0
    while start < len(x):
        size = sizes[len(batches) % len(sizes)]
        batches.append(x[start : start + size])
        start += size
    return batches


class Again:
    """A loader that can be read again, and does not hold its batches."""

    def __init__(self, make):
        self.make, self.passes = make, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.make())


@given(
    sizes=st.lists(st.integers(1, N), min_size=1, max_size=4),
    memory=st.sampled_from([16_000, 30_000, 107_000, "1GiB"]),
    metric=st.sampled_from(["cka", "cka_debiased"]),
    itself=st.booleans(),
)
@settings(deadline=None)
def test_exact_is_pairwise_for_any_batches_and_memory(sizes, memory, metric, itself):
    loader = Again(lambda: split(IMAGES, sizes))
    model_b = None if itself else B
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        got = rk.compare(
            A, model_b, loader, layers="conv", metric=metric, memory=memory, precision="float64"
        )
        sides = [list(rk.extract(m, [IMAGES], "conv").values()) for m in (A, model_b or A)]
        want = rk.pairwise(*sides, debiased=metric == "cka_debiased", precision="float64")
    np.testing.assert_allclose(got.values, want, rtol=0, atol=1e-10)
    assert (got.rows, got.n, got.metric) == (("0", "2"), N, metric)


@pytest.mark.parametrize("memory", [SMALL, "1GiB"])
def test_products_in_float32_are_within_their_error(memory):
    loader = split(IMAGES.float(), [5])
    networks = copy.deepcopy(A).float(), copy.deepcopy(B).float()
    values = [
        rk.compare(*networks, loader, layers="conv", memory=memory, precision=precision).values
        for precision in ("float32", "float64")
    ]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["procrustes", "rsa", "pwcca", "linear_predictivity"])
@pytest.mark.parametrize("memory", [SMALL, "1GiB"])
def test_other_metrics_are_those_of_pairwise(metric, memory):
    options = {"ridge": 0.1} if metric in ("pwcca", "linear_predictivity") else {}
    got = rk.compare(
        A, B, split(IMAGES, [5]), layers="conv", metric=metric, memory=memory, **options
    )
    sides = [list(rk.extract(m, [IMAGES], "conv").values()) for m in (A, B)]
    np.testing.assert_allclose(
        got.values, rk.pairwise(*sides, metric=metric, **options), rtol=1e-12
    )


def test_one_pass_is_enough_if_batches_fit():
    loader = Again(lambda: split(IMAGES, [5]))
    rk.compare(A, B, loader, layers="conv", memory="1GiB")
    assert loader.passes == 1


def test_a_loader_that_shuffles_is_refused_if_it_is_read_again():
    generator = torch.Generator().manual_seed(3)
    loader = Again(lambda: split(IMAGES[torch.randperm(N, generator=generator)], [5]))
    with pytest.raises(rk.OptionError, match="loader: batch 0 differs from that of the first pass"):
        rk.compare(A, B, loader, layers="conv", memory=SMALL)
    rk.compare(A, B, loader, layers="conv", memory="1GiB")  # one pass


def test_a_loader_that_is_used_up_is_refused_if_it_must_be_read_again():
    with pytest.raises(rk.OptionError, match=r"loader: .* can be read only once"):
        rk.compare(A, B, iter(split(IMAGES, [5])), layers="conv", memory=SMALL)
    rk.compare(A, B, iter(split(IMAGES, [5])), layers="conv", memory="1GiB")


def test_a_loader_that_ends_early_is_refused():
    counts = itertools.chain([5], itertools.repeat(3))
    loader = Again(lambda: split(IMAGES, [5])[: next(counts)])
    with pytest.raises(rk.OptionError, match="loader: 3 batches, but 5 in the first pass"):
        rk.compare(A, B, loader, layers="conv", memory=SMALL)


@pytest.mark.parametrize("memory", [SMALL, HELD, "1GiB"])
def test_two_loaders_are_aligned_by_ids(memory):
    order = np.random.default_rng(4).permutation(N)
    ids = np.array([f"image {i}" for i in range(N)])
    first = [(x, ids[5 * i : 5 * i + 5].tolist()) for i, x in enumerate(split(IMAGES, [5]))]
    second = [
        (x, ids[order][7 * i : 7 * i + 7].tolist()) for i, x in enumerate(split(IMAGES[order], [7]))
    ]
    options = {"layers": "conv", "memory": memory, "ids": lambda batch: batch[1]}
    got = rk.compare(A, B, Again(lambda: first), loader_b=Again(lambda: second), **options)
    want = rk.compare(A, B, first, layers="conv")
    np.testing.assert_allclose(got.values, want.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, rk.OptionError, "ids: None with two loaders"),
        (lambda batch: [0] * len(batch), rk.LabelError, "ids: 0 occurs twice in loader;"),
        (lambda batch: [1], rk.LabelError, "ids: 1 for a batch of 5 stimuli"),
        (lambda batch: batch[:, 0, 0, 0], rk.LabelError, "is in only one of the two loaders"),
    ],
)
def test_stimuli_that_do_not_match_are_refused(ids, error, message):
    loaders = split(IMAGES, [5]), split(IMAGES + 1, [5])
    with pytest.raises(error, match=message):
        rk.compare(A, B, loaders[0], loader_b=loaders[1], layers="conv", ids=ids)


def test_arrays_stand_for_either_side():
    loader = split(IMAGES, [5])
    want = rk.compare(A, B, loader, layers="conv").values
    a, b = (rk.extract(model, loader, "conv") for model in (A, B))
    arrays = {name: x.numpy() for name, x in b.items()}
    for got in (
        rk.compare(a, b),
        rk.compare(A, arrays, loader, layers="conv"),
        rk.compare(a, B, loader, layers="conv"),
    ):
        np.testing.assert_array_equal(got.values, want)
    assert rk.compare(a).rows == ("0", "2")


@pytest.mark.parametrize("memory", [SMALL, HELD, "1GiB"])
@pytest.mark.parametrize(
    "function", [lambda x: x / 0 * 0, torch.zeros_like, lambda x: torch.full_like(x, 0.1)]
)
def test_a_layer_without_a_value_is_marked_and_the_others_go_on(function, memory):
    network = nn.Sequential(A[0], Returns(function), A[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = rk.compare(
            nn.ModuleList([A[0], network[1], A[2]]), B, Again(lambda: split(IMAGES, [5])),
            layers=["0", "1", "2"], layers_b="conv", memory=memory,
            call=(lambda m, x: (m[1](x), m[2](m[0](x))), lambda m, x: m(x)),
        )  # fmt: skip
    want = rk.compare(A, B, split(IMAGES, [5]), layers="conv")
    np.testing.assert_allclose(got.values[0], want.values[0], rtol=0, atol=1e-6)
    assert np.isnan(got.values[1]).all()
    assert any(str(w.message).startswith("no value for layers '1': some of their") for w in caught)


def test_an_interrupted_pass_returns_nothing_and_leaves_nothing():
    def stop_at_the_third():
        yield from split(IMAGES, [5])[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rk.compare(A, B, Again(stop_at_the_third), layers="conv", memory=SMALL)
    assert not any(module._forward_hooks for module in [*A.modules(), *B.modules()])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loader": None}, rk.OptionError, "loader: None; expected the batches"),
        ({"model_a": {}}, rk.OptionError, "model_a: an empty dict"),
        ({"model_a": 3}, rk.LayerError, "model_a: 3; expected a torch.nn.Module"),
        ({"metric": "ckaa"}, rk.OptionError, "metric: 'ckaa'"),
        ({"estimator": "fast"}, rk.OptionError, "estimator: 'fast'; expected one of"),
        ({"estimator": "minibatch", "metric": "rsa"}, rk.OptionError, "estimator: 'minibatch'"),
        ({"memory": "much"}, rk.OptionError, "memory: 'much'"),
        ({"debiased": True}, rk.OptionError, "debiased: not an option"),
        ({"ridge": 1.0, "memory": SMALL}, rk.OptionError, "ridge: not an option"),
        ({"ids": 3, "loader_b": [IMAGES]}, rk.OptionError, "ids: 3; expected a function"),
        ({"ids": len}, rk.OptionError, "ids: given with one loader"),
        ({"ids": len, "loader_b": []}, rk.ShapeError, "loader_b: no batches"),
        ({"ridge": 1.0}, rk.OptionError, "ridge: not an option"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"model_a": A, "model_b": B, "loader": split(IMAGES, [5]), "layers": "conv"}
    with pytest.raises(error, match=message):
        rk.compare(**(arguments | change))


@pytest.mark.parametrize("itself", [True, False])
def test_minibatches_are_those_of_the_accumulator(itself):
    loader = split(IMAGES, [6])  # the last batch has 5 stimuli
    got = rk.compare(A, None if itself else B, loader, layers="conv", estimator="minibatch")
    accumulator = rk.MinibatchCKA()
    for batch in loader:
        sides = [list(rk.extract(m, [batch], "conv").values()) for m in (A, B)]
        accumulator.update(sides[0], None if itself else sides[1])
    want = accumulator.compute()
    np.testing.assert_allclose(got.values, want.values, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.standard_error, want.standard_error, rtol=1e-9, atol=1e-15)
    assert got.options["estimator"] == "minibatch"


def test_a_last_batch_that_is_too_small_is_left_out():
    with pytest.warns(UserWarning, match="3 stimuli are left out"):
        got = rk.compare(A, B, split(IMAGES, [10]), layers="conv", estimator="minibatch")
    assert (got.n, got.n_left_out) == (20, 3)


def test_layers_come_in_the_order_of_their_names():
    loader = split(IMAGES, [6])
    for options in ({"memory": SMALL}, {"memory": HELD}, {}, {"estimator": "minibatch"}):
        got = rk.compare(A, B, Again(lambda: loader), layers=["5", "0"], layers_b="conv", **options)
        assert got.rows == ("5", "0")
        want = rk.compare(A, B, loader, layers="0", layers_b="conv", **options)
        np.testing.assert_allclose(got.values[1], want.values[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory", [SMALL, "1GiB"])
def test_tokens_are_stimuli_of_their_own(memory):
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(5)).double()
    mask = torch.arange(5) < torch.tensor([[5], [3], [4], [5]])
    loader = [{"input": x[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    networks = [nn.Linear(3, p).double() for p in (4, 6)]
    got = rk.compare(
        *networks, Again(lambda: loader), pool="tokens", memory=memory, precision="float64",
        call=lambda model, batch: model(batch["input"]),
    )  # fmt: skip
    with torch.no_grad():
        want = rk.cka(*(model(x)[mask] for model in networks), debiased=True, precision="float64")
    assert got.n == 17
    np.testing.assert_allclose(got.values, [[want]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("itself", [True, False])
def test_a_layer_whose_stimuli_are_equally_far_apart_has_no_value(itself):
    layers = {"good": IMAGES[:, 0, 0], "one each": torch.eye(N).double()}
    with pytest.warns(UserWarning, match="no value for layers 'one each': some") as caught:
        got = rk.compare(layers, None if itself else layers)
    assert [w.filename for w in caught] == [__file__]
    assert np.isnan(got.values).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["a"]}, "layers: given with arrays only"),
        ({"layers_b": ["a"]}, "layers_b: given with arrays only"),
        ({"pool": "mean"}, "pool: given with arrays only"),
        ({"call": lambda model, batch: model(batch)}, "call: given with arrays only"),
        ({"ids": len}, "ids: given with arrays only"),
        ({"loader": [IMAGES]}, "loader: given with arrays only"),
        ({"estimator": "minibatch"}, "estimator: given with arrays only"),
    ],
)
def test_what_networks_need_is_refused_with_arrays(options, message):
    arrays = {"a": IMAGES.flatten(1), "b": IMAGES[:, 0, 0]}
    with pytest.raises(rk.OptionError, match=message):
        rk.compare(arrays, arrays, **options)


@pytest.mark.parametrize("count", [N - 1, N + 7])
def test_arrays_of_other_stimuli_than_their_loader_are_refused(count):
    arrays = {"a": torch.randn(count, 4).double()}
    loaders = [list(zip(split(IMAGES, [5]), split(torch.arange(N), [5]), strict=True))] * 2
    with pytest.raises(rk.ShapeError, match=f"model_b: {count} stimuli, but loader_b has {N}"):
        rk.compare(
            A, arrays, loaders[0], loader_b=loaders[1], layers="conv", ids=lambda b: b[1].tolist()
        )
    with pytest.raises(rk.ShapeError, match=rf"model_b\['a'\]: {count} stimuli, but model_a"):
        rk.compare(A, arrays, loaders[0], layers="conv")
