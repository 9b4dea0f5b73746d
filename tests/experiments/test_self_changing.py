"""Networks that write to their own weights or buffers in a pass, unseen by PyTorch's counts."""

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
    """Is a layer with a branch, which torch.fx keeps whole."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < torch.inf:
            renorm(self, ())
        return super().forward(x)


def with_renorm_inside() -> nn.Module:
    model = Toy()
    model.conv2.__class__ = Renormalising
    return model


class Replacing(Toy):
    """Gives a parameter new memory in each pass."""

    def forward(self, images: Tensor) -> Tensor:
        self.fc.weight.data = F.normalize(self.fc.weight.data, dim=1)
        return super().forward(images)


class Tracking(Toy):
    """Normalises by each batch, and tracks its statistics, in evaluation mode as well."""

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
def test_values_that_a_pass_changes_are_put_back(
    make: Callable[[], nn.Module], layers: Sequence[str], same: Callable[[Toy], None] | None
) -> None:
    model = mix_modes(make())
    before = snapshot(model)
    made = toy_study(model=model, layers=layers, metrics=["cka"], block=1)
    assert snapshot(model) == before
    seen = []
    rows = made.run(progress=lambda _step: seen.append(snapshot(model) == before))
    assert seen == [True] * 3 * len(layers)
    describe(made)
    assert snapshot(model) == before
    assert made.run().equals(rows)
    if same is not None:  # the values that every pass computes with
        plain = Toy()
        same(plain)
        expected = toy_study(model=plain, layers=layers, metrics=["cka"], block=1).run()
        pd.testing.assert_frame_equal(rows, expected, rtol=1e-4, atol=1e-6)


def test_a_network_that_drifts_is_refused_and_left_as_it_was() -> None:
    model = mix_modes(Toy())

    def drift(module: nn.Module, _inputs: Any) -> None:
        module.weight.data.mul_(1.01)  # type: ignore

    model.fc.register_forward_pre_hook(drift)
    before = snapshot(model)
    with pytest.raises(LayerError, match=r"^model: two passes of the same images differ; expec"):
        toy_study(model=model)
    assert snapshot(model) == before
