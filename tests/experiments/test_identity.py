"""A study identifies its network by the weights, the modules and the operations of a pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _toy import Toy, list_study_calls, toy_images, toy_study
from torch import Tensor, nn

from repsim_kernels.experiments.errors import StoreError, StudyError
from repsim_kernels.experiments.study.configuration import differences
from repsim_kernels.experiments.study.network import describe_modules, hash_operations


class Scaled(Toy):
    """Its forward pass uses attributes and no additional modules."""

    def __init__(self, scale: float = 2.0, function: Callable[[Tensor], Tensor] = torch.relu):
        super().__init__()
        self.scale, self.function = scale, function

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.function(self.scale * images))


class Branching(Scaled):
    """Needs torch.export: torch.fx can't trace a branch on a value."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if len(images) else images


def with_module(name: str, module: nn.Module) -> Toy:
    model = Toy()
    old = model.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        module.load_state_dict(old.state_dict())
    setattr(model, name, module)
    return model


CHANGED = {
    "activation": (
        Toy,
        lambda: with_module("act1", nn.Tanh()),
        r"modules\.act1\.class: \"nn.ReLU\" before, \"nn.Tanh\" now",
    ),
    "option": (
        Toy,
        lambda: with_module("conv1", nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        r'modules\.conv1\.padding_mode: "zeros" before, "circular" now',
    ),
    "constant": (Scaled, lambda: Scaled(3.0), "operations: "),
    "function": (Scaled, lambda: Scaled(function=torch.tanh), "operations: "),
    "exported constant": (Branching, lambda: Branching(3.0), "operations: "),
    "exported function": (Branching, lambda: Branching(function=torch.tanh), "operations: "),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_run_is_not_resumed_with_a_network_that_computes_something_different(
    kind: str, tmp_path: Path
) -> None:
    make, change, where = CHANGED[kind]
    rows = toy_study(model=make(), metrics=["cka"]).run(tmp_path).table
    again = toy_study(model=make(), metrics=["cka"]).run(tmp_path, progress=pytest.fail).table
    assert again.equals(rows)
    other = toy_study(model=change(), metrics=["cka"])
    assert other.configuration()["weights"] == toy_study(model=make()).configuration()["weights"]
    with pytest.raises(StoreError, match=rf"another configuration \(models\.toy\.{where}"):
        other.run(tmp_path)


@pytest.mark.parametrize("use", ["run", "store", "measure", "about", "plan"])
def test_modules_that_have_changed_are_refused(use: str, tmp_path: Path) -> None:
    model = Toy()
    study = toy_study(model=model, metrics=["cka"])
    calls = list_study_calls(study, tmp_path / "run")
    old, model.act1 = model.act1, nn.Tanh()  # type: ignore[assignment]
    changed = (
        r"^model: the modules of toy have changed since the study was made \(act1\.class: "
        r'"nn.ReLU" before, "nn.Tanh" now\); expected the same ones, '
        r"or a new Study$"
    )
    with pytest.raises(StudyError, match=changed):
        calls[use]()
    assert not (tmp_path / "run").exists()
    model.act1 = old
    calls[use]()


class Listed(nn.Module):
    """Its extra_repr includes an address and a device."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2))])

    def extra_repr(self) -> str:
        return f"3, hook=<function f at {id(self):#x}>, at=tensor(1, device='{self.place}'), p=.1"


def test_a_description_has_no_addresses_or_devices() -> None:
    described = [describe_modules(Listed(place)) for place in ("cuda:0", "cuda:1")]
    assert described[0] == described[1]
    assert described[0] == {
        "model": {"class": "Listed", "options": "3, hook=<function f>, at=tensor(1), p=.1"},
        "weights": {"class": "nn.ParameterList"},
    }


def attention(heads: int = 2, function: str = "relu", **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, heads, 8, activation=function, **options)
    return nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.Flatten(1, 2), layer)


OPTIONS = {  # most of these options are not in the modules' repr
    "heads": (attention(), attention(heads=4), "3.self_attn.num_heads"),
    "function": (attention(), attention(function="gelu"), "3.activation"),
    "order": (attention(), attention(norm_first=True), "3.norm_first"),
    "pool": (
        nn.AvgPool2d(3, padding=1),
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        "model.count_include_pad",
    ),
    "corners": (
        nn.Upsample(8, mode="bilinear"),
        nn.Upsample(8, mode="bilinear", align_corners=True),
        "model.align_corners",
    ),
    "infinite": (nn.Hardtanh(0, 1), nn.Hardtanh(0, float("inf")), "model.max_val"),
    "recurrent": (nn.LSTM(3, 3), nn.LSTM(3, 3, batch_first=True), "model.batch_first"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_descriptions_include_options_that_the_repr_omits(kind: str) -> None:
    one, other, option = OPTIONS[kind]
    before, now = describe_modules(one), describe_modules(other)
    assert json.loads(json.dumps(before)) == before
    (changed, *_) = differences(before, now)
    assert changed.startswith(f"{option}: ")
    assert describe_modules(copy.deepcopy(one)) == before


def test_a_users_attributes_are_not_options() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = describe_modules(model)
    model[0].calls = 3  # type: ignore[assignment]
    assert describe_modules(model) == before
    model[0].forward = torch.relu  # type: ignore[assignment]
    assert describe_modules(model) != before


class Sending(Toy):
    """Moves images to a device in its forward pass, like a copy on each GPU."""

    device = torch.device("cuda:0")

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.to(self.device))


class SendingToAnother(Sending):
    device = torch.device("cuda:1")


def test_operations_are_the_same_on_every_gpu() -> None:
    images, _ = toy_images()
    hashes = [
        hash_operations(kind().eval(), ["act1"], images)
        for kind in (Sending, SendingToAnother, Toy)
    ]
    assert hashes[0] == hashes[1] != hashes[2]
