"""What the command line asks for: networks, their images, and the studies of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from repsim_kernels.experiments.errors import OptionsError, StudyError
from repsim_kernels.experiments.inputs import imagenet, images
from repsim_kernels.experiments.inputs.images import Stimuli
from repsim_kernels.experiments.inputs.networks import SMALL, load, study_layers
from repsim_kernels.experiments.inputs.presets import (
    PRESETS,
    RANDOM,
    Loaded,
    Network,
    Preset,
    load_network,
    weights_for,
)
from repsim_kernels.experiments.study.checks import Draws
from repsim_kernels.experiments.study.study import Study


class Sample(NamedTuple):
    """What the demo takes of a network, evenly space_evenly, unless ``--full`` is given."""

    layers: int
    targets: int
    stimuli: int  # of each class, for the metrics


# Chosen to take two minutes on two cores, all three together.
SAMPLES = {
    "alexnet_small": Sample(layers=7, targets=7, stimuli=20),
    "mobilenet_v2_small": Sample(layers=8, targets=7, stimuli=20),
    "resnet50_small": Sample(layers=8, targets=7, stimuli=20),
}


@dataclass(frozen=True)
class SweepOptions:
    """The options of ``sweep``; None where one was not given."""

    weights: list[str] | None = None
    images: str | None = None
    labels: Path | None = None
    classes: list[str] | None = None
    layers: list[str] | None = None
    per_class: int | None = None
    stimuli: int | None = None
    size: int | None = None
    skip_bad: bool = False
    study: dict[str, Any] = field(default_factory=dict)  # for `Study`, those that were given


class StudySet(NamedTuple):
    """Studies to run as one, and what their images are."""

    studies: list[Study]
    source: str
    normalisations: tuple[str, ...] = ()  # of each study's images
    remarks: tuple[str, ...] = ()  # lines on weights and images that a person should see


@dataclass(frozen=True)
class StudyFactory:
    """How any process makes the studies of a run: what was asked for, and of what networks."""

    asked: SweepOptions
    names: tuple[str, ...] = ()
    preset: str | None = None
    sampled: bool = False

    @property
    def small(self) -> bool:
        """Whether all networks are the small ones that come with the package."""
        return self.preset is None and all(name in SMALL for name in self.names)

    def job(self) -> StudySet:
        """Make them; raises OptionsError, DataError, ModelError, StudyError, LayerError."""
        torch.set_flush_denormal(True)  # tiny activations are slow on a CPU otherwise
        if self.preset is not None:
            return make_preset_studies(self.preset, self.asked)
        return make_model_studies(self.names, self.asked, self.sampled)

    def __call__(self, device: str) -> list[Study]:
        """The studies on a device."""
        asked = replace(self.asked, study=self.asked.study | {"device": device})
        return replace(self, asked=asked).job().studies


def make_model_studies(names: Sequence[str], asked: SweepOptions, sampled: bool) -> StudySet:
    """Studies of the shipped networks, torchvision's, or a user's own.

    Raises
    ------
    OptionsError, DataError, ModelError, StudyError, LayerError
    """
    if asked.labels is not None or asked.per_class is not None:
        option = "labels" if asked.labels is not None else "per-class"
        raise OptionsError(f"{option}: only with --preset")
    if asked.images is not None:
        side = _default_size(names) if asked.size is None else asked.size
        shown = images.image_folder(asked.images, asked.classes, side, asked.skip_bad)
    elif not all(name in SMALL for name in names):
        other = next(name for name in names if name not in SMALL)
        raise OptionsError(f"images: {other!r} needs some; expected a folder, --images")
    elif asked.size is not None:
        raise OptionsError(f"size: {asked.size} without images; expected a folder, --images")
    else:
        shown = images.demo()
    given = [None] * len(names) if asked.weights is None else asked.weights
    if len(given) != len(names):
        raise OptionsError(
            f"weights: {len(given)} for {len(names)} models; expected one for each --model"
        )
    remarks: list[str] = []
    studies = []
    for name, path in zip(names, given, strict=True):
        network = load(name, path, log=remarks.append)
        sample = SAMPLES.get(name) if sampled else None
        studies.append(_of_model(name, network, shown, sample, asked))
    return StudySet(
        studies,
        shown.source,
        (shown.normalisation,) * len(studies),
        (*remarks, *_warnings([shown])),
    )


def _default_size(names: Sequence[str]) -> int | None:
    """The side of a folder's images: 224 for torchvision's networks, 32 for the small ones.

    None, the files' own size, for a user's own network.
    """
    if any(":" not in name and name not in SMALL for name in names):
        return 224
    return 32 if any(name in SMALL for name in names) else None


def _warnings(shown: Sequence[Stimuli]) -> list[str]:
    return [f"Warning: {text}" for text in dict.fromkeys(s.enlarged for s in shown) if text]


def _of_model(
    name: str, network: nn.Module, shown: Stimuli, sample: Sample | None, asked: SweepOptions
) -> Study:
    if unknown := [c for c in asked.classes or () if c not in shown.classes]:
        known = ", ".join(shown.classes)
        raise StudyError(f"classes: {unknown[0]!r} is unknown; expected some of {known}")
    targets = sorted(set(shown.labels.tolist()))
    layers, stimuli = asked.layers, asked.stimuli
    if asked.classes is not None:
        targets = [label for label in targets if shown.classes[label] in asked.classes]
    elif sample is not None:
        targets = space_evenly(targets, sample.targets)
    if layers is None:
        layers = study_layers(network)
        layers = layers if sample is None else space_evenly(layers, sample.layers)
    if stimuli is None and sample is not None:
        stimuli = sample.stimuli
    return Study(
        network,
        layers,
        shown.images,
        shown.labels,
        targets,
        name=name,
        classes=shown.classes,
        metric_images=stimuli,
        **asked.study,
    )


def make_preset_studies(name: str, asked: SweepOptions) -> StudySet:
    """The studies of a preset: full-size networks, ImageNet's images.

    Raises
    ------
    OptionsError, DataError, ModelError, StudyError, LayerError
    """
    if name not in PRESETS:
        raise OptionsError(f"preset: {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if asked.images is None:
        raise OptionsError(
            "images: a preset needs ImageNet's; expected a folder, or random, --images"
        )
    if asked.size is not None:
        raise OptionsError(
            "size: a preset's images have the size that its weights were trained with"
        )
    if asked.labels is not None and asked.images == "random":
        raise OptionsError("labels: of no use to random images; expected a folder, --images")
    if asked.layers is not None and len(preset.networks) > 1:
        raise OptionsError(f"layers: {name!r} is of several networks; expected a preset of one")
    given = weights_for(preset, asked.weights)
    # All weights before any images, which take minutes: what is missing is said at once.
    loaded = [load_network(network, given[network.name]) for network in preset.networks]
    both = [
        _of_network(preset, network, ready, asked)
        for network, ready in zip(preset.networks, loaded, strict=True)
    ]
    shown = [stimuli for _, stimuli in both]
    weights = [f"weights: {ready.note}" for ready in loaded if ready.note != RANDOM]
    return StudySet(
        [study for study, _ in both],
        "; ".join(dict.fromkeys(stimuli.source for stimuli in shown)),
        tuple(stimuli.normalisation for stimuli in shown),
        (*weights, *_warnings(shown)),
    )


def _of_network(
    preset: Preset, network: Network, loaded: Loaded, asked: SweepOptions
) -> tuple[Study, Stimuli]:
    targets = imagenet.outputs(network.classes if asked.classes is None else asked.classes)
    per_class = network.images_per_class if asked.per_class is None else asked.per_class
    if asked.images == "random":
        shown = imagenet.noise(targets, per_class)
    else:
        assert asked.images is not None
        shown = imagenet.validation(
            asked.images,
            targets,
            loaded.transform,
            images_per_class=per_class,
            labels=asked.labels,
            skip_bad=asked.skip_bad,
        )
    drawn = [loaded.note] if loaded.note == RANDOM else []
    drawn += ["random images"] if asked.images == "random" else []
    others = network.others if network.others and network.others < len(targets) - 1 else None
    options = preset.options | asked.study
    if "ridge" in asked.study and "penalty" not in asked.study:
        options["penalty"] = 0.0
    model = loaded.model
    if asked.study.get("device", "cpu").startswith("cpu"):
        # Half as fast again on a CPU, by measurement; nothing of it has been measured on a GPU.
        model = model.to(memory_format=torch.channels_last)
    study = Study(
        model,
        study_layers(model) if asked.layers is None else asked.layers,
        shown.images,
        shown.labels,
        targets,
        name=network.name,
        classes=shown.classes,
        others=others,
        draws=Draws(network.draws, network.neurons_per_draw, preset.paired),
        metric_images=asked.stimuli,
        note=f"not evidence: {', '.join(drawn)}" if drawn else None,
        **options,
    )
    return study, shown


def space_evenly(values: list[Any], count: int) -> list[Any]:
    """The first, the last, and what is evenly space_evenly between."""
    if count >= len(values):
        return values
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
