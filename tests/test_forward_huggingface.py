"""Transformers of Hugging Face and timm with random weights: heads, parts of outputs, errors."""

import pytest
import torch
from _heads import check_heads, make_head_cells
from torch import nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward

transformers = pytest.importorskip("transformers")
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 8}


def randomize(model):
    """Return a model in eval mode whose heads all matter."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


def build_bert(kind="BertModel"):
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **TEXT)
    return randomize(getattr(transformers, kind)(config))


def build_vit(kind="ViTModel"):
    return randomize(getattr(transformers, kind)(transformers.ViTConfig(**IMAGE)))


def build_gpt2():
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return randomize(transformers.GPT2LMHeadModel(config))


def build_timm():
    timm = pytest.importorskip("timm")
    return randomize(
        timm.models.VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=4, num_classes=5)
    )


def make_tokens():
    """Three texts of seven tokens, two of them padded."""
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [4]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def make_images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def get_logits(model, inputs):
    return (model(**inputs) if isinstance(inputs, dict) else model(inputs)).logits


def get_hidden(model, inputs):
    return (model(**inputs) if isinstance(inputs, dict) else model(inputs)).last_hidden_state


def get_last_logits(model, inputs):
    return model(**inputs, use_cache=False, logits_to_keep=1).logits


# network, inputs, its call, layer, projection whose input the heads return
NETWORKS = {
    "gpt2": (build_gpt2, make_tokens, get_logits, "transformer.h.{}.attn", "c_proj"),
    "gpt2-last": (build_gpt2, make_tokens, get_last_logits, "transformer.h.{}.attn", "c_proj"),
    "bert": (build_bert, make_tokens, get_hidden, "encoder.layer.{}.attention", "output.dense"),
    "bert-classifier": (
        lambda: build_bert("BertForSequenceClassification"),
        make_tokens,
        get_logits,
        "bert.encoder.layer.{}.attention",
        "output.dense",
    ),
    "vit": (build_vit, make_images, get_hidden, "layers.{}.attention", "o_proj"),
    "vit-classifier": (
        lambda: build_vit("ViTForImageClassification"),
        make_images,
        get_logits,
        "vit.layers.{}.attention",
        "o_proj",
    ),
    "timm": (build_timm, make_images, lambda model, x: model(x), "blocks.{}.attn", "proj"),
}


def run_with_masked_input(model, module, mask, run, inputs):
    """The output of a network with the input of a module zero where a mask is true."""
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda _module, args: (args[0].clone().masked_fill_(mask, 0), *args[1:])
    )
    try:
        with torch.no_grad():
            return run(model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_head_matches_a_hook(name):
    build, make_inputs, run, path, projection = NETWORKS[name]
    model, inputs = build(), make_inputs()
    modules = {f"{path.format(i)}:heads": f"{path.format(i)}.{projection}" for i in range(2)}

    def run_hooked(layer, mask):
        return run_with_masked_input(model, modules[layer], mask, run, inputs)

    forward, _ = check_heads(model, list(modules), inputs, run, run_hooked, n_heads=4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # One trace serves both layers: torch.fx's, or one export.
    assert len(forward._cuts._exports) == (name != "timm")


def test_heads_of_bert_without_its_projection():
    """Its inner attention module returns them in a tuple."""
    model, inputs = build_bert(), make_tokens()
    names = ["encoder.layer.1.attention.self:heads", "encoder.layer.1.attention:heads"]
    forward = AblatedForward(model, names, call=get_hidden)
    inner, outer = forward.prefixes(inputs).values()
    assert torch.equal(inner.activation, outer.activation)
    cells = make_head_cells(inner.activation, 4)
    assert torch.equal(forward.logits(inner, cells), forward.logits(outer, cells))


def test_parts_of_outputs_match_a_hook():
    model, inputs = build_gpt2(), make_tokens()
    layer = "transformer.h.0.attn"
    forward = AblatedForward(model, [layer, "transformer.h.1"], output=0, call=get_logits)
    states = forward.prefixes(inputs)  # the second layer returns a tensor, of which all counts
    mask = torch.zeros(7, 16, dtype=torch.bool)
    mask[2, ::3] = True
    for name, state in states.items():

        def hook(_module, _inputs, out):
            if isinstance(out, tuple):
                return out[0].masked_fill(mask, 0), *out[1:]
            return out.masked_fill(mask, 0)

        handle = model.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            expected = get_logits(model, inputs)
        handle.remove()
        (logits,) = forward.logits(state, mask.flatten()[None], batch=1)
        assert torch.equal(logits, expected)


def test_inputs_of_modules_match_a_hook():
    model, inputs = build_gpt2(), make_tokens()
    module = "transformer.h.1"  # its input is also the residual stream that it adds to
    forward = AblatedForward(model, f"{module}:input", call=get_logits)
    state = forward.prefix(inputs)
    mask = torch.zeros(7, 16, dtype=torch.bool)
    mask[:, 5:9] = True
    (logits,) = forward.logits(state, mask.flatten()[None], batch=1)
    expected = run_with_masked_input(model, module, mask, get_logits, inputs)
    assert torch.equal(logits, expected)


def test_constant_inputs_are_shared_by_all_stimuli():
    """Position ids (1, t) are the same for all; a change of their number needs a new export."""
    model, inputs = build_gpt2(), make_tokens()
    inputs["position_ids"] = torch.arange(7)[None] + 2
    forward = AblatedForward(model, "transformer.h.0.mlp", call=get_logits)
    for n in (3, 2):
        batch = {key: t[:n] if len(t) == 3 else t for key, t in inputs.items()}
        state = forward.prefix(batch)
        assert len(state) == n
        with torch.no_grad():
            assert torch.equal(forward.intact(state), get_logits(model, batch))


def test_errors_say_what_to_pass():
    model, inputs = build_gpt2(), make_tokens()
    layer = "transformer.h.0.attn"
    match = (
        r"^model: it returns CausalLMOutputWithCrossAttentions; expected a tensor \(n, …\): "
        r"pass call=lambda model, inputs: model\(\*\*inputs\).logits$"
    )
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, f"{layer}:heads").prefix(inputs)
    with pytest.raises(LayerError, match=r"model\(inputs\).logits$"):
        AblatedForward(model, f"{layer}:heads").prefix(inputs["input_ids"])
    match = f"^layer: '{layer}' returns a tuple of 2; expected a tensor, or output=0$"
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, layer, call=get_logits).prefix(inputs)
    match = r"^output: '2' is not in what .* returns, a tuple of 2; expected .* tensors: '0'"
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, layer, output=2, call=get_logits).prefix(inputs)
    for name in ("transformer.h.0.mlp", "transformer.h.0", "lm_head"):  # an MLP has a c_proj too
        with pytest.raises(LayerError, match=f"'{name}:heads': .* is not a known attention module"):
            AblatedForward(model, f"{name}:heads")
    unknown = inputs | {"input_ids": inputs["input_ids"] + 99}
    match = r"^call: it fails for these inputs, \['input_ids'\] int64 of .*: index out of range"
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, layer, output=0, call=get_logits).prefix(unknown)
    match = r"^call: it fails .*: GPT2LMHeadModel\(…\) argument after \*\* must be a mapping, not"
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, layer, call=lambda m, x: m(**x).logits).prefix(inputs["input_ids"])
    match = "^call: it fails for these inputs, .*: 'CausalLM.*' object has no attribute 'nope'"
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, layer, call=lambda m, x: m(**x).nope).prefix(inputs)
