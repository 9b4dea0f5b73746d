"""Ablated forward passes: a network cut at a layer against a hook, once for each cell.

The hook is what captum's LayerFeatureAblation and the study's published code come to. Run all, in
one process, with ``make bench``; the ratios within a group are the result. Logits are compared
before anything is timed. A pass of the whole network, one of what comes before the layer and one of
what follows it are timed alone as well: cells one after the other can't be faster than the hook by
more than C · whole / (prefix + C · suffix), the bound that is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from experiments.presets import PRESETS, load_network
from repsim_kernels.forward import AblatedForward, passes

CELLS, IMAGES = 16, 10
CUTS = (  # and how many of the cells are dead
    ("resnet50", "layer3.0", 0),
    ("alexnet", "features.7", 0),
    ("alexnet", "features.7", 6),
    ("alexnet", "classifier.2", 0),
    ("mobilenet_v2", "features.7", 0),
)


@dataclass
class Cut:
    model: nn.Module
    layer: str
    images: Tensor
    labels: Tensor  # (p,) cells
    dead: int  # cells of units that are zero for all images
    least: dict[str, float] = field(default_factory=dict)  # seconds

    def hooked(self) -> Tensor:
        """The whole network once a cell, under a forward hook that masks the layer's output."""
        logits = []
        for cell in range(CELLS):

            def mask(_module: nn.Module, _inputs: object, out: Tensor, cell: int = cell) -> Tensor:
                return out.clone().masked_fill_((self.labels == cell).view(out.shape[1:]), 0)

            handle = self.model.get_submodule(self.layer).register_forward_hook(mask)
            with torch.no_grad():
                logits.append(self.model(self.images))
            handle.remove()
        return torch.stack(logits)

    def ours(self, forward: AblatedForward) -> Tensor:
        return forward.logits(forward.prefix(self.images), self.labels, CELLS)


@pytest.fixture(params=CUTS, scope="module", ids=str)
def cut(request, findings) -> Iterator[Cut]:
    name, layer, dead = request.param
    model = load_network(PRESETS[name].networks[0], "random").model
    images = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    act = AblatedForward(model, layer).prefix(images).activation
    # Cells of units that no image drives, where the layer has enough; the rest at random.
    silent = (act == 0).all(0).flatten()
    labels = torch.randint(dead, CELLS, silent.shape, generator=torch.Generator().manual_seed(2))
    if dead:
        assert int(silent.sum()) >= dead
        labels[silent] = torch.arange(int(silent.sum())) % dead
    made = Cut(model, layer, images, labels, dead)
    yield made
    findings.append(summary(made))


def title(cut: Cut) -> str:
    dead = f", {cut.dead} of them dead" if cut.dead else ""
    return f"{type(cut.model).__name__} {cut.layer}, {CELLS} cells{dead} x {IMAGES} images"


def summary(cut: Cut) -> str:
    t = cut.least
    line = f"{title(cut)}: {t['hooked'] / t['ours']:.2f} times as fast as the hook"
    if "suffix" in t:
        bound = CELLS * t["whole"] / (t["prefix"] + CELLS * t["suffix"])
        share = t["hooked"] / t["ours"] / bound
        line += f"; one cell after the other the bound is {bound:.2f} ({share:.0%} of it)"
    return line


def time(benchmark, cut: Cut, name: str, run: Callable[[], object], rounds: int) -> None:
    benchmark.group = title(cut)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    cut.least[name] = benchmark.stats.stats.min


def test_forward(benchmark, cut):
    """Prefix and all cells; the trial of the cut was before."""
    forward = AblatedForward(cut.model, cut.layer)
    torch.testing.assert_close(cut.ours(forward), cut.hooked(), rtol=1e-4, atol=1e-4)
    time(benchmark, cut, "ours", lambda: cut.ours(forward), rounds=5)


def test_hooked(benchmark, cut):
    time(benchmark, cut, "hooked", cut.hooked, rounds=3)


@pytest.mark.parametrize("part", ["whole", "prefix", "suffix"])
def test_alone(benchmark, cut, part):
    """What the bound is made of."""
    if cut.dead:
        pytest.skip("the same as without dead cells")
    forward = AblatedForward(cut.model, cut.layer)
    state = forward.prefix(cut.images)
    runs: dict[str, Callable[[], object]] = {
        "whole": lambda: cut.model(cut.images),
        "prefix": lambda: forward.prefix(cut.images),
        "suffix": lambda: passes.tail(state),
    }
    with torch.no_grad():
        time(benchmark, cut, part, runs[part], rounds=5)
