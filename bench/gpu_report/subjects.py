"""The networks that the sheet's study is timed on, and images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from repsim_kernels.experiments.inputs import imagenet
from repsim_kernels.experiments.inputs import images as data
from repsim_kernels.experiments.inputs.networks import load, study_layers
from repsim_kernels.experiments.inputs.presets import PRESETS, Network, load_network
from repsim_kernels.experiments.study.checks import Draws
from repsim_kernels.experiments.study.study import Study

_PRESET = PRESETS["hayne2024"]
_FEW, _CLASSES = 8, 4  # images of a class, and classes, of a rehearsal


class Subject(NamedTuple):
    """A study at full size, and the images of some of its classes."""

    study: Study
    images: Callable[[Sequence[int]], Tensor]  # as many of each, class by class


def subjects(device: str, quick: bool) -> dict[str, Callable[[], Subject]]:
    """How to make each of the paper's networks, or one of those that come with the package."""
    if quick:
        return {"alexnet_small": partial(_small, device)}
    return {network.name: partial(_of_paper, network, device) for network in _PRESET.networks}


def _of_paper(network: Network, device: str) -> Subject:
    """The preset's study, random weights, of two images; the others' memory is never used."""
    model = load_network(network, "random").model
    if device == "cpu":  # as the study has them there
        model = model.to(memory_format=torch.channels_last)
    targets = imagenet.outputs(network.classes)
    two = imagenet.noise(targets[:1], 2).images
    images = torch.empty(len(targets) * network.images, *two.shape[1:])
    images[:2] = two
    study = Study(
        model,
        study_layers(model),
        images,
        torch.tensor(targets).repeat_interleave(network.images),
        targets,
        _PRESET.grid,
        _PRESET.metrics or (),
        name=network.name,
        edges=_PRESET.edges,
        others=network.others,
        ridge=_PRESET.ridge,
        penalty=_PRESET.penalty,
        probes=_PRESET.probes,
        draws=Draws(network.draws, network.neurons_per_draw, _PRESET.paired),
        device=device,
    )
    return Subject(study, lambda classes: imagenet.noise(classes, network.images).images)


def _small(device: str) -> Subject:
    shown = data.demo()

    def images(classes: Sequence[int]) -> Tensor:
        return torch.cat([shown.images[shown.labels == label][:_FEW] for label in classes])

    model, classes = load("alexnet_small"), list(range(_CLASSES))
    study = Study(
        model,
        study_layers(model),
        images(classes),
        torch.tensor(classes).repeat_interleave(_FEW),
        classes,
        _PRESET.grid,
        _PRESET.metrics or (),
        name="alexnet_small",
        edges=_PRESET.edges,
        penalty=_PRESET.penalty,
        probes=_PRESET.probes,
        draws=Draws(200, None, _PRESET.paired),
        device=device,
    )
    return Subject(study, images)
