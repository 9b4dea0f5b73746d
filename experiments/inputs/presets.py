"""The studies at full size: each preset's networks, classes and choices, and the weights."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models as zoo
from torch import nn

from repsim_kernels.experiments.errors import ModelError, one_line
from repsim_kernels.experiments.inputs.checkpoints import count_outputs, fill, read_checkpoint

TEN = (  # schooner, brain coral, junco, snail, grey whale, Siberian husky, electric fan, bookcase,
    # fountain pen, toaster
    *("n04147183", "n01917289", "n01534433", "n01944390", "n02066245"),
    *("n02110185", "n03271574", "n02870880", "n03388183", "n04442312"),
)
FIFTY = (
    *TEN,
    *("n02777292", "n04146614", "n03000134", "n03017168", "n02114855"),
    *("n02687172", "n09229709", "n01910747", "n02490219", "n04548280"),
    *("n01737021", "n02102177", "n02120079", "n03379051", "n01945685"),
    *("n07875152", "n02112018", "n01748264", "n02814533", "n02091032"),
    *("n01629819", "n02481823", "n04505470", "n01773157", "n01776313"),
    *("n02087046", "n04372370", "n03666591", "n03467068", "n02091635"),
    *("n02108089", "n03532672", "n03595614", "n04254120", "n04507155"),
    *("n02165105", "n02977058", "n02526121", "n02086646", "n02101556"),
)

RANDOM = "random weights"


@dataclass(frozen=True)
class Network:
    """A network of torchvision's for ImageNet, and what it is shown.

    Parameters
    ----------
    name : str
        What tables and ``--weights NAME=FILE`` call it.
    builder : str
        Of torchvision.models.
    classes : tuple of str
        The target classes, as ImageNet's wnids.
    width : float
        Multiplies the channels; other than 1 only for MobileNetV2.
    others : int, optional
        How many other classes, drawn at random, are shown beside a target; by default all of
        ``classes``.
    images_per_class : int
        Images of each class that are loaded.
    draws : int
        How often the paper's probe draws neurons of a layer, at least.
    neurons_per_draw : int, optional
        It draws once for so many neurons of the layer, where that is more.
    """

    name: str
    builder: str
    classes: tuple[str, ...]
    width: float = 1.0
    others: int | None = None
    images_per_class: int = 50
    draws: int = 200
    neurons_per_draw: int | None = None


@dataclass(frozen=True)
class Preset:
    """Networks to run, and how.

    Parameters
    ----------
    networks : tuple of Network
    options : dict
        Arguments of `Study` that differ from its defaults.
    paired : bool
        Whether the paper's probe keeps, of the neurons it draws, those that survive an ablation.
    """

    networks: tuple[Network, ...]
    options: dict[str, Any] = field(default_factory=dict)
    paired: bool = True


_ALEXNET = Network("alexnet", "alexnet", FIFTY, others=10)
_MOBILENET_V2 = Network("mobilenet_v2", "mobilenet_v2", TEN, neurons_per_draw=100)
_MOBILENET_V2_035 = replace(_MOBILENET_V2, name="mobilenet_v2_035", width=0.35)
_RESNET50 = Network("resnet50", "resnet50", TEN, draws=1, neurons_per_draw=50)

PRESETS: dict[str, Preset] = {
    "alexnet": Preset((_ALEXNET,)),
    "mobilenet_v2": Preset((_MOBILENET_V2,)),
    "mobilenet_v2_035": Preset((_MOBILENET_V2_035,)),
    "resnet50": Preset((_RESNET50,)),
    "hayne2024": Preset(
        (_ALEXNET, _MOBILENET_V2_035, _RESNET50),
        {
            "edges": "inclusive",  # the authors': their neurons are in two cells or in none
            "penalty": 1e3,
            "metrics": ("cka", "procrustes", "pwcca", "cca", "cca_squared"),
            "probes": ("paper",),
        },
        paired=False,
    ),
}
"""What ``--preset`` names. Classes, counts of images and of draws, widths and all of "hayne2024"
are those of Hayne, Jung & Carter, *Does Representation Similarity Capture Function Similarity?*,
TMLR 2024, and its published code; torchvision's MobileNetV2 of width 1 stands beside theirs of
width 0.35 because weights for it are published. Of an ablated ResNet50 they draw once for 50 of the
neurons that are left, here for 50 of all."""


class Loaded(NamedTuple):
    """A network of a preset, and how images are made ready for it."""

    model: nn.Module
    transform: Callable[[Any], torch.Tensor]
    note: str  # where the weights are from, and how they were found in a file


def load_network(network: Network, weights: str | Path | None = None) -> Loaded:
    """A preset's network at full size, ready for inference on a CPU.

    Parameters
    ----------
    network : Network
    weights : path or "random", optional
        A file as `load` takes it, of 1,000 outputs; or random weights, always the same,
        with which every layer is alive and logits differ between images. By default torchvision's
        best weights, from torch.hub's cache, where they are fetched to if they are not there.

    Returns
    -------
    Loaded
        ``model``: in evaluation mode, no gradients, float32. ``transform``: torchvision's, of an
        image (PIL's, or a tensor of uint8) to the model's input; the one that belongs to the
        weights where they, or their file's name, are torchvision's, else to its best weights.

    Raises
    ------
    ModelError
        If the weights can't be had or read, or belong to another architecture.
    """
    members = zoo.get_model_weights(network.builder)
    member = members.DEFAULT
    if weights == "random":
        model, note = _random(network), RANDOM
    else:
        if weights is not None:
            path, note = Path(weights), ""
            member = next((m for m in members if Path(m.url).name == path.name), member)
        elif network.width == 1:
            path, note = _cached(member), str(member)
        else:
            raise ModelError(
                f"weights: torchvision has none for {network.name!r} (of width {network.width}; "
                "the study's authors had their own); expected --weights FILE, or random"
            )
        model, found = _filled(network, path)
        note = note or found
    return Loaded(model.eval().requires_grad_(False), member.transforms(), note)


def weights_for(preset: Preset, given: Sequence[str] | None) -> dict[str, str | None]:
    """Which weights each network of a preset gets, by its name, for `load_network`.

    Parameters
    ----------
    preset : Preset
    given : sequence of str, optional
        "random" alone, for all networks; "NAME=FILE", for the networks that are named; or a file
        for each network, in order. A file may be "random".

    Raises
    ------
    ModelError
        If it is something else.
    """
    names, given = [network.name for network in preset.networks], list(given or ())
    if given == ["random"]:
        given *= len(names)
    parts = [entry.partition("=") for entry in given]
    named = [(name, file) for name, equals, file in parts if equals and "/" not in name]
    if not named and len(given) == len(names):
        return dict(zip(names, given, strict=True))
    found: dict[str, str | None] = {}
    for name, file in named:
        if name not in names:
            raise ModelError(f"weights: {name!r} is unknown; expected one of {', '.join(names)}")
        if name in found or not file:
            raise ModelError(
                f"weights: '{name}={file}' is empty or repeated; expected one {name}=FILE"
            )
        found[name] = file
    if len(named) < len(given):
        raise ModelError(
            f"weights: {', '.join(given)} for {len(names)} networks; expected 'random', NAME=FILE "
            f"for some, or a file for each, in the order {', '.join(names)}"
        )
    return dict.fromkeys(names) | found


def _full_size(network: Network) -> nn.Module:
    options = {} if network.width == 1 else {"width_mult": network.width}
    model: nn.Module = zoo.get_model(network.builder, weights=None, **options)
    return model


def _filled(network: Network, path: Path) -> tuple[nn.Module, str]:
    with torch.device("meta"):  # AlexNet's random weights, to be replaced, take a second
        model = _full_size(network)
    state, note = read_checkpoint(path, model)
    if (outputs := count_outputs(model, state)) != 1000:
        raise ModelError(f"weights: {path} has {outputs} outputs; expected ImageNet's 1000")
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()  # old checkpoints lack counters, and a run's identity hashes them
    fill(model, state, network.name, path)
    return model, note


def _random(network: Network) -> nn.Module:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # sums, and with them the weights, are the same on any number
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)  # torch.manual_seed would touch CUDA's as well
            # Coarse and fine, as photographs are.
            parts = [torch.randn(8, 3, side, side) for side in (7, 28, 224)]
            images = torch.stack([nn.functional.interpolate(x, size=224) for x in parts]).sum(0)
            return _enlivened(_full_size(network), images / len(parts) ** 0.5)
    finally:
        torch.set_num_threads(threads)


def _enlivened(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Scale a fresh network: MobileNetV2's activations vanish, ResNet's grow, logits are alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics are then those of the one batch
        elif isinstance(model, zoo.AlexNet) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    model.train()(images)
    logits = model.eval()(images)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    scale = logits.std(0).mean()
    head.bias.sub_(logits.mean(0)).div_(scale)
    head.weight.div_(scale)
    return model


def _cached(member: zoo.WeightsEnum) -> Path:
    """A file of torchvision's in torch.hub's cache; fetched if it isn't there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(member.url).name)
    digest = path.stem.rpartition("-")[2]  # by convention the beginning of its SHA-256
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            terminal = sys.stderr.isatty()
            torch.hub.download_url_to_file(member.url, str(path), digest, progress=terminal)
        except (OSError, HTTPException, RuntimeError) as error:  # the last: it is damaged
            raise ModelError(
                f"weights: {path.name} can't be fetched ({one_line(error)}); expected {member.url} "
                f"as {path}, or --weights FILE"
            ) from error
    with path.open("rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(digest):
            raise ModelError(
                f"weights: {path} is damaged; expected a SHA-256 that begins with {digest}: "
                f"delete the file, and it is fetched again from {member.url}"
            )
    return path
