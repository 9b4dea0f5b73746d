"""Heads of PyTorch's own attention, whose output projection is no call of a module."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from _heads import check_heads, make_head_cells
from torch import nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward


@pytest.fixture(autouse=True)
def perturb_fast_paths(monkeypatch):
    """Make the fast paths differ by rounding from the operations that they replace."""
    attend, encode = torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd

    def perturb(out):
        return out * (1 + 8 * torch.finfo(out.dtype).eps)

    def attend_perturbed(*arguments):
        out, weights = attend(*arguments)
        return perturb(out), weights

    monkeypatch.setattr(torch, "_native_multi_head_attention", attend_perturbed)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: perturb(encode(*a)))


class Attending(nn.Module):
    """An attention module between linear layers, called as the option `style` says."""

    def __init__(self, style="itself", **options):
        super().__init__()
        self.style = style
        self.embed, self.other = nn.Linear(5, 16), nn.Linear(5, options.get("vdim", 16))
        self.attn = nn.MultiheadAttention(16, 4, **options)
        self.out = nn.Linear(16, 3)
        self.register_buffer("causal", torch.ones(6, 6, dtype=torch.bool).triu(1))

    def forward(self, x):
        h, other = self.embed(x), self.other(x)
        if not self.attn.batch_first:
            h, other = h.transpose(0, 1), other.transpose(0, 1)
        y = self.attend(h, other)
        y = y if self.attn.batch_first else y.transpose(0, 1)
        return self.out(y).tanh()

    def attend(self, h, other):
        match self.style:
            case "itself":
                return self.attn(h, h, h)[0] + h
            case "without weights":
                return self.attn(h, h, h, need_weights=False)[0] + h
            case "causal":
                return self.attn(h, h, h, attn_mask=self.causal, need_weights=False)[0] + h
            case "causal by name":
                options = {"attn_mask": self.causal, "is_causal": True, "need_weights": False}
                return self.attn(query=h, key=h, value=h, **options)[0]
            case "weights":
                y, weights = self.attn(h, h, h, attn_mask=self.causal)
                return y * weights.sum()
            case "another":
                return self.attn(h, other, other)[0] + h
            case "a third":
                return self.attn(h, h, other)[0]
            case "padding":
                padding = (h[..., 0] if self.attn.batch_first else h[..., 0].T) > 1
                return self.attn(h, h, h, key_padding_mask=padding)[0] + h


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=generator)
    return model.eval()


def build_encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 16), stack, nn.Linear(16, 3))


def build_torchvision():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(16, 8, 2, 4, 16, 24, num_classes=5)


IN_STACK = ["1.layers.0.self_attn", "1.layers.1.self_attn"]
IN_VISION = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
# network, attention modules, whether torch.fx can trace it
NETWORKS = {
    "itself": (lambda: Attending(), ["attn"], True),
    "itself, batch first": (lambda: Attending(batch_first=True), ["attn"], True),
    "without bias": (lambda: Attending(bias=False, batch_first=True), ["attn"], True),
    "without weights": (
        lambda: Attending("without weights", batch_first=True),
        ["attn"],
        True,
    ),
    "causal": (lambda: Attending("causal", batch_first=True), ["attn"], True),
    "causal by name": (lambda: Attending("causal by name"), ["attn"], True),
    "weights": (lambda: Attending("weights"), ["attn"], True),
    "another": (lambda: Attending("another", batch_first=True), ["attn"], True),
    "padding": (lambda: Attending("padding", batch_first=True), ["attn"], False),
    "extra key": (lambda: Attending(add_bias_kv=True, add_zero_attn=True), ["attn"], False),
    "other sizes": (lambda: Attending("a third", kdim=16, vdim=12), ["attn"], False),
    "encoder": (build_encoder, IN_STACK, True),
    "encoder, norm first": (lambda: build_encoder(norm_first=True), IN_STACK, True),
    "torchvision": (build_torchvision, IN_VISION, True),
}


@contextmanager
def masked_heads(attention, mask):
    """Zero the input of the output projection where a mask (t, d) is true, off the fast path."""
    forward, linear = attention.forward, F.linear

    def project(x, weight, bias=None):
        if weight is attention.out_proj.weight:
            t = len(mask)
            n = len(x) // t
            x = x.view(t, n, -1).masked_fill(mask[:, None], 0).view(x.shape)
        return linear(x, weight, bias)

    def attend(*args, **kwargs):
        torch.backends.mha.set_fastpath_enabled(False)
        F.linear = project
        try:
            return forward(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
            F.linear = linear

    # A hook moves the encoder layer around the attention off its fast path.
    handle = attention.register_forward_hook(lambda *_: None)
    attention.forward = attend
    try:
        yield
    finally:
        del attention.forward
        handle.remove()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_head_matches_a_hook(name):
    build, modules, by_fx = NETWORKS[name]
    model = randomize(build())
    inputs = torch.randn(4, 3, 16, 16) if name == "torchvision" else torch.randn(4, 6, 5)
    layers = [f"{module}:heads" for module in modules]

    def run(model, x):
        return model(x)

    def run_hooked(layer, mask):
        with masked_heads(model.get_submodule(layer.removesuffix(":heads")), mask):
            return model(inputs)

    forward, states = check_heads(model, layers, inputs, run, run_hooked, n_heads=4)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (not forward._cuts._exports) == by_fx
    # Sizes behind the cut are those of the cells, so a pass may have several, unless the rest also
    # reads values that are not (n, …).
    if by_fx and getattr(getattr(model, "attn", None), "batch_first", True):
        assert all(state._split.batchable for state in states.values())


@pytest.mark.parametrize("name", ["itself", "causal", "padding", "extra key", "encoder"])
def test_heads_are_columns_of_the_output_projection(name):
    """An oracle without hooks: a head is zero if its columns of the projection are."""
    build, (module, *_), _ = NETWORKS[name]
    model, x = randomize(build()).double(), torch.randn(4, 6, 5, dtype=torch.float64)
    forward = AblatedForward(model, f"{module}:heads")
    state = forward.prefix(x)
    logits = forward.logits(state, make_head_cells(state.activation, 4))
    for h in range(4):
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.get_submodule(module).out_proj.weight[:, 4 * h : 4 * h + 4] = 0
            torch.testing.assert_close(logits[h], cut(x), rtol=0, atol=1e-12)


def test_layers_around_heads_keep_their_fast_paths():
    """Several layers in one object: each moves what it must off its fast path, and no more."""
    model, x = randomize(build_encoder()), torch.randn(4, 6, 5)
    layers = ["0", "1.layers.0.self_attn:heads", "1.layers.0.linear1", "1.layers.1", "2"]
    forward = AblatedForward(model, layers)
    states = forward.prefixes(x)
    with torch.no_grad():
        plain = model(x)
    for layer, state in states.items():
        assert torch.equal(forward.intact(state), plain)
        empty = torch.zeros(1, state.activation[0].numel(), dtype=torch.bool)
        is_inside = layer.startswith("1.")
        assert torch.equal(forward.logits(state, empty)[0], plain) != is_inside


def test_the_output_of_attention_is_a_pair():
    model, x = randomize(Attending(batch_first=True)), torch.randn(4, 6, 5)
    match = "layer: 'attn' returns a tuple of 2; expected a tensor, or output=0"
    with pytest.raises(LayerError, match=match):
        AblatedForward(model, "attn").prefix(x)
    for output, kind in ((0, "attn"), ("0", "attn"), (-2, "attn")):
        forward = AblatedForward(model, kind, output=output)
        state = forward.prefix(x)
        mask = torch.zeros(6, 16, dtype=torch.bool)
        mask[1:3, 7:] = True
        handle = model.attn.register_forward_hook(
            lambda _m, _i, out, mask=mask: (out[0].masked_fill(mask, 0), out[1])
        )
        with torch.no_grad():
            expected = model(x)
        handle.remove()
        assert torch.equal(forward.logits(state, mask.flatten()[None], batch=1)[0], expected)
        assert not forward._cuts._exports
    weights = AblatedForward(randomize(Attending("weights", batch_first=True)), "attn", output=1)
    assert weights.prefix(x).activation.shape == (4, 6, 6)


def test_heads_of_other_modules_are_refused():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.project = 4, nn.Linear(5, 5)

        def forward(self, x):
            return self.project(x)

    model = nn.Sequential(Mixer(), nn.Linear(5, 3)).eval()
    for layer in ("0:heads", "1:heads", ":heads"):
        with pytest.raises(LayerError, match=f"'{layer}': .* is not a known attention module"):
            AblatedForward(model, layer)
    with pytest.raises(LayerError, match=r"the model has no module 'none'; .* such as"):
        AblatedForward(model, "none:heads")
    forward = AblatedForward(model, ["0", "1:input"])
    for layer in ("0", "1:input", "1", "0:heads"):
        with pytest.raises(LayerError, match=f"layer: '{layer}'; expected .* 'module:heads'"):
            forward.count_heads(layer)


def test_a_query_without_a_batch_is_refused():
    class Flat(Attending):
        def attend(self, h, other):
            return torch.stack([self.attn(one, one, one)[0] for one in h.unbind()][:1] * 4)

    model = randomize(Flat(batch_first=True))
    with pytest.raises(LayerError, match=r"'attn:heads' gets a query of shape \(6, 16\)"):
        AblatedForward(model, "attn:heads").prefix(torch.randn(4, 6, 5))
