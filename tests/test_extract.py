"""`extract`: the representations of a network's layers, whatever the network returns."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _small_network import Returns
from torch import Tensor, nn
from torch.nn import functional

import repsim_kernels as rk


class Residual(nn.Module):
    """A block whose ReLU works in place and is called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv2(self.relu(self.conv1(x)))) + x)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), nn.Flatten(), nn.Linear(144, 5)).train()


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(23, 3, 8, 8, generator=generator).split(5))


def run_by_hand(network, x):
    """Return every intermediate result, before an operation in place overwrites it."""
    network = network.eval()
    results = {}
    with torch.no_grad():
        block = network[1]
        results["0"] = y = network[0](x)
        results["1.conv1"] = z = block.conv1(y)
        results["1.relu"] = z = functional.relu(z)
        results["1.conv2"] = z = block.conv2(z)
        results["1.bn"] = z = block.bn(z)
        results["1.relu:2"] = z = functional.relu(z + y)
        results["2"] = z = z.flatten(1)
        results["3"] = network[3](z)
    return {name: value.flatten(1) for name, value in results.items()}


def test_all_layers_come_once_in_call_order(network, loader):
    got = rk.extract(network, loader)
    want = run_by_hand(network, torch.cat(loader))
    assert list(got) == list(want)  # "1" and "output" return the tensors of "1.relu:2" and "3"
    for name, x in want.items():
        torch.testing.assert_close(got[name], x)


def test_modes_are_restored_and_hooks_removed(network, loader):
    network[1].eval()
    before = {name: module.training for name, module in network.named_modules()}
    statistics = network[1].bn.running_mean.clone()
    rk.extract(network, loader, "conv")
    assert {name: module.training for name, module in network.named_modules()} == before
    assert torch.equal(network[1].bn.running_mean, statistics)
    with pytest.raises(RuntimeError):
        rk.extract(network, [*loader, torch.zeros(2, 7)], "conv")
    assert {name: module.training for name, module in network.named_modules()} == before
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("conv", ["0", "1.conv1", "1.conv2"]),
        ("linear", ["3"]),
        ("blocks", ["1"]),
        (["3", "1.relu:2"], ["3", "1.relu:2"]),
        ("1.relu", ["1.relu"]),
        ("output", ["output"]),
        (lambda name, module: isinstance(module, nn.BatchNorm2d), ["1.bn"]),
    ],
)
def test_layers_are_selected(network, loader, layers, want):
    assert list(rk.extract(network, loader, layers)) == want


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["1.conv"], "no module '1.conv'; expected a name .* such as '1.conv2', '1.conv1'"),
        ("convolution", "no module 'convolution'.*or one of 'conv', 'linear'"),
        (["1.relu:3"], "'1.relu:3' is not called in a pass .*; expected '1.relu' to '1.relu:2'"),
        ("attention", "'attention' selects no module of Sequential"),
        (lambda name, module: False, "the function selects no module"),
        ([], r"layers: \[\]; expected names"),
        (3, "layers: 3; expected names"),
    ],
)
def test_wrong_layers_are_named(network, loader, layers, message):
    with pytest.raises(rk.LayerError, match=message):
        rk.extract(network, loader, layers)


@dataclass
class Output:
    logits: Tensor
    hidden_states: tuple[Tensor, ...]


@pytest.mark.parametrize(
    ("function", "output", "factor"),
    [
        (lambda x: (2 * x, 3 * x), None, 2),
        (lambda x: (2 * x, 3 * x), 1, 3),
        (lambda x: {"a": None, "b": 2 * x}, None, 2),
        (lambda x: UserDict(a=x, b=[x, 4 * x]), "b.1", 4),
        (lambda x: Output(x, (x, 2 * x, 5 * x)), "hidden_states.2", 5),
        (lambda x: 2 * x, 1, 2),  # a tensor is used whole, whatever the output of other layers
    ],
)
def test_the_tensor_is_found_in_any_output(function, output, factor):
    x = torch.arange(6.0).view(3, 2)
    got = rk.extract(nn.Sequential(Returns(function)), [x], ["0"], output=output)["0"]
    assert torch.equal(got, factor * x)


def test_a_missing_output_is_an_error_that_names_the_others():
    network = nn.Sequential(Returns(lambda x: (x, {"b": x})))
    with pytest.raises(rk.LayerError, match=r"output: 'c' .* layer '0'.*tensors: '0', '1.b'"):
        rk.extract(network, [torch.ones(3, 2)], ["0"], output="c")


def test_batches_may_be_tuples_dicts_or_anything_with_a_call(network, loader):
    want = rk.extract(network, loader, ["3"])["3"]
    labelled = [(x, torch.zeros(len(x))) for x in loader]
    assert torch.equal(rk.extract(network, labelled, ["3"])["3"], want)
    named = [{"input": x} for x in loader]
    assert torch.equal(rk.extract(network, named, ["3"])["3"], want)
    arrays = [x.numpy() for x in loader]
    assert torch.equal(rk.extract(network, arrays, ["3"])["3"], want)
    got = rk.extract(network, labelled, ["3"], call=lambda model, batch: model(2 * batch[0]))
    assert torch.equal(got["3"], rk.extract(network, [2 * x for x in loader], ["3"])["3"])


def test_files_hold_the_same_numbers(network, loader, tmp_path):
    folder = tmp_path / "new" / "folder"
    got = rk.extract(network, loader, out=folder)
    want = rk.extract(network, loader)
    assert list(got) == list(want)
    for name, x in want.items():
        assert isinstance(got[name], np.memmap)
        assert np.array_equal(got[name], x.numpy())
        assert np.array_equal(np.load(folder / f"{name}.npy"), x.numpy())


def test_no_file_is_left_half_written(network, loader, tmp_path):
    with pytest.raises(RuntimeError):
        rk.extract(network, [*loader, torch.zeros(2, 7)], out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_of_the_network_is_kept(dtype, tmp_path):
    network = nn.Sequential(nn.Linear(3, 4)).to(dtype)
    batches = [torch.randn(5, 3, dtype=dtype)]
    got = rk.extract(network, batches)["0"]
    assert got.dtype == dtype
    saved = rk.extract(network, batches, out=tmp_path)["0"]
    assert np.array_equal(saved, got.float().numpy() if dtype == torch.bfloat16 else got.numpy())


def draw_tokens():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 6, 3, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 0, 1, 1, 0]])
    return x.masked_fill(mask[..., None] == 0, torch.nan), mask


POOLED = {
    "mean": lambda tokens: tokens.mean(0),
    "max": lambda tokens: tokens.amax(0),
    "cls": lambda tokens: tokens[0],
    "last": lambda tokens: tokens[-1],
}


class Identity(nn.Module):
    def forward(self, x, attention_mask=None):
        return x + 0


@pytest.mark.parametrize("pool", [*POOLED, "tokens"])
@pytest.mark.parametrize("padded", [True, False])
def test_padding_never_counts(pool, padded):
    """Values of padding are NaN here, so that any use of them shows."""
    x, mask = draw_tokens()
    if not padded:
        x, mask = x.nan_to_num(), torch.ones_like(mask)
    batch = {"x": x, "attention_mask": mask} if padded else {"x": x}
    got = rk.extract(Identity(), [batch], "output", pool=pool)["output"]
    present = [tokens[row.bool()] for tokens, row in zip(x, mask, strict=True)]
    if pool == "tokens":
        want = torch.cat(present)
    else:
        want = torch.stack([POOLED[pool](tokens) for tokens in present])
    torch.testing.assert_close(got, want)


def test_flattening_padding_is_refused():
    x, mask = draw_tokens()
    batch = {"x": x, "attention_mask": mask}
    with pytest.raises(rk.LayerError, match=r"'flatten' at layer 'output'.*would count"):
        rk.extract(Identity(), [batch], "output")


def test_feature_maps_are_pooled_over_positions(network, loader):
    maps = rk.extract(network, loader, ["0"])["0"].unflatten(1, (4, 6, 6))
    for pool, want in (("mean", maps.mean((2, 3))), ("max", maps.amax((2, 3)))):
        torch.testing.assert_close(rk.extract(network, loader, ["0"], pool=pool)["0"], want)
    got = rk.extract(network, loader, ["0"], pool=lambda x: x[:, :, 0, 0])["0"]
    assert torch.equal(got, maps[:, :, 0, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pool": "sum"}, rk.OptionError, "pool: 'sum'; expected one of 'flatten', 'mean'"),
        ({"pool": lambda x: x}, rk.ShapeError, "pool: returned .* for layer '0'"),
        ({"pool": "cls"}, rk.LayerError, "pool: 'cls' at layer '0' of the model, whose output"),
        ({"loader": []}, rk.ShapeError, "loader: no batches"),
        ({"loader": 5}, rk.OptionError, "loader: 5; expected an iterable of batches"),
        ({"loader": ["text"]}, rk.ShapeError, "loader: a batch 'text'; expected tensors"),
        ({"model": "resnet"}, rk.LayerError, "model: 'resnet'; expected a torch.nn.Module"),
        ({"output": 1.5}, rk.OptionError, "output: 1.5; expected an index, a path"),
    ],
)
def test_wrong_arguments_are_named(network, loader, change, error, message):
    arguments = {"model": network, "loader": loader, "layers": ["0"]} | change
    with pytest.raises(error, match=message):
        rk.extract(**arguments)


def test_layers_of_changing_width_are_refused():
    batches = [torch.ones(2, 5, 3), torch.ones(2, 7, 3)]
    with pytest.raises(rk.ShapeError, match="'output' has 21 neurons in one batch and 15 in the"):
        rk.extract(Identity(), batches, "output")


def test_a_layer_that_is_skipped_for_a_batch_is_an_error():
    network = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    calls = iter([0, 0, 1])  # the first is the pass that finds the layers
    with pytest.raises(rk.LayerError, match="'0' is not called for every batch"):
        rk.extract(network, [torch.ones(4, 3)] * 2, call=lambda model, x: model[next(calls)](x))
