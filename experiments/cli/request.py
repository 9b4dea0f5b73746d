"""Turn command-line options into studies: load the networks and images and combine them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models as zoo
from torch import nn

from repsim_kernels.experiments.errors import OptionsError, StudyError
from repsim_kernels.experiments.inputs import imagenet, images
from repsim_kernels.experiments.inputs.images import Stimuli
from repsim_kernels.experiments.inputs.networks import SMALL, list_default_layers, load
from repsim_kernels.experiments.inputs.presets import (
    PRESETS,
    RANDOM,
    LoadedNetwork,
    Network,
    Preset,
    assign_weights,
    load_network,
)
from repsim_kernels.experiments.study.checks import Draws
from repsim_kernels.experiments.study.study import Study
from repsim_kernels.forward.checks import find_similar_modules
from repsim_kernels.forward.sites import split_name


class Sample(NamedTuple):
    """How much of a network the demo uses, evenly spaced, unless ``--full`` is given."""

    layers: int
    targets: int
    metric_images: int  # per class


# Chosen so that all together run in two minutes on two cores.
SAMPLES = {
    "alexnet_small": Sample(layers=7, targets=7, metric_images=20),
    "mobilenet_v2_small": Sample(layers=8, targets=7, metric_images=20),
    "resnet50_small": Sample(layers=8, targets=7, metric_images=20),
    "vit_small": Sample(layers=3, targets=7, metric_images=20),
}


@dataclass(frozen=True)
class SweepOptions:
    """The options of ``sweep``; None for those that were not given."""

    weights: list[str] | None = None
    images: str | None = None
    labels: Path | None = None
    classes: list[str] | None = None
    layers: list[str] | None = None
    images_per_class: int | None = None
    metric_images: int | None = None
    size: int | None = None
    skip_bad: bool = False
    study: dict[str, Any] = field(default_factory=dict)  # arguments of `Study` that were given


class StudySet(NamedTuple):
    """The studies of one run, with a description of their images."""

    studies: list[Study]
    source: str
    normalisations: tuple[str, ...] = ()  # of each study's images
    remarks: tuple[str, ...] = ()  # lines to print about weights and images


@dataclass(frozen=True)
class StudyFactory:
    """Makes the studies of a run in any process, from the options and the networks' names."""

    options: SweepOptions
    names: tuple[str, ...] = ()
    preset: str | None = None
    sampled: bool = False

    @property
    def small(self) -> bool:
        """Whether all networks are the small ones that come with the package."""
        return self.preset is None and all(name in SMALL for name in self.names)

    def make(self) -> StudySet:
        """Make the studies.

        Raises
        ------
        OptionsError, DataError, ModelError, StudyError, LayerError
        """
        torch.set_flush_denormal(True)  # tiny activations are slow on a CPU otherwise
        if self.preset is not None:
            return make_preset_studies(self.preset, self.options)
        return make_model_studies(self.names, self.options, self.sampled)

    def __call__(self, device: str) -> list[Study]:
        """Make the studies on a device."""
        options = replace(self.options, study=self.options.study | {"device": device})
        return replace(self, options=options).make().studies


def make_model_studies(names: Sequence[str], options: SweepOptions, sampled: bool) -> StudySet:
    """Make studies of the shipped networks, torchvision's, or a user's own.

    Raises
    ------
    OptionsError, DataError, ModelError, StudyError, LayerError
    """
    if options.labels is not None or options.images_per_class is not None:
        option = "labels" if options.labels is not None else "images_per_class"
        raise OptionsError(f"{option}: applies only to presets; pass --preset NAME")
    if options.images is not None:
        side = _default_size(names) if options.size is None else options.size
        stimuli = images.load_image_folder(options.images, options.classes, side, options.skip_bad)
    elif others := [name for name in names if name not in SMALL]:
        _check_name(others[0])
        raise OptionsError(f"images: required for {others[0]!r}; pass --images FOLDER")
    elif options.size is not None:
        raise OptionsError("size: applies only to your own images; pass --images FOLDER")
    else:
        stimuli = images.load_demo()
    files = [None] * len(names) if options.weights is None else options.weights
    if len(files) != len(names):
        raise OptionsError(
            f"weights: {len(files)} for {len(names)} models; expected one for each --model"
        )
    remarks: list[str] = []
    studies = []
    for name, file in zip(names, files, strict=True):
        network = load(name, file, log=remarks.append)
        sample = SAMPLES.get(name) if sampled else None
        studies.append(_make_model_study(name, network, stimuli, sample, options))
    return StudySet(
        studies,
        stimuli.source,
        (stimuli.normalisation,) * len(studies),
        (*remarks, *_format_warnings([stimuli])),
    )


def _check_name(name: str) -> None:
    """Raise ModelError if a network is neither a builder of torchvision nor the user's own."""
    if ":" not in name and name not in zoo.list_models(module=zoo):
        load(name)


def _check_layers(names: Iterable[str] | None, network: nn.Module, network_name: str) -> None:
    modules = dict(network.named_modules())
    for name in names or ():
        if split_name(modules, name)[0] not in modules:
            similar = find_similar_modules(modules, name)
            raise StudyError(
                f"layers: {network_name} has no module {name!r}; "
                f"expected names such as {', '.join(similar) or 'none: it has no submodules'}"
            )


def _default_size(names: Sequence[str]) -> int | None:
    """The side of a folder's images: 224 for torchvision's networks, 32 for the small ones.

    None, the files' own size, for a user's own network.
    """
    if any(":" not in name and name not in SMALL for name in names):
        return 224
    return 32 if any(name in SMALL for name in names) else None


def _format_warnings(stimuli: Sequence[Stimuli]) -> list[str]:
    return [f"Warning: {text}" for text in dict.fromkeys(s.enlarged for s in stimuli) if text]


def _make_model_study(
    name: str, network: nn.Module, stimuli: Stimuli, sample: Sample | None, options: SweepOptions
) -> Study:
    if unknown := [c for c in options.classes or () if c not in stimuli.classes]:
        known = ", ".join(stimuli.classes)
        raise StudyError(f"classes: {unknown[0]!r} is unknown; expected some of {known}")
    _check_layers(options.layers, network, name)
    targets = sorted(set(stimuli.labels.tolist()))
    layers, metric_images = options.layers, options.metric_images
    if options.classes is not None:
        targets = [label for label in targets if stimuli.classes[label] in options.classes]
    elif sample is not None:
        targets = space_evenly(targets, sample.targets)
    if layers is None:
        layers = _choose_layers(name, network, options)
        layers = layers if sample is None else space_evenly(layers, sample.layers)
    if metric_images is None and sample is not None:
        metric_images = sample.metric_images
    return Study(
        network,
        layers,
        stimuli.images,
        stimuli.labels,
        targets,
        name=name,
        classes=stimuli.classes,
        metric_images=metric_images,
        **options.study,
    )


def _choose_layers(name: str, network: nn.Module, options: SweepOptions) -> list[str]:
    """List a network's default layers, or with ``--cells heads`` those that are heads."""
    layers = list_default_layers(network)
    if options.study.get("cells") != "heads":
        return layers
    heads = [layer for layer in layers if layer.endswith(":heads")]
    if not heads:
        raise OptionsError(
            f"cells: heads, which no default layer of {name} has; expected other cells, or "
            "--layers such as block.attn:heads"
        )
    return heads


def make_preset_studies(name: str, options: SweepOptions) -> StudySet:
    """Make the studies of a preset: full-size networks on ImageNet images.

    Raises
    ------
    OptionsError, DataError, ModelError, StudyError, LayerError
    """
    if name not in PRESETS:
        raise OptionsError(f"preset: {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if options.images is None:
        raise OptionsError(
            "images: required for a preset; pass --images FOLDER with ImageNet's validation "
            "images, or --images random"
        )
    if options.size is not None:
        raise OptionsError(
            "size: does not apply to presets, whose images have the size that the weights were "
            "trained on"
        )
    if options.labels is not None and options.images == "random":
        raise OptionsError("labels: does not apply to random images; pass --images FOLDER")
    if options.layers is not None and len(preset.networks) > 1:
        raise OptionsError(
            f"layers: {name!r} has several networks; expected a preset with a single network"
        )
    files = assign_weights(preset, options.weights)
    # Load all weights before any images, which take minutes, so that missing files fail early.
    loaded = [load_network(network, files[network.name]) for network in preset.networks]
    pairs = [
        _make_preset_study(preset, network, ready, options)
        for network, ready in zip(preset.networks, loaded, strict=True)
    ]
    stimuli = [loaded_stimuli for _, loaded_stimuli in pairs]
    weights = [f"weights: {ready.note}" for ready in loaded if ready.note != RANDOM]
    return StudySet(
        [study for study, _ in pairs],
        "; ".join(dict.fromkeys(each.source for each in stimuli)),
        tuple(each.normalisation for each in stimuli),
        (*weights, *_format_warnings(stimuli)),
    )


def _make_preset_study(
    preset: Preset, network: Network, loaded: LoadedNetwork, options: SweepOptions
) -> tuple[Study, Stimuli]:
    _check_layers(options.layers, loaded.model, network.name)
    targets = imagenet.find_outputs(network.classes if options.classes is None else options.classes)
    per_class = options.images_per_class
    if per_class is None:
        per_class = network.images_per_class
    if options.images == "random":
        stimuli = imagenet.make_noise(targets, per_class)
    else:
        assert options.images is not None
        stimuli = imagenet.load_validation(
            options.images,
            targets,
            loaded.transform,
            images_per_class=per_class,
            labels=options.labels,
            skip_bad=options.skip_bad,
        )
    caveats = [loaded.note] if loaded.note == RANDOM else []
    caveats += ["random images"] if options.images == "random" else []
    others = network.others if network.others and network.others < len(targets) - 1 else None
    arguments = preset.options | options.study
    if "ridge" in options.study and "penalty" not in options.study:
        arguments["penalty"] = 0.0
    model = loaded.model
    if options.study.get("device", "cpu").startswith("cpu"):
        # Measured to be 1.5 times as fast on a CPU; not measured on a GPU.
        model = model.to(memory_format=torch.channels_last)
    study = Study(
        model,
        _choose_layers(network.name, model, options) if options.layers is None else options.layers,
        stimuli.images,
        stimuli.labels,
        targets,
        name=network.name,
        classes=stimuli.classes,
        others=others,
        draws=Draws(network.draws, network.neurons_per_draw, preset.paired),
        metric_images=options.metric_images,
        note=f"not evidence: {', '.join(caveats)}" if caveats else None,
        **arguments,
    )
    return study, stimuli


def space_evenly(values: list[Any], count: int) -> list[Any]:
    """Select ``count`` evenly spaced values, including the first and the last."""
    if count >= len(values):
        return values
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
