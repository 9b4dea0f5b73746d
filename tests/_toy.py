"""Networks and images small enough for a study of one second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from repsim_kernels.experiments import Study
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.estimate import plan

LAYERS = ("act1", "act2")
CLASSES = ("ant/queen", "bee", "wasp")


class Toy(nn.Module):
    """Two convolutions with in-place ReLUs and a skip, three outputs, images of 3 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act2 = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * 64, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act1(self.conv1(images))
        logits: Tensor = self.fc((x + self.act2(self.conv2(x))).flatten(1))
        return logits


def run_under_hook(
    model: nn.Module, layer: str, images: Tensor, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The logits if a layer's output is changed, and the output as it was, (n, p)."""
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.clone())
        return change(output)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return logits, outputs[0].flatten(1)


class Attending(nn.Module):
    """Two encoder layers with four heads of two neurons each, on the toy's images."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(images).flatten(2).mT)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def toy_images(per_class: int = 5) -> tuple[Tensor, Tensor]:
    """Images (3 · per_class, 3, 8, 8), classes interleaved, each with its own bias."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(3).repeat(per_class)
    images = torch.randn(len(labels), 3, 8, 8, generator=generator)
    return images + torch.randn(3, 3, 8, 8, generator=generator)[labels], labels


def toy_study(**changes: Any) -> Study:
    images, labels = toy_images()
    arguments: dict[str, Any] = {
        "model": Toy(),
        "layers": LAYERS,
        "images": images,
        "labels": labels,
        "name": "toy",
        "classes": CLASSES,
    }
    return Study(**arguments | changes)


def list_study_calls(study: Study, folder: Path) -> dict[str, Callable[[], Any]]:
    """The calls that compute with a study's network, by name; "store" writes to the folder."""
    return {
        "run": study.run,
        "store": lambda: study.run(folder),
        "measure": lambda: next(measure.rows(study, study.units)),
        "about": lambda: measure.describe(study),
        "plan": lambda: plan(study),
    }


def write_image_folder(root: Path, per_class: int = 4) -> Path:
    """Write an ImageFolder of three classes of tiny images, and return its path."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "wasp"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def stop_after(units: int) -> Callable[[Any], None]:
    """A progress callback that interrupts a run once this number of units is finished."""

    def progress(step: Any) -> None:
        if step.done == units:
            raise KeyboardInterrupt

    return progress
