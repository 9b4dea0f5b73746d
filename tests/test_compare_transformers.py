"""Networks of Hugging Face's transformers, with random weights and padded batches."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import repsim_kernels as rk

transformers = pytest.importorskip("transformers")

LENGTHS = (7, 5, 1, 6, 4, 7, 2)
SMALL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_bert(layers=2, **options):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        **SMALL, **sizes, num_hidden_layers=layers, max_position_embeddings=16, **options
    )
    torch.manual_seed(0)
    return transformers.BertModel(config)


def make_gpt2():
    config = transformers.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    return transformers.GPT2Model(config)


def make_vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTModel(config)


def draw_batches(sizes=(4, 3), max_length=7):
    """Tokens of different lengths, padded with the token 0."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(LENGTHS), max_length, dtype=torch.long)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = torch.randint(1, 50, (length,), generator=generator)
    return [
        transformers.BatchEncoding({"input_ids": part, "attention_mask": (part > 0).long()})
        for part in tokens.split(sizes)
    ]


TEXTS = [
    ids[mask.bool()]
    for batch in draw_batches()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
]


def run_alone(network, names, **options):
    """Return the tokens (t, d) of each layer, by hooks on one text at a time without padding."""
    modules = dict(network.named_modules())
    found = {name: [] for name in names}
    hooks = [
        modules[name].register_forward_hook(
            lambda _m, _i, output, name=name: found[name].append(
                output[0][0] if isinstance(output, tuple) else output[0]
            )
        )
        for name in names
    ]
    network.eval()
    with torch.no_grad():
        for text in TEXTS:
            network(text[None], **options)
    for hook in hooks:
        hook.remove()
    return found


POOLED = {
    "mean": lambda tokens: torch.stack([x.mean(0) for x in tokens]),
    "max": lambda tokens: torch.stack([x.amax(0) for x in tokens]),
    "cls": lambda tokens: torch.stack([x[0] for x in tokens]),
    "last": lambda tokens: torch.stack([x[-1] for x in tokens]),
    "tokens": torch.cat,
}
LAYERS = {
    make_bert: {
        "blocks": ["encoder.layer.0", "encoder.layer.1"],
        "attention": ["encoder.layer.0.attention", "encoder.layer.1.attention"],
    },
    make_gpt2: {"blocks": ["h.0", "h.1"], "attention": ["h.0.attn", "h.1.attn"]},
}


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("kind", ["blocks", "attention"])
@pytest.mark.parametrize("pool", POOLED)
def test_padded_texts_are_what_they_are_alone(make, kind, pool):
    network = make()
    names = LAYERS[make][kind]
    got = rk.extract(network.train(), draw_batches(), kind, pool=pool)
    assert all(module.training for module in network.modules())
    want = run_alone(network, names)
    assert list(got) == names
    for name in names:
        torch.testing.assert_close(got[name], POOLED[pool](want[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_implementation_of_attention_leaves_padding_out(attention):
    network = make_bert(attn_implementation=attention)
    got = rk.extract(network, draw_batches(), ["encoder.layer.1"], pool="mean")
    want = run_alone(network, got)
    for name, x in got.items():
        torch.testing.assert_close(x, POOLED["mean"](want[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("output", ["hidden_states.1", "hidden_states.-2"])
def test_hidden_states_are_outputs_of_blocks(make, output):
    network = make()

    def call(model, batch):
        return model(**batch, output_hidden_states=True)

    options = {"pool": "mean", "output": output, "call": call}
    got = rk.extract(network, draw_batches(), "output", **options)["output"]
    block = LAYERS[make]["blocks"][0]
    torch.testing.assert_close(got, POOLED["mean"](run_alone(network, [block])[block]))


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_vit])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_all_modules_can_be_compared(make, pool):
    """Caches, masks and positions are not mistaken for features."""
    if make is make_vit:
        pixels = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        batches = [{"pixel_values": part} for part in pixels.split(4)]
    else:
        batches = draw_batches()
    network = make()
    features = rk.extract(network, batches, pool=pool)
    assert len(features) >= 20
    assert {len(x) for x in features.values()} == {7}
    constant = [name for name in features if name.endswith("token_type_embeddings")]
    with pytest.warns(match="no value for layers") if constant else nullcontext():
        m = rk.compare(network, loader=batches, pool=pool)
    assert m.rows == tuple(features)
    assert [m.rows[i] for i in np.flatnonzero(np.isnan(m.values.diagonal()))] == constant


def test_tokens_of_a_vision_transformer_are_counted_from_the_class_token():
    network, pixels = make_vit().eval(), torch.randn(5, 3, 16, 16)
    got = rk.extract(network, [pixels], ["layernorm"], pool="cls")["layernorm"]
    with torch.no_grad():
        torch.testing.assert_close(got, network(pixels).last_hidden_state[:, 0])


def pad_each_batch():
    """Every batch is as wide as its longest text."""
    width = [max(LENGTHS[:4]), max(LENGTHS[4:6]), LENGTHS[6]]
    return [
        {key: value[:, :t] for key, value in batch.items()}
        for t, batch in zip(width, draw_batches((4, 2, 1)), strict=True)
    ]


@pytest.mark.parametrize("memory", ["1GiB", 7 * 7 * 4 * 6])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_pair_of_padded_networks_is_that_of_hooks(memory, pool):
    networks = make_bert(3), make_bert(2, hidden_act="relu")
    got = rk.compare(
        *networks, [(batch, torch.zeros(1)) for batch in pad_each_batch()],
        layers="blocks", pool=pool, memory=memory,
    )  # fmt: skip
    sides = [
        [POOLED[pool](x) for x in run_alone(network, names).values()]
        for network, names in zip(networks, (got.rows, got.columns), strict=True)
    ]
    assert (len(got.rows), len(got.columns)) == (3, 2)
    torch.testing.assert_close(
        torch.tensor(got.values), rk.pairwise(*sides, debiased=True).double(), rtol=0, atol=1e-5
    )


def test_a_network_in_half_precision_gets_its_masks_and_tokens():
    network = make_bert().bfloat16()
    got = rk.extract(network, draw_batches(), "blocks", pool="mean")
    assert {x.dtype for x in got.values()} == {torch.bfloat16}


def test_a_mask_of_another_input_is_refused():
    network = nn.ModuleDict({"text": make_bert(), "image": make_vit()})
    batch = {**draw_batches((7,))[0], "pixel_values": torch.randn(7, 3, 16, 16)}

    def call(model, batch):
        model["text"](batch["input_ids"], batch["attention_mask"])
        model["image"](batch["pixel_values"])

    with pytest.raises(rk.LayerError, match=r"'mean' at layer 'image.layers.0' .* would cou"):
        rk.extract(network, [batch], ["image.layers.0"], call=call, pool="mean")
    got = rk.extract(network, [batch], ["image.layers.0"], call=call, pool=lambda x: x.mean(1))
    assert got["image.layers.0"].shape == (7, 16)
