"""Networks as they are: what they return, how they are built and wrapped, what they are given."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torchvision
from _networks import mix_modes, snapshot
from _small_network import IMAGES, WANT, Returns, assert_same, make_network
from torch import nn

import repsim_kernels as rk
from repsim_kernels.comparison.layers import Network, select_modules


def test_both_names_of_a_module_may_be_listed():
    network = make_network()
    network.alias = network[0]  # the second call, at the end, gets another number of channels
    network.__class__ = type("Network", (nn.Sequential,), {"forward": lambda self, x: self[0](x)})
    want = rk.extract(network, [IMAGES], ["0"])["0"]
    got = rk.extract(network, [IMAGES], ["alias", "0"])
    assert_same(got, {"alias": want, "0": want})
    assert list(rk.extract(network, [IMAGES], "conv")) == ["0"]
    assert list(rk.extract(network, [IMAGES])) == ["0"]


class Shared(nn.Module):
    """Calls one block three times, under two names; the last call returns whole numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([Returns(lambda x: x + 1 if x.sum() < 60 else x.long())])
        self.second = nn.ModuleList([self.first[0]])

    def forward(self, x):
        return self.second[0](self.first[0](self.first[0](x))) * 1.0


def test_each_call_of_a_shared_module_is_a_layer():
    x = torch.tensor([[20.0, 20.0], [10.0, 9.0]])  # their sum exceeds 60 after one call
    assert list(rk.extract(Shared(), [x])) == ["first.0", "output"]
    got = rk.extract(Shared(), [x], ["second.0"])["second.0"]
    assert torch.equal(got, x + 1)
    with pytest.raises(rk.LayerError, match=r"'first.0:2' .* returns int64 of shape \(2, 2\)"):
        rk.extract(Shared(), [x], ["first.0:2"])
    message = "'second.0:4' is not called in a pass of .*; expected 'second.0' to 'second.0:3'"
    with pytest.raises(rk.LayerError, match=message):
        rk.extract(Shared(), [x], ["second.0:4"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0:2", "'0:2' is not called in a pass of the model; expected '0', its only call"),
        (
            "0:0",
            "'0:0' of the model; expected '0' for the first call of the module in a pass, '0:2'",
        ),
        ("0:1", "'0:1' of the model; expected '0' for the first call"),
        ("0:02", "'0:02' of the model; expected '0' for the first call"),
        ("0:²", "the model has no module '0:²'; expected a name"),
        ("7:1", "the model has no module '7:1'; expected a name"),
    ],
)
def test_the_number_of_a_call_is_checked(name, message):
    with pytest.raises(rk.LayerError, match=f"layers: {message}"):
        rk.extract(make_network(), [IMAGES], [name])


def test_a_name_may_end_like_the_number_of_a_call():
    network = nn.Sequential(OrderedDict({"a": nn.Linear(3, 2), "a:1": nn.Linear(2, 2)}))
    assert list(rk.extract(network, [torch.ones(4, 3)], ["a:1", "a"])) == ["a:1", "a"]


def test_a_module_named_output_keeps_its_name():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(3, 2)

        def forward(self, x):
            return self.output(x).exp()

    network, x = Network(), torch.randn(4, 3)
    got = rk.extract(network, [x], ["output", ""])
    with torch.no_grad():
        assert_same(got, {"output": network.output(x), "": network(x)})
    assert list(rk.extract(network, [x])) == ["output", ""]


def test_a_kind_in_a_list_is_a_name():
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), other=nn.Conv2d(4, 4, 3)))
    assert list(rk.extract(network, [IMAGES], ["conv"])) == ["conv"]
    assert list(rk.extract(network, [IMAGES], "conv")) == ["conv", "other"]
    with pytest.raises(rk.LayerError, match=r"no module 'linear'.*'conv', .*not in a list"):
        rk.extract(network, [IMAGES], ["linear"])


@pytest.mark.parametrize("layers", [lambda: iter(["0", "3"]), lambda: {"0": 1, "3": 2}.keys()])
def test_names_may_come_from_any_iterable(layers):
    assert list(rk.extract(make_network(), [IMAGES], layers())) == ["0", "3"]


@pytest.mark.parametrize("layers", [nn.Conv2d, [nn.Conv2d], b"0", [make_network()[0]], np.ones(2)])
def test_what_is_no_layer_is_refused(layers):
    with pytest.raises(rk.LayerError, match=r"layers: .*; expected names, one of 'conv'"):
        rk.extract(make_network(), [IMAGES], layers)


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("resnet18", "layer1.0", 8),
        ("vit_b_32", "encoder.layers.encoder_layer_0", 12),
        ("swin_t", "features.0", 16),
        ("convnext_tiny", "features.0", 22),
        ("mobilenet_v2", "features.0", 19),
    ],
)
def test_blocks_are_found_in_well_known_networks(name, first, count):
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    blocks = list(select_modules(network, "blocks"))
    assert (blocks[0], len(blocks)) == (first, count)


def test_blocks_may_be_sequences():
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)]
    assert list(select_modules(nn.Sequential(*blocks), "blocks")) == ["0", "1"]
    resnet = torchvision.models.resnet18()
    assert "4.0" in select_modules(nn.Sequential(*resnet.children()), "blocks")


def test_the_network_itself_is_no_attention():
    class AttentionNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(4, 2)

    assert list(select_modules(AttentionNetwork(), "attention")) == ["mix"]


def compile_part(network):
    network[0] = torch.compile(network[0], backend="eager")
    return network


def compile_in_place(network):
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize(
    "wrap",
    [
        lambda network: torch.compile(network, backend="eager"),
        compile_part,
        compile_in_place,
        nn.DataParallel,
        lambda network: torch.compile(nn.DataParallel(network), backend="eager"),
    ],
    ids=["compiled", "part", "in place", "parallel", "both"],
)
def test_wrapped_networks_have_the_names_of_the_original(wrap):
    network = wrap(make_network())
    assert_same(rk.extract(network, [IMAGES]))
    assert list(rk.extract(network, [IMAGES], "conv")) == ["0"]
    torch.testing.assert_close(network(IMAGES), WANT["3"])
    assert_same(rk.extract(network, [IMAGES]))  # also once it has been compiled


def script(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(network)


def test_torchscript_is_refused_where_it_hides_layers():
    scripted = script(make_network())
    partly = nn.Sequential(script(make_network()[:2]), make_network()[2:])
    for network, layers in [(scripted, None), (scripted, "conv"), (scripted, "output"),
                            (partly, None), (partly, "linear"), (partly, ["0.0"])]:  # fmt: skip
        with pytest.raises(rk.LayerError, match=r"is TorchScript, .*expected the nn.Module that"):
            rk.extract(network, [IMAGES], layers)
    got = rk.extract(partly, [IMAGES], lambda name, module: name == "1.3")
    assert torch.equal(got["1.3"], WANT["3"])


def test_networks_without_values_are_refused():
    for network, message in [
        (nn.LazyLinear(2), "'weight' has no shape yet; run the model once"),
        (nn.Linear(3, 2, device="meta"), "'weight' is on meta, which holds no values"),
    ]:
        with pytest.raises(rk.LayerError, match=message):
            rk.extract(network, [torch.ones(4, 3)])
        with pytest.raises(rk.LayerError, match=f"^model_b: {message}"):
            rk.compare(nn.Linear(3, 2), network, [torch.ones(4, 3)])


def test_nothing_in_a_network_changes():
    network = mix_modes(make_network())
    before = snapshot(network)
    rk.extract(network, [IMAGES])
    rk.compare(network, loader=[IMAGES, IMAGES + 1], layers=["0", "3"], memory=1000)
    assert snapshot(network) == before


def test_outputs_are_seen_before_they_are_overwritten():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).relu_().flatten(1).mul_(2)

    network = Network()
    got = rk.extract(network, [IMAGES])
    with torch.no_grad():
        assert torch.equal(got["conv"], network.conv(IMAGES).flatten(1))
        assert torch.equal(got["output"], network(IMAGES))


@pytest.mark.parametrize("batch", [IMAGES.clone(), IMAGES.numpy().copy()])
def test_a_network_that_overwrites_its_input_gets_copies(batch):
    network = nn.Sequential(nn.ReLU(inplace=True), make_network())
    want = {f"1.{name}": x for name, x in rk.extract(make_network(), [IMAGES.relu()]).items()}
    for _ in range(2):
        assert_same(rk.extract(network, [batch], list(want)), want)
    assert np.array_equal(batch, IMAGES)


def test_a_network_that_overwrites_the_input_of_some_batches_is_refused():
    network = Returns(lambda x: x.relu_() if x[0, 0] < 0 else x + 1)
    batches = torch.ones(5, 3), -torch.ones(5, 3)
    with pytest.raises(rk.OptionError, match="call: the model writes to the input of some batches"):
        rk.extract(network, batches, "output")


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_network_may_switch_gradients_and_inference_mode(mode, tmp_path):
    inner = make_network()
    network = Returns(mode()(lambda x: inner(x)))
    network.inner = inner
    want = {f"inner.{name}": x for name, x in WANT.items()}
    assert_same(rk.extract(network, [IMAGES]), want)
    saved = rk.extract(network, [IMAGES], out=tmp_path)
    assert np.array_equal(saved["inner.3"], WANT["3"].numpy())
    with torch.inference_mode():
        assert_same(rk.extract(inner, [IMAGES + 0]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.to_sparse(), "sparse_coo float32 of shape"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1, :1]]), "nested float32"),
        (lambda x: x[:, :0], r"float32 of shape \(3, 0, 8, 8\)"),
        (lambda x: x.sum(), r"float32 of shape \(\)"),
        (lambda x: x > 0, "bool of shape"),
        (lambda x: torch.complex(x, x), "complex64 of shape"),
    ],
)
def test_outputs_that_are_no_features_are_left_out_or_refused(function, message):
    network = nn.Sequential(nn.Flatten(), Returns(lambda x: function(x.view(-1, 3, 8, 8))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        assert list(rk.extract(network, [IMAGES])) == ["0"]
        with pytest.raises(rk.LayerError, match=f"'1' of the model returns {message}"):
            rk.extract(network, [IMAGES], ["1"])


@pytest.mark.parametrize("t", [2, 5, 7])
def test_sequences_that_come_first_are_refused(t):
    """Even if there are as many steps as stimuli: layers are found with fewer stimuli."""
    network = nn.Sequential(Returns(lambda x: x.transpose(0, 1)), nn.RNN(3, 4))
    sequences = torch.randn(5, t, 3)
    with pytest.raises(rk.LayerError, match=r"expected|no selected module"):
        rk.extract(network, [sequences])
    with pytest.raises(rk.LayerError, match="returns"):
        rk.extract(network, [sequences], ["1"])
    got = rk.extract(nn.RNN(3, 4, batch_first=True), [sequences])
    assert got["output"].shape == (5, 4 * t)


States = namedtuple("States", "first states")


@pytest.mark.parametrize(
    ("output", "factor"),
    [
        (0, 1), ("first", 1), ("states.2", 4), ("states.-1", 4), ("states.-3", 2),
        ("1.layer.0", 8), (-1, None), ("states.3", None), ("states", None), ("states.layer", None),
    ],
)  # fmt: skip
def test_an_output_may_be_named_or_counted(output, factor):
    function = (lambda x: States(x, (2 * x, 3 * x, 4 * x))) if output != "1.layer.0" else (
        lambda x: {"a": x, "b": {"layer.0": 8 * x}}
    )  # fmt: skip
    x = torch.ones(3, 2)
    if factor is None:
        with pytest.raises(rk.LayerError, match=r"one of its tensors: 'first', 'states.0'"):
            rk.extract(Returns(function), [x], "output", output=output)
    else:
        got = rk.extract(Returns(function), [x], "output", output=output)
        assert torch.equal(got["output"], factor * x)


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (lambda x: x.flatten(7), rk.LayerError, "the function fails at layer '0' of the model, "
         r"whose output has shape \(3, 4, 6, 6\): IndexError: "),
        (lambda x: x.flatten(1).relu_(), rk.OptionError, "the function writes to the output"),
        (lambda x: x.flatten(1).argsort(), rk.ShapeError, r"returned int64 of shape \(3, 144\)"),
        (lambda x: x.numpy(), rk.ShapeError, "returned ndarray for layer '0'"),
        (lambda x: x[:, :0, 0, 0], rk.ShapeError, r"returned float32 of shape \(3, 0\)"),
    ],
)  # fmt: skip
def test_functions_that_pool_wrongly_are_named(pool, error, message):
    with pytest.raises(error, match=f"pool: {message}"):
        rk.extract(make_network(), [IMAGES], ["0"], pool=pool)


@pytest.mark.parametrize("call", [5, "forward", ["x"]])
def test_a_call_must_be_a_function(call):
    with pytest.raises(rk.OptionError, match=r"call: .*; expected a function of the model and a "):
        rk.extract(make_network(), [IMAGES], call=call)


def test_errors_name_the_network():
    network = Network(make_network(), ["1"], owner="model_b")
    with pytest.raises(rk.LayerError, match="'1' is not called in a pass of model_b"):
        Network(make_network(), ["1"], None, lambda model, x: model[0](x), "model_b").find_layers(
            IMAGES
        )
    assert list(network.find_layers(IMAGES)[0]) == ["1"]
    with pytest.raises(rk.LayerError, match=r"model_b has no module '7'; .* '0', '1', '2', "):
        Network(make_network(), ["7"], owner="model_b")


def test_errors_of_a_comparison_name_the_network():
    arguments = make_network(), nn.Sequential(nn.Linear(192, 2)), [IMAGES]
    with pytest.raises(rk.LayerError, match="layers: model_b has no module '3'"):
        rk.compare(*arguments, layers=["3"])
    with pytest.raises(rk.LayerError, match=r"'conv' selects no module .*\(model_b\)"):
        rk.compare(*arguments, layers="conv")
    with pytest.raises(rk.OptionError, match="metric: no names; expected one or several"):
        rk.compare(*arguments, metric=[])


def test_weights_that_are_computed_are_no_layers():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(192, 2))  # as many as the first pass
    assert list(rk.extract(nn.Sequential(nn.Flatten(), linear), [IMAGES])) == ["0", "1"]


@pytest.mark.parametrize("name", ["/tmp/x", "a/b", "a:b c"])
def test_files_stay_in_their_folder(name, tmp_path):
    network = nn.ModuleDict({name: nn.Flatten()})
    got = rk.extract(network, [IMAGES], call=lambda model, x: model[name](x), out=tmp_path / "out")
    assert np.array_equal(got[name], IMAGES.flatten(1).numpy())
    assert len(list((tmp_path / "out").iterdir())) == 1
