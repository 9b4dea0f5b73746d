"""Cuts of the study's networks at full size, against whole passes under a hook."""

import copy
import functools

import pytest
import torch
from _hook import make_labels, run_hooked, run_plain
from torch import nn

from repsim_kernels.experiments.inputs.networks import list_default_layers
from repsim_kernels.experiments.inputs.presets import PRESETS, load_network
from repsim_kernels.forward import AblatedForward

CUTS = {"alexnet": 10, "mobilenet_v2": 104, "resnet50": 122, "vit_b_16": 49}


@functools.cache
def load(name):
    return load_network(PRESETS[name].networks[0], "random").model


def list_sites(name):
    """The study's layers, and the other modules that a user might cut at."""
    model = load(name)
    kinds = {
        "alexnet": nn.MaxPool2d,
        "mobilenet_v2": (),
        "resnet50": (nn.Conv2d, nn.BatchNorm2d),
        "vit_b_16": (nn.LayerNorm, nn.GELU),
    }
    more = {layer for layer, m in model.named_modules() if isinstance(m, kinds[name])}
    chosen = more | set(list_default_layers(model))
    return [layer for layer, _ in model.named_modules() if layer in chosen]


def check_cuts(name, layers, memory_format=torch.contiguous_format):
    model = copy.deepcopy(load(name)).to(memory_format=memory_format)
    images = torch.randn(2, 3, 224, 224).to(memory_format=memory_format)
    forward, intact = AblatedForward(model, layers), run_plain(model, images)
    for layer, state in forward.prefixes(images).items():
        masks = make_labels(state, 3)[None] == torch.tensor([[0], [1]])
        before = state.activation.clone()
        ablated = forward.logits(state, masks, batch=1)
        assert torch.equal(forward.intact(state), intact), layer
        assert torch.equal(ablated[0], run_hooked(model, layer, images, masks[0])), layer
        assert not torch.equal(ablated[0], ablated[1]), layer
        assert torch.equal(state.activation, before), layer


@pytest.mark.parametrize(
    ("name", "count", "memory_format"),
    [
        ("alexnet", 2, torch.contiguous_format),
        ("mobilenet_v2", 4, torch.contiguous_format),
        pytest.param("alexnet", 2, torch.channels_last, marks=pytest.mark.slow),
        ("mobilenet_v2", 2, torch.channels_last),
    ],
)
def test_sample_of_cuts_is_bit_identical_to_a_hook(name, count, memory_format):
    every = list_sites(name)
    assert len(every) == CUTS[name]
    step = len(every) / count
    check_cuts(name, [every[int((i + 0.5) * step)] for i in range(count)], memory_format)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start"),
    [(name, start) for name, count in CUTS.items() for start in range(0, count, 31)],
)
def test_every_cut_is_bit_identical_to_a_hook(name, start):
    every = list_sites(name)
    assert len(every) == CUTS[name]
    check_cuts(name, every[start : start + 31])
