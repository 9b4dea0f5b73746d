"""Ablated forward passes: a network cut at a layer against a hook, once for each cell.

The hook is what captum's LayerFeatureAblation and the study's published code come to. A pass of the
whole network, one of what comes before the layer and one of what follows it are timed alone as
well: cells one after the other can't be faster than the hook by more than
C · whole / (prefix + C · suffix), the bound in the README's table. No operations are given: what a
network needs is what is found out here.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor, nn

from bench.common.inputs import DEVICE
from repsim_kernels.experiments.inputs.presets import PRESETS, load_network
from repsim_kernels.forward import AblatedForward, State, passes

CELLS, IMAGES = 16, 10
CUTS = (  # and how many of the cells are dead
    ("resnet50", "layer3.0", 0),
    ("alexnet", "features.7", 0),
    ("alexnet", "features.7", 6),
    ("alexnet", "classifier.2", 0),
    ("mobilenet_v2", "features.7", 0),
)
HOOK = "a forward hook, once a cell"


@dataclass
class Cut:
    model: nn.Module
    layer: str
    forward: AblatedForward
    images: Tensor
    labels: Tensor  # (p,) cells
    dead: int  # cells of units that are zero for all images

    def hooked(self, images: Tensor) -> Tensor:
        """The whole network once a cell, under a forward hook that masks the layer's output."""
        logits = []
        for cell in range(CELLS):

            def mask(_module: nn.Module, _inputs: object, out: Tensor, cell: int = cell) -> Tensor:
                return out.clone().masked_fill_((self.labels == cell).view(out.shape[1:]), 0)

            handle = self.model.get_submodule(self.layer).register_forward_hook(mask)
            with torch.no_grad():
                logits.append(self.model(images))
            handle.remove()
        return torch.stack(logits)

    def ours(self, images: Tensor) -> Tensor:
        """Prefix and all cells."""
        return self.forward.logits(self.forward.prefix(images), self.labels, CELLS)

    def measured(self) -> dict[str, object]:
        """What benchmarks of the cut have in common; inputs are the same images each time."""
        dead = f", {self.dead} cells dead" if self.dead else ""
        return {
            "make": lambda g: (self.images.clone(),),
            "check": near,
            "what": f"{type(self.model).__name__} {self.layer}{dead}",
            "shape": {"images": IMAGES, "C": CELLS},
        }


def near(got: Tensor, want: Tensor) -> None:
    """On CUDA cuDNN's convolutions are TF32 by default, the kernels as accurate as float32."""
    tol = 1e-4 if DEVICE == "cpu" else 1e-2
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.fixture(params=CUTS, scope="module", ids=str)
def cut(request) -> Cut:
    name, layer, dead = request.param
    model = load_network(PRESETS[name].networks[0], "random").model.to(DEVICE)
    images = torch.randn(IMAGES, 3, 224, 224, generator=Generator().manual_seed(1)).to(DEVICE)
    forward = AblatedForward(model, layer)
    act = forward.prefix(images).activation  # and the trial of the cut, which isn't timed
    # Cells of units that no image drives, where the layer has enough; the rest at random.
    silent = (act == 0).all(0).flatten().cpu()
    labels = torch.randint(dead, CELLS, silent.shape, generator=Generator().manual_seed(2))
    if dead:
        assert int(silent.sum()) >= dead
        labels[silent] = torch.arange(int(silent.sum())) % dead
    return Cut(model, layer, forward, images, labels.to(DEVICE), dead)


def test_hooked(timed, cut):
    timed("AblatedForward", call=cut.hooked, oracle=cut.ours, name=HOOK, **cut.measured())


def test_forward(timed, cut):
    timed("AblatedForward", call=cut.ours, oracle=cut.hooked, **cut.measured())


@pytest.mark.parametrize("cut", [c for c in CUTS if not c[2]], indirect=True, ids=str)
@pytest.mark.parametrize("part", ["whole", "prefix", "suffix"])
def test_alone(timed, cut, part):
    """What the bound is made of."""
    forward = cut.forward
    kept: list[Tensor] = []

    def seen(images: Tensor) -> Tensor:
        """What the layer gives, as a hook sees it."""
        module = cut.model.get_submodule(cut.layer)
        handle = module.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()))
        cut.model(images)
        handle.remove()
        return kept.pop()

    states: dict[int, State] = {}  # by where their activations are

    def apart(_: Generator) -> tuple[Tensor, ...]:
        """The activation of a state of its own."""
        state = forward.prefix(cut.images)
        states[state.activation.data_ptr()] = state
        return (state.activation,)

    calls = {
        "whole": (cut.model, lambda images: passes.run_tail(forward.prefix(images))),
        "prefix": (lambda images: forward.prefix(images).activation, seen),
        "suffix": (
            lambda act: passes.run_tail(states[act.data_ptr()]),
            lambda _: cut.model(cut.images),
        ),
    }
    call, oracle = calls[part]
    measured = cut.measured() | ({"make": apart} if part == "suffix" else {})
    with torch.no_grad():
        timed("AblatedForward", call=call, oracle=oracle, name=part, **measured)
