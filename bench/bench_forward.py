"""Ablated forward passes: a network cut at a layer, compared with a forward hook for each cell.

captum's LayerFeatureAblation and the study's published code amount to such a hook. The pass of the
whole network, the pass up to the layer and the pass from the layer on are also timed separately:
cells that run one after another can be at most C · whole / (prefix + C · suffix) times faster than
the hook, which is the bound in bench/README.md's table. No operations are given, since a network's
cost is what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from bench.common.inputs import DEVICE
from bench.conftest import Timer
from repsim_kernels.experiments.inputs.presets import PRESETS, load_network
from repsim_kernels.forward import AblatedForward, State, passes
from repsim_kernels.forward.fills import draw_other_images

CELLS, IMAGES = 16, 10
CUTS = (  # preset, layer, and number of dead cells
    ("resnet50", "layer3.0", 0),
    ("alexnet", "features.7", 0),
    ("alexnet", "features.7", 6),
    ("alexnet", "classifier.2", 0),
    ("mobilenet_v2", "features.7", 0),
)
FILLS = "zero", "mean", "resample", "state"
HOOK = "a forward hook, once a cell"


@dataclass
class Cut:
    model: nn.Module
    layer: str
    forward: AblatedForward
    images: Tensor
    labels: Tensor  # cell of each unit, (p,)
    dead: int  # number of cells whose units are zero for all images

    def run_with_hook(self, images: Tensor, values: Tensor | None = None) -> Tensor:
        """Run the whole network once per cell; a forward hook writes zeros or values to it."""
        logits = []
        for cell in range(CELLS):

            def write(_module: nn.Module, _inputs: object, out: Tensor, cell: int = cell) -> Tensor:
                mask = (self.labels == cell).view(out.shape[1:])
                if values is not None:
                    return torch.where(mask, values, out)
                return out.clone().masked_fill_(mask, 0)

            handle = self.model.get_submodule(self.layer).register_forward_hook(write)
            with torch.no_grad():
                logits.append(self.model(images))
            handle.remove()
        return torch.stack(logits)

    def run_from_cut(self, images: Tensor) -> Tensor:
        """Run the prefix once, and the suffix for all cells."""
        return self.forward.logits(self.forward.prefix(images), self.labels, CELLS)

    def options(self) -> dict[str, Any]:
        """Return the options that all benchmarks of the cut share; inputs are the same images."""
        dead = f", {self.dead} cells dead" if self.dead else ""
        return {
            "make": lambda g: (self.images.clone(),),
            "check": assert_near,
            "label": f"{type(self.model).__name__} {self.layer}{dead}",
            "shape": {"images": IMAGES, "C": CELLS},
        }


def assert_near(got: Tensor, want: Tensor) -> None:
    """Compare logits; on CUDA, cuDNN's convolutions use TF32 by default."""
    tol = 1e-4 if DEVICE == "cpu" else 1e-2
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.fixture(params=CUTS, scope="module", ids=str)
def cut(request: pytest.FixtureRequest) -> Cut:
    name, layer, dead = request.param
    model = load_network(PRESETS[name].networks[0], "random").model.to(DEVICE)
    images = torch.randn(IMAGES, 3, 224, 224, generator=Generator().manual_seed(1)).to(DEVICE)
    forward = AblatedForward(model, layer)
    act = forward.prefix(images).activation  # also verifies the cut, which isn't timed
    # Dead cells get units that no image activates; the other units are assigned at random.
    silent = (act == 0).all(0).flatten().cpu()
    labels = torch.randint(dead, CELLS, silent.shape, generator=Generator().manual_seed(2))
    if dead:
        assert int(silent.sum()) >= dead
        labels[silent] = torch.arange(int(silent.sum())) % dead
    return Cut(model, layer, forward, images, labels.to(DEVICE), dead)


def test_hooked(timed: Timer, cut: Cut) -> None:
    timed(
        "AblatedForward",
        call=cut.run_with_hook,
        oracle=cut.run_from_cut,
        name=HOOK,
        **cut.options(),
    )


def test_forward(timed: Timer, cut: Cut) -> None:
    timed("AblatedForward", call=cut.run_from_cut, oracle=cut.run_with_hook, **cut.options())


@pytest.mark.parametrize("cut", CUTS[1:2], indirect=True, ids=str)
@pytest.mark.parametrize("fill", FILLS)
def test_fill(timed: Timer, cut: Cut, fill: str) -> None:
    """Time all cells from a state whose output without ablation is known."""
    state, other = cut.forward.prefix(cut.images), cut.forward.prefix(cut.images.flip(3))
    cut.forward.intact(state)
    act = state.activation
    values = {
        "zero": torch.zeros_like(act),
        "mean": act.mean(0, dtype=torch.float64).to(act.dtype),
        "resample": act[draw_other_images(len(act), 0)],
        "state": other.activation,
    }[fill]
    passed = other if fill == "state" else fill
    timed(
        "AblatedForward",
        call=lambda _: cut.forward.logits(state, cut.labels, CELLS, fill=passed),
        oracle=lambda images: cut.run_with_hook(images, values),
        name=f"suffix for all cells, fill={fill}",
        **cut.options(),
    )


@pytest.mark.parametrize("cut", [c for c in CUTS if not c[2]], indirect=True, ids=str)
@pytest.mark.parametrize("part", ["whole", "prefix", "suffix"])
def test_part(timed: Timer, cut: Cut, part: str) -> None:
    """Time the three passes that determine the bound."""
    forward = cut.forward
    outputs: list[Tensor] = []

    def get_hooked_activation(images: Tensor) -> Tensor:
        """Return the layer's output as a hook sees it."""
        module = cut.model.get_submodule(cut.layer)
        handle = module.register_forward_hook(lambda _m, _i, out: outputs.append(out.clone()))
        cut.model(images)
        handle.remove()
        return outputs.pop()

    states: dict[int, State] = {}  # by the address of their activation

    def make_state(_: Generator) -> tuple[Tensor, ...]:
        """Return the activation of a new state."""
        state = forward.prefix(cut.images)
        states[state.activation.data_ptr()] = state
        return (state.activation,)

    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "whole": (cut.model, lambda images: passes.run_tail(forward.prefix(images))),
        "prefix": (lambda images: forward.prefix(images).activation, get_hooked_activation),
        "suffix": (
            lambda act: passes.run_tail(states[act.data_ptr()]),
            lambda _: cut.model(cut.images),
        ),
    }
    call, oracle = calls[part]
    options = cut.options() | ({"make": make_state} if part == "suffix" else {})
    with torch.no_grad():
        timed("AblatedForward", call=call, oracle=oracle, name=part, **options)
