"""Networks whose passes change their weights or buffers without changing version counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from _networks import mix_modes, snapshot
from _toy import LAYERS, Toy, toy_study
from torch import Tensor, nn
from torch.nn import functional as F

from repsim_kernels import LayerError
from repsim_kernels.experiments.study.measure import describe


def renorm(module: nn.Module, _inputs: Any) -> None:
    module.weight.data.div_(module.weight.data.norm(dim=1, keepdim=True))  # type: ignore


def with_renorm() -> nn.Module:
    model = Toy()
    model.fc.register_forward_pre_hook(renorm)
    return model


def normalised(model: Toy) -> None:
    renorm(model.fc, ())


class Renormalising(nn.Conv2d):
    """A layer with a branch, which torch.fx does not trace into."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < torch.inf:
            renorm(self, ())
        return super().forward(x)


def with_renorm_inside() -> nn.Module:
    model = Toy()
    model.conv2.__class__ = Renormalising
    return model


class Replacing(Toy):
    """Replaces a parameter's memory in each pass."""

    def forward(self, images: Tensor) -> Tensor:
        self.fc.weight.data = F.normalize(self.fc.weight.data, dim=1)
        return super().forward(images)


class Tracking(Toy):
    """Normalises by batch statistics and tracks them, even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        images = F.batch_norm(images, self.mean, self.variance, training=True)  # type: ignore
        return super().forward(images)


@pytest.mark.parametrize(
    ("make", "layers", "same"),
    [
        (with_renorm, LAYERS, normalised),
        (with_renorm_inside, ["conv2"], lambda model: renorm(model.conv2, ())),
        (Replacing, LAYERS, normalised),
        (Tracking, LAYERS, None),
    ],
)
def test_values_changed_by_a_pass_are_restored(
    make: Callable[[], nn.Module], layers: Sequence[str], same: Callable[[Toy], None] | None
) -> None:
    model = mix_modes(make())
    before = snapshot(model)
    study = toy_study(model=model, layers=layers, metrics=["cka"], block=1)
    assert snapshot(model) == before
    restored = []
    rows = study.run(progress=lambda _step: restored.append(snapshot(model) == before)).table
    assert restored == [True] * 3 * len(layers)
    describe(study)
    assert snapshot(model) == before
    assert study.run().table.equals(rows)
    if same is not None:  # a network that has the normalised values already
        plain = Toy()
        same(plain)
        expected = toy_study(model=plain, layers=layers, metrics=["cka"], block=1).run().table
        # Changes of float32 log probabilities, which are as large as 18.
        pd.testing.assert_frame_equal(rows, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_drifts_is_refused_and_restored() -> None:
    model = mix_modes(Toy())

    def drift(module: nn.Module, _inputs: Any) -> None:
        module.weight.data.mul_(1.01)  # type: ignore

    model.fc.register_forward_pre_hook(drift)
    before = snapshot(model)
    with pytest.raises(LayerError, match=r"^model: two passes of the same images differ; expec"):
        toy_study(model=model)
    assert snapshot(model) == before
