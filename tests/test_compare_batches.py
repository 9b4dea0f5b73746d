"""Batches of any kind: how they reach a network, are joined and recognised."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from _small_network import IMAGES, assert_same, make_network
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import repsim_kernels as rk
from repsim_kernels.comparison import batches


@dataclass(frozen=True)
class Sample:
    image: Tensor
    label: Tensor


Pair = namedtuple("Pair", "image label")
LABELS = torch.arange(5)
READ_ONLY = np.flip(IMAGES.numpy(), 0).copy()[::-1]
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES.numpy(),
        READ_ONLY,
        [IMAGES, LABELS],
        Pair(IMAGES, LABELS),
        {"input": IMAGES},
        UserDict(input=IMAGES),
        OrderedDict(input=IMAGES),
        MappingProxyType({"input": IMAGES}),
        defaultdict(list, input=IMAGES),
        ({"input": IMAGES.numpy()}, LABELS),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_any_kind_reach_the_network(batch):
    assert_same(rk.extract(make_network(), [batch]))


@pytest.mark.parametrize(
    ("batch", "call"),
    [
        (Sample(IMAGES, LABELS), lambda model, batch: model(batch.image)),
        (Pair([{"x": IMAGES}], LABELS), lambda model, batch: model(batch.image[0]["x"])),
        (UserDict(x=Sample(IMAGES, LABELS)), lambda model, batch: model(batch["x"].image)),
        (defaultdict(list, x=IMAGES), lambda model, batch: model(batch["x"]) + sum(batch["y"])),
    ],
    ids=["dataclass", "nested", "dataclass in a dict", "defaultdict"],
)
def test_a_call_gets_the_batch_as_it_is(batch, call):
    assert_same(rk.extract(make_network(), [batch], call=call))


TEXTS = ["a cat", "a dog", "two birds", "a hedgehog", "no animal"]


@pytest.mark.parametrize(
    ("batch", "get_texts"),
    [
        (TEXTS, lambda batch: batch),
        ({"text": TEXTS}, lambda batch: batch["text"]),
        ((TEXTS, [0] * 5), lambda batch: batch[0]),
        ([{"text": text} for text in TEXTS], lambda batch: [item["text"] for item in batch]),
    ],
    ids=["list", "dict", "tuple", "list of dicts"],
)
def test_batches_without_tensors_need_a_call(batch, get_texts):
    def call(model, batch):
        return model(torch.stack([IMAGES[TEXTS.index(text)] for text in get_texts(batch)]))

    assert_same(rk.extract(make_network(), [batch], call=call))
    with pytest.raises(rk.OptionError, match="call: None for a batch without tensors"):
        rk.extract(make_network(), [batch])


def test_batches_are_joined_only_along_the_stimuli():
    def join(*values):
        return batches.join_batches(list(values))

    x, y = torch.ones(2, 3), torch.zeros(4, 3)
    joined = join({"x": x, "size": (8, 8, 8), "n": 3}, {"x": y, "size": (8, 8, 8), "n": 3})
    assert torch.equal(joined["x"], torch.cat([x, y]))
    assert (joined["size"], joined["n"]) == ((8, 8, 8), 3)
    sample = join(Sample(x, x[:, 0]), Sample(y, y[:, 0]))
    assert torch.equal(sample.label, torch.cat([x, y])[:, 0])
    for a, b in [
        ({"x": x, "n": 3}, {"x": y, "n": 4}),
        ({"x": x, "text": ["a", "a"]}, {"x": x, "text": ["a", "a"]}),
        (["a", "b"], ["a", "b"]),
        ({"x": x}, {"x": y, "z": y}),
        (x, torch.zeros(4, 2)),
        ((x, torch.tensor(1)), (y, torch.tensor(2))),
        ((x, lambda: 1), (y, lambda: 1)),  # can't be compared
    ]:
        assert join(a, b) is None


def test_a_fingerprint_depends_on_every_value():
    x = torch.ones(2, 3)
    values = [
        x, 2 * x, (x, x), (x, 2 * x), {"x": x, "text": ["a", "b"]}, {"x": x, "text": ["b", "a"]},
        ["a", "b"], x.bfloat16(), np.array(["a", "b"]), np.array(["a", "c"]),
    ]  # fmt: skip
    assert len({batches.compute_fingerprint(value) for value in values}) == len(values)
    again = {"x": x.clone(), "text": ["".join(["a"]), "b"]}
    assert batches.compute_fingerprint(again) == batches.compute_fingerprint(values[4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.float16])
def test_inputs_get_the_dtype_of_the_network(dtype, given):
    network, batch = make_network().to(dtype), IMAGES.to(given)
    got = rk.extract(network, [(batch, LABELS)])
    assert_same(got, rk.extract(network, [batch.to(dtype)]))
    assert {x.dtype for x in got.values()} == {dtype}
    dtypes = []

    def call(model, batch):
        dtypes.append(batch.dtype)
        return model(batch.to(dtype))

    rk.extract(network, [batch], call=call)
    assert set(dtypes) == {given}  # a call gets the batch as it is


def test_whole_numbers_are_not_converted():
    network = nn.Sequential(nn.Embedding(9, 4), nn.Flatten()).half()
    tokens = torch.arange(6).view(3, 2)
    assert torch.equal(rk.extract(network, [tokens])["0"].view(3, 2, 4), network[0](tokens))


def test_a_mask_that_is_added_to_scores_is_refused():
    batch = {"x": torch.ones(2, 3, 4), "attention_mask": torch.tensor([[0, 0, -9.0]] * 2)}
    with pytest.raises(rk.ShapeError, match="attention_mask with values from -9 to 0; expected 1"):
        rk.extract(nn.Identity(), [batch], pool="mean", call=lambda model, batch: model(batch["x"]))


class Translator(nn.Module):
    """An encoder and a decoder of as many tokens, and one value for each stimulus."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, batch):
        y = self.encoder(batch["x"]) + self.decoder(batch["y"])
        return self.head(y.mean(1))


def make_pair_of_masks():
    x, mask = torch.randn(2, 2, 5, 4), torch.ones(2, 5)
    mask[1, 3:] = 0
    return {
        "x": x[0],
        "attention_mask": torch.ones(2, 5),
        "y": x[1],
        "decoder_attention_mask": mask,
    }


def call_on_inner(model, batch):
    return model(batch.get("a", batch))


@pytest.mark.parametrize("pool", ["flatten", "mean", "max", "cls", "last", "tokens"])
@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_masks_of_several_parts_are_refused(pool, layer):
    """Even if their widths agree: the encoder's mask would let the decoder's padding count."""
    batch = make_pair_of_masks()
    names = r"(a\.)?attention_mask and (a\.)?decoder_attention_mask"
    for values in (batch, {"a": batch}, batch | {"decoder_attention_mask": np.ones((2, 5))}):
        with pytest.raises(rk.LayerError, match=f"{pool!r} at layer {layer!r} .* with {names}, "):
            rk.extract(Translator(), [values], [layer], pool=pool, call=call_on_inner)


def test_masks_of_several_parts_are_not_for_functions_and_outputs_without_tokens():
    network, batch = Translator(), make_pair_of_masks()
    got = rk.extract(network, [batch], ["decoder"], pool=lambda a: a[:, 0], call=call_on_inner)
    assert torch.equal(got["decoder"], network.decoder(batch["y"])[:, 0])
    assert rk.extract(network, [batch], ["head"], call=call_on_inner)["head"].shape == (2, 1)
    alone = batch | {"decoder_attention_mask": None}
    got = rk.extract(network, [alone], ["encoder"], pool="mean", call=call_on_inner)
    torch.testing.assert_close(got["encoder"], network.encoder(batch["x"]).mean(1))


@pytest.mark.parametrize(
    "loader",
    [IMAGES, IMAGES.numpy(), TensorDataset(IMAGES), {"x": IMAGES}],
    ids=lambda loader: type(loader).__name__,
)
def test_a_loader_of_single_stimuli_is_refused(loader):
    """Otherwise the three channels of an image would be its stimuli."""
    network = nn.Conv2d(3, 3, 3)
    with pytest.raises(rk.OptionError, match=f"loader: {type(loader).__name__}; expected an"):
        rk.extract(network, loader)
    with pytest.raises(rk.OptionError, match="loader: "):
        rk.compare(network, loader=loader)


def test_the_number_of_stimuli_is_named_if_no_layer_has_it():
    images = [list(IMAGES)]  # a list of images: the first has three channels
    with pytest.raises(rk.LayerError, match=r"numbers \(3, …\) for a batch of 3 stimuli"):
        rk.extract(make_network(), images, call=lambda model, batch: model(torch.stack(batch)))
