"""The shipped networks, loading other networks, and default layers."""

import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from repsim_kernels.experiments.errors import ModelError
from repsim_kernels.experiments.inputs import images as data
from repsim_kernels.experiments.inputs.networks import (
    ASSETS,
    SMALL,
    build,
    list_default_layers,
    load,
)


class Outside(nn.Sequential):
    """A user's network, loaded as "package.module:callable"."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", SMALL)
def test_shipped_checkpoints_load_and_are_accurate(name):
    path = ASSETS / f"{name}.safetensors"
    assert path.stat().st_size < 1.6e6
    with safe_open(path, "pt") as file:
        assert float(file.metadata()["accuracy"]) > 0.88
        stored = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert stored <= {torch.float16, torch.int64}
    model = load(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    stimuli = data.load_demo()
    with torch.inference_mode():
        correct = model(stimuli.images).argmax(1) == stimuli.labels
    assert correct.double().mean() > 0.85


def test_classes_and_module_names_match_torchvision():
    stock = zoo.alexnet, zoo.mobilenet_v2, zoo.resnet50, zoo.vit_b_16
    for name, builder in zip(SMALL, stock, strict=True):
        with torch.device("meta"):
            expected = builder(weights=None)
        names = list(dict(expected.named_modules()))
        if name == "vit_small":  # has 4 of the 12 blocks
            names = [n for n in names if not re.search(r"layer_([4-9]|1\d)\b", n)]
        model = build(name)
        assert type(model) is type(expected)
        assert list(dict(model.named_modules())) == names
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_random_networks_have_logits_that_differ():
    for name in SMALL:
        torch.manual_seed(0)
        logits = build(name)(torch.randn(4, 3, 32, 32))
        assert (logits.std(0) > 0).all()


def test_default_layers():
    alexnet, mobilenet, resnet, vit = (list_default_layers(build(name)) for name in SMALL)
    assert alexnet == [f"features.{i}" for i in (1, 4, 7, 9, 11)] + ["classifier.2", "classifier.5"]
    assert len(mobilenet) == 104
    assert mobilenet[:2] == ["features.0.0", "features.0.1"]
    assert resnet == [f"layer{i + 1}.{j}" for i, k in enumerate((3, 4, 6, 3)) for j in range(k)]
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(4)]
    assert vit[1::2] == blocks
    assert vit[::2] == [f"{block}.self_attention:heads" for block in blocks]
    with pytest.raises(ModelError, match=r"layers: no default for Outside.* 0, 1, 2, 3"):
        list_default_layers(Outside())


def test_load_a_torchvision_network(tmp_path):
    model = zoo.squeezenet1_1(weights=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    half = {key: value.half() for key, value in model.state_dict().items()}
    save_file(half, tmp_path / "a.safetensors")
    x = torch.randn(2, 3, 64, 64)
    expected = model.eval()(x)
    torch.testing.assert_close(load("squeezenet1_1", tmp_path / "a.pth")(x), expected)
    rounded = load("squeezenet1_1", tmp_path / "a.safetensors")(x)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(ModelError, match="weights: required for 'squeezenet1_1'"):
        load("squeezenet1_1")


def test_older_checkpoints_of_vision_transformers_are_read(tmp_path):
    """torchvision's own weights have the names from before its MLPs became sequences."""
    model = build("vit_small").eval().requires_grad_(False)
    older = {
        re.sub(r"mlp\.([03])\.", lambda match: f"mlp.linear_{1 + int(match[1]) // 3}.", key): value
        for key, value in model.state_dict().items()
    }
    assert len(set(older) - set(model.state_dict())) == 16
    torch.save(older, tmp_path / "a.pth")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load("vit_small", tmp_path / "a.pth")(x), model(x))
    del older["encoder.layers.encoder_layer_2.mlp.linear_2.bias"]
    torch.save(older, tmp_path / "b.pth")
    with pytest.raises(ModelError, match=r"'encoder.layers.encoder_layer_2.mlp.3.bias' is missing"):
        load("vit_small", tmp_path / "b.pth")


def test_load_a_callable(tmp_path):
    name = f"{__name__}:Outside"
    assert type(load(name)).__name__ == "Outside"
    model = Outside()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(load(name, tmp_path / "a.pt")(x), model(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet", r"model: 'lenet' is unknown; expected one of alexnet_small"),
        ("fcn_resnet50", "is unknown"),
        ("no_such_package:net", "can't be imported: No module named"),
        ("torch.nn:NoSuchNet", "can't be imported: .* no attribute"),
        (":net", "can't be imported"),
        ("collections:OrderedDict", "is or returns OrderedDict; expected an nn.Module"),
    ],
)
def test_invalid_names_raise(name, message):
    with pytest.raises(ModelError, match=message) as error:
        load(name)
    one_line(error)
    with pytest.raises(ModelError, match="is unknown"):
        build(name)


NETS = """
import sys
from torch import nn
def need(width, *rest, depth, scale=1.0, **more): return nn.Linear(width, depth)
class Need(nn.Module):
    def __init__(self, width): super().__init__()
def fail(): raise RuntimeError("no \\n GPU")
def stop(): sys.exit(0)
def make(*rest, scale=1.0, **more): return nn.Linear(2, 2)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_nets:need", r"needs arguments \(width, depth\); expected a callable without"),
        ("own_nets:Need", r"needs arguments \(width\); expected a callable without required"),
        ("own_nets:fail", r"fails: RuntimeError: no GPU \(.*own_nets\.py, line 7\)"),
        ("own_nets:stop", r"fails: SystemExit: 0 \(.*own_nets\.py, line 8\)"),
        ("own_stops:make", r"can't be imported: SystemExit: 0 \(.*own_stops\.py, line 2\)"),
        ("own_fails:make", r"can't be imported: KeyError: 'here' \(.*own_fails\.py, line 1\)"),
        ("own_typo:make", r"can't be imported: SyntaxError: .* \(own_typo\.py, line 1\)"),
        ("./own_nets:make", "is a path; expected 'package.module:callable', a name that Python"),
        ("own_nets.py:make", "is a path; expected 'package.module:callable', a name that Python"),
        (".own_nets:make", "is a path; expected 'package.module:callable', a name that Python"),
    ],
)
def test_errors_in_a_users_module_are_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own_stops.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "own_fails.py").write_text("{}['here']\n")
    (tmp_path / "own_typo.py").write_text("def (\n")
    with pytest.raises(ModelError, match=f"^model: {name!r} {message}") as caught:
        load(name)
    one_line(caught)
    assert isinstance(load("own_nets:make"), nn.Linear)
    monkeypatch.delitem(sys.modules, "own_nets")


UNUSUAL = {
    "sparse (torch.sparse_coo)": torch.Tensor.to_sparse,
    "sparse (torch.sparse_csr)": torch.Tensor.to_sparse_csr,
    "quantised (torch.qint8)": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "on the meta device, without values": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch warns of these kinds of tensor
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_that_are_not_dense_raise(kind, tmp_path):
    state = Outside().state_dict()
    state["1.weight"] = UNUSUAL[kind](state["1.weight"])
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError) as caught:
        load(f"{__name__}:Outside", tmp_path / "a.pt")
    expected = f"weights: '1.weight' of {tmp_path / 'a.pt'} is {kind}; expected a dense tensor"
    assert str(caught.value) == expected


class Counting(Outside):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("1.bias", torch.ones(4, dtype=torch.complex64), False),
        ("1.bias", torch.ones(4, dtype=torch.float64) / 3, True),
        ("1.bias", torch.ones(4, dtype=torch.bfloat16), True),
        ("1.bias", torch.ones(4, dtype=torch.int64), True),
        ("count", torch.tensor(3.0), True),
        ("count", torch.tensor(2.5), False),
        ("count", torch.tensor(3 + 1j), False),
    ],
)
def test_values_that_a_dtype_cannot_hold_raise(key, value, accepted, tmp_path):
    state = Counting().state_dict() | {key: value}
    torch.save(state, tmp_path / "a.pt")
    if accepted:
        model = load(f"{__name__}:Counting", tmp_path / "a.pt")
        assert torch.equal(model.state_dict()[key], value.to(model.state_dict()[key].dtype))
        return
    with pytest.raises(ModelError, match=rf"{key!r} is {value.dtype}; expected torch\.") as caught:
        load(f"{__name__}:Counting", tmp_path / "a.pt")
    one_line(caught)


def test_a_checkpoint_of_another_architecture_raises(tmp_path):
    state = build("alexnet_small").state_dict()
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="does not match the architecture of") as error:
        load("resnet50_small", tmp_path / "a.safetensors")
    assert "'conv1.weight' is missing; expected (8, 3, 3, 3)" in one_line(error)
    assert "a.safetensors" in one_line(error)
    save_file(state | {"more": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="'more' is unexpected"):
        load("alexnet_small", tmp_path / "b.safetensors")


def test_unreadable_checkpoints_raise(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*none\.pth"):
        load("alexnet_small", tmp_path / "none.pth")
    for file in ("a.safetensors", "a.pth"):
        (tmp_path / file).write_bytes(b"not a checkpoint")
        with pytest.raises(ModelError, match=f"{file} can't be read") as error:
            load("alexnet_small", tmp_path / file)
        one_line(error)
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(ModelError, match="'epoch' is int; expected a tensor"):
        load("alexnet_small", tmp_path / "b.pth")
    torch.save(torch.zeros(3), tmp_path / "c.pth")
    with pytest.raises(ModelError, match="no state dict"):
        load("alexnet_small", tmp_path / "c.pth")


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(Outside(), tmp_path / "whole.pth")
    with pytest.raises(ModelError, match=r"whole.pth can't be read; .* are refused") as error:
        load(f"{__name__}:Outside", tmp_path / "whole.pth")
    one_line(error)


class Wrapped(nn.Module):
    """A user's network whose own names start with a wrapper's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."]
EXTRAS = {
    "epoch": 3,
    "arch": "resnet",
    "best": np.float64(76.1),
    "args": argparse.Namespace(lr=0.1, out=Path("out")),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
}


@pytest.mark.parametrize("network", ["Outside", "Wrapped"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", [None, "flat", "state_dict", "model", "model_state_dict"])
def test_prefixes_are_removed_and_containers_opened(tmp_path, network, prefix, entry):
    torch.manual_seed(len(prefix))
    model = globals()[network]()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    average = {name: value + 1 for name, value in state.items()}
    path = tmp_path / ("a.safetensors" if entry is None else "a.pt")
    if entry is None:
        save_file(state, path)
    elif entry == "flat":
        torch.save(state, path)
    else:
        averages = {"model_ema": average, "state_dict_ema": average, "ema": average}
        torch.save(EXTRAS | averages | {entry: state}, path)
    lines: list[str] = []
    loaded = load(f"{__name__}:{network}", path, log=lines.append)
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(loaded(x), model(x))
    read = "" if entry in (None, "flat") else f", read from {entry!r}"
    removed = f", prefix {prefix!r} removed" if prefix else ""
    assert lines == [f"weights: {path}{read}{removed}"]


def test_outputs_of_a_training_checkpoint_are_counted(tmp_path):
    model = zoo.squeezenet1_1(weights=None, num_classes=3)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.pth")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(load("squeezenet1_1", tmp_path / "a.pth")(x), model.eval()(x))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # before and since Python 3.13
def test_pickled_paths_of_every_python_are_read(tmp_path, monkeypatch, module):
    def reduce(self: Any) -> tuple[Any, ...]:
        return type(self), ("out", "run")

    path = type("PosixPath", (), {"__module__": module, "__reduce__": reduce})
    model = Outside()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, SimpleNamespace(PosixPath=path))
        torch.save({"state_dict": model.state_dict(), "out": path()}, tmp_path / "a.pt")
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(load(f"{__name__}:Outside", tmp_path / "a.pt")(x), model(x))


def test_ambiguous_or_foreign_checkpoints_raise(tmp_path):
    state = Outside().state_dict()
    module = {f"module.{name}": value for name, value in state.items()}
    for file, content, message in [
        ("two.pt", {"model": state, "state_dict": module}, "several state dicts, 'state_dict' and"),
        ("ema.pt", {"state_dict_ema": state}, "'state_dict_ema' is OrderedDict; expected a"),
        ("some.pt", state | {"module.1.weight": state["1.weight"]}, "'module.1.weight' is unexp"),
        ("extra.pt", module | {"module.more": torch.zeros(2)}, "'more' is unexpected"),
        ("loss.pt", module | {"criterion.weight": torch.zeros(2)}, "'1.weight' is missing"),
        ("net.pt", {"net." + k: v for k, v in state.items()}, "'1.weight' is missing"),
        ("numbers.pt", {0: torch.zeros(2)}, "not a state dict: key 0; expected strings"),
        ("empty.pt", {"state_dict": {}, "epoch": 3}, "'state_dict' is dict; expected a tensor"),
    ]:
        torch.save({**content}, tmp_path / file)
        with pytest.raises(ModelError, match=message) as error:
            load(f"{__name__}:Outside", tmp_path / file)
        assert file in one_line(error)
