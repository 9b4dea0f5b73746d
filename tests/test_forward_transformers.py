"""PyTorch's transformer layers: one fused operation, unless a module inside has a hook."""

import warnings

import pytest
import torch
from _hook import assert_refused, check_cut, is_traced_by_fx, make_labels, run_hooked, run_plain
from torch import nn

from repsim_kernels.experiments import Study
from repsim_kernels.forward import AblatedForward


@pytest.fixture(autouse=True)
def perturb_fast_path(monkeypatch):
    """Make the fast path differ by rounding from the operations that it replaces.

    On some devices it does; on others it is bit-identical.
    """
    run = torch._transformer_encoder_layer_fwd

    def rounded(*arguments):
        return run(*arguments) * (1 + 1e-6)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", rounded)


class Encoder(nn.Module):
    """An encoder between linear layers; the first `dead` neurons of its first linear1 are zero."""

    def __init__(self, layer=nn.TransformerEncoderLayer, stack=nn.TransformerEncoder, dead=0):
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Linear(6, 32)
        one = layer(32, 4, 64, batch_first=True)
        self.enc = (
            stack(one, 3) if stack else nn.Sequential(one, layer(32, 4, 64, batch_first=True))
        )
        self.head = nn.Linear(32, 5)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)
        self.eval()
        first = self.enc.layers[0] if stack else self.enc[0]
        with torch.no_grad():
            first.linear1.weight[:dead] = 0
            first.linear1.bias[:dead] = 0

    def forward(self, x):
        return self.head(self.enc(self.embed(x))).flatten(1)


class CustomLayer(nn.TransformerEncoderLayer):
    def forward(self, x, **options):
        return super().forward(x, **options)


ENCODERS = [
    (Encoder, "enc.layers.{}"),
    (lambda: Encoder(stack=None), "enc.{}"),
    (lambda: Encoder(CustomLayer, stack=None), "enc.{}"),
]


@pytest.mark.parametrize(("build", "path"), ENCODERS)
@pytest.mark.parametrize(
    "place",
    ["embed", "enc", "head", *(f"{i}{s}" for i in "01" for s in ("", ".linear1", ".norm2"))],
)
def test_transformer_layers_match_a_hook(build, path, place):
    layer = place if place[0] not in "01" else path.format(place)
    model, images = build(), torch.randn(5, 7, 6)
    assert is_traced_by_fx(check_cut(model, layer, images))
    # The hook changes bits inside an encoder layer only, so the fast path is in use.
    assert torch.equal(run_hooked(model, layer, images), run_plain(model, images)) == (
        place[0] not in "01"
    )


@pytest.mark.parametrize(("build", "path"), ENCODERS)
def test_several_transformer_layers_match_a_hook(build, path):
    """A hook moves one encoder layer off its fast path, and no other."""
    model, images = build(), torch.randn(5, 7, 6)
    layers = ["embed", path.format("0.linear1"), path.format("0.norm1"), path.format("1"), "head"]
    forward = AblatedForward(model, layers)
    states = forward.prefixes(images)
    assert list(states) == layers
    for layer, state in states.items():
        labels = make_labels(state, 2)
        ablated = forward.logits(state, labels, 2, batch=1)
        for c in range(2):
            assert torch.equal(ablated[c], run_hooked(model, layer, images, labels == c)), layer
        assert torch.equal(forward.intact(state), run_plain(model, images)), layer
    assert forward.costs(images).keys() == states.keys()


def test_cells_without_effect_match_a_hook():
    model, layer, images = Encoder(dead=8), "enc.layers.0.linear1", torch.randn(5, 7, 6)
    forward = AblatedForward(model, layer)
    state = forward.prefix(images)
    hooked, fast = run_hooked(model, layer, images), run_plain(model, images)
    assert not torch.equal(hooked, fast)  # otherwise the checks below show nothing
    cells = torch.zeros(3, 7, 64, dtype=torch.bool)
    cells[1, :, :8] = True  # one dead cell and two empty ones
    logits = forward.logits(state, cells.flatten(1))
    assert all(torch.equal(cell, hooked) for cell in logits)
    assert torch.equal(forward.intact(state), fast)


def test_study_finds_no_change_for_dead_units():
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(10, 7, 6, generator=generator)
    model, layer = Encoder(dead=40), "enc.layers.0.linear1"
    study = Study(model, [layer], images, [0] * 5 + [1] * 5, grid=(1, 8))
    rows = study.run().table
    changes = rows[[name for name in rows if "probability" in name or "rank" in name]]
    state = AblatedForward(model, layer).prefix(images)
    assert ((state.activation != 0).sum((0, 1)) > 0).sum() == 24
    # 40 of 64 neurons are zero, so four of eight cells have only zeros.
    assert (changes == 0).all(axis=1).groupby(rows["class"]).sum().tolist() == [4, 4]


def test_nested_tensors_are_refused_only_at_the_cut():
    class Padded(Encoder):
        def forward(self, x):
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            return self.head(self.enc(self.embed(x), src_key_padding_mask=padding)).flatten(1)

    images = torch.randn(3, 7, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        match = "layer: 'enc.layers.0.linear1' gives a nested tensor; .*enable_nested_tensor=False"
        assert_refused(match, Padded(), "enc.layers.0.linear1", images)
        check_cut(Padded(), "head", images)
