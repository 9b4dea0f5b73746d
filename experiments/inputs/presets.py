"""Presets: full-size ImageNet studies, with their networks, classes, options and weights."""

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
from repsim_kernels.experiments.inputs.checkpoints import copy_state, count_outputs, read_checkpoint

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
    """A torchvision network for ImageNet, and the images and draws that its study uses.

    Parameters
    ----------
    name : str
        Its name in tables and in ``--weights NAME=FILE``.
    builder : str
        Name of a function in torchvision.models.
    classes : tuple of str
        The target classes, as ImageNet's wnids.
    width : float
        Multiplier of the channels; only MobileNetV2 allows a value that is not 1.
    others : int, optional
        Number of other classes, drawn at random, that a target is compared with; by default all
        others in ``classes``.
    images_per_class : int
        Images of each class to load.
    draws : int
        Minimum number of draws of a layer's neurons by the paper's probe.
    neurons_per_draw : int, optional
        Draw once for every this many neurons of the layer, if that gives more draws.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from repsim_kernels.experiments.inputs.presets import PRESETS
    >>> network = PRESETS["resnet50"].networks[0]
    >>> network.name, network.images_per_class
    ('resnet50', 50)
    >>> replace(network, images_per_class=20).images_per_class
    20
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
    """A named study of one or more networks.

    Parameters
    ----------
    networks : tuple of Network
    options : dict
        Arguments of `Study` that differ from its defaults.
    paired : bool
        Whether the paper's probe keeps those of its drawn neurons that survive an ablation.
    """

    networks: tuple[Network, ...]
    options: dict[str, Any] = field(default_factory=dict)
    paired: bool = True


_ALEXNET = Network("alexnet", "alexnet", FIFTY, others=10)
_MOBILENET_V2 = Network("mobilenet_v2", "mobilenet_v2", TEN, neurons_per_draw=100)
_MOBILENET_V2_035 = replace(_MOBILENET_V2, name="mobilenet_v2_035", width=0.35)
_RESNET50 = Network("resnet50", "resnet50", TEN, draws=1, neurons_per_draw=50)
_VIT_B_16 = Network("vit_b_16", "vit_b_16", TEN)

PRESETS: dict[str, Preset] = {
    "alexnet": Preset((_ALEXNET,)),
    "mobilenet_v2": Preset((_MOBILENET_V2,)),
    "mobilenet_v2_035": Preset((_MOBILENET_V2_035,)),
    "resnet50": Preset((_RESNET50,)),
    "vit_b_16": Preset((_VIT_B_16,)),
    "hayne2024": Preset(
        (_ALEXNET, _MOBILENET_V2_035, _RESNET50),
        {
            "edges": "inclusive",  # a neuron on an edge is in several cells or in none
            "penalty": 1e3,
            "metrics": ("cka", "procrustes", "pwcca", "cca", "cca_squared"),
            "probes": ("paper",),
        },
        paired=False,
    ),
}
"""The presets by name, as in ``--preset NAME``.

Classes, numbers of images and draws, widths and everything in "hayne2024" follow Hayne, Jung &
Carter, *Does Representation Similarity Capture Function Similarity?*, TMLR 2024, and its published
code. In addition to their MobileNetV2 of width 0.35 there is torchvision's of width 1, because
weights for it are published, and a vision transformer, with ResNet50's classes. One difference: for
an ablated ResNet50 the authors draw once for every 50 surviving neurons, this package once for
every 50 neurons of the layer."""


class LoadedNetwork(NamedTuple):
    """A preset's network, and the transform that prepares images for it."""

    model: nn.Module
    transform: Callable[[Any], torch.Tensor]
    note: str  # the source of the weights, and where in the file they were


def load_network(network: Network, weights: str | Path | None = None) -> LoadedNetwork:
    """Load a preset's network at full size, ready for inference on a CPU.

    Parameters
    ----------
    network : Network
    weights : path or "random", optional
        A checkpoint file with 1,000 outputs, as for `load`. Or "random": reproducible weights for
        which no layer is dead and logits differ between images. By default torchvision's best
        weights, from torch.hub's cache; they are downloaded if missing there.

    Returns
    -------
    LoadedNetwork
        ``model``: in evaluation mode, without gradients, float32. ``transform``: torchvision's map
        from an image (PIL or uint8 tensor) to the model's input. It belongs to the weights if
        they, or their file's name, are torchvision's; otherwise to torchvision's best weights.

    Raises
    ------
    ModelError
        If the weights can't be downloaded or read, or don't match the architecture.

    Examples
    --------
    >>> from repsim_kernels.experiments.inputs.presets import PRESETS, load_network
    >>> model, transform, note = load_network(PRESETS["mobilenet_v2_035"].networks[0], "random")
    >>> note, transform.crop_size
    ('random weights', [224])
    """
    members = zoo.get_model_weights(network.builder)
    member = members.DEFAULT
    if weights == "random":
        model, note = _init_random(network), RANDOM
    else:
        if weights is not None:
            path, note = Path(weights), ""
            member = next((m for m in members if Path(m.url).name == path.name), member)
        elif network.width == 1:
            path, note = _fetch_weights(member), str(member)
        else:
            raise ModelError(
                f"weights: torchvision has none for {network.name!r} (of width {network.width}; "
                "the paper's authors trained their own); expected --weights FILE, or random"
            )
        model, file_note = _load_weights(network, path)
        note = note or file_note
    return LoadedNetwork(model.eval().requires_grad_(False), member.transforms(), note)


def assign_weights(preset: Preset, weights: Sequence[str] | None) -> dict[str, str | None]:
    """Assign weights to each network of a preset, by name, for `load_network`.

    Parameters
    ----------
    preset : Preset
    weights : sequence of str, optional
        "random" alone, for all networks; "NAME=FILE", for the networks with these names; or one
        file per network, in order. FILE may be "random".

    Returns
    -------
    dict of str to str or None
        None means the default weights.

    Raises
    ------
    ModelError
        If ``weights`` has another form.

    Examples
    --------
    >>> from repsim_kernels.experiments.inputs.presets import PRESETS, assign_weights
    >>> assign_weights(PRESETS["hayne2024"], ["resnet50=r.pth"])
    {'alexnet': None, 'mobilenet_v2_035': None, 'resnet50': 'r.pth'}
    """
    names, entries = [network.name for network in preset.networks], list(weights or ())
    if entries == ["random"]:
        entries *= len(names)
    parts = [entry.partition("=") for entry in entries]
    named = [(name, file) for name, equals, file in parts if equals and "/" not in name]
    if not named and len(entries) == len(names):
        return dict(zip(names, entries, strict=True))
    assigned: dict[str, str | None] = {}
    for name, file in named:
        if name not in names:
            raise ModelError(f"weights: {name!r} is unknown; expected one of {', '.join(names)}")
        if name in assigned or not file:
            raise ModelError(
                f"weights: '{name}={file}' is empty or repeated; expected one {name}=FILE"
            )
        assigned[name] = file
    if len(named) < len(entries):
        raise ModelError(
            f"weights: {', '.join(entries)} for {len(names)} networks; expected 'random', "
            f"NAME=FILE for some, or a file for each, in the order {', '.join(names)}"
        )
    return dict.fromkeys(names) | assigned


def _build_full_size(network: Network) -> nn.Module:
    """Build the network with torchvision's initial weights."""
    options = {} if network.width == 1 else {"width_mult": network.width}
    model: nn.Module = zoo.get_model(network.builder, weights=None, **options)
    return model


def _load_weights(network: Network, path: Path) -> tuple[nn.Module, str]:
    """Build the network with the weights of a file; also returns the checkpoint's note."""
    with torch.device("meta"):  # skips AlexNet's random weights, which take a second
        model = _build_full_size(network)
    state, note = read_checkpoint(path, model)
    if (outputs := count_outputs(model, state)) != 1000:
        raise ModelError(f"weights: {path} has {outputs} outputs; expected ImageNet's 1000")
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()  # old checkpoints lack counters, which are part of a run's hash
    copy_state(model, state, network.name, path)
    return model, note


def _init_random(network: Network) -> nn.Module:
    """Build the network with reproducible random weights."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # rounding, hence the weights, depends on the number of threads
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed CUDA
            # Coarse and fine structure, as in photographs.
            parts = [torch.randn(8, 3, side, side) for side in (7, 28, 224)]
            images = torch.stack([nn.functional.interpolate(x, size=224) for x in parts]).sum(0)
            return _rescale_activations(_build_full_size(network), images / len(parts) ** 0.5)
    finally:
        torch.set_num_threads(threads)


def _rescale_activations(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Rescale a network with random weights so that no layer is dead and logits differ.

    Otherwise MobileNetV2's activations vanish, ResNet's grow, and all images have similar logits;
    a vision transformer's logits are zero.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics become those of the one batch
        elif isinstance(model, zoo.AlexNet) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    if isinstance(model, zoo.VisionTransformer):
        nn.init.normal_(head.weight)
    model.train()(images)
    logits = model.eval()(images)
    scale = logits.std(0).mean()
    head.bias.sub_(logits.mean(0)).div_(scale)
    head.weight.div_(scale)
    return model


def _fetch_weights(member: zoo.WeightsEnum) -> Path:
    """Find torchvision's weights in torch.hub's cache, or download them; checks the hash."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(member.url).name)
    digest = path.stem.rpartition("-")[2]  # by convention the start of its SHA-256
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            terminal = sys.stderr.isatty()
            torch.hub.download_url_to_file(member.url, str(path), digest, progress=terminal)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: wrong hash
            raise ModelError(
                f"weights: {path.name} can't be downloaded ({one_line(error)}); expected "
                f"{member.url} as {path}, or --weights FILE"
            ) from error
    with path.open("rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(digest):
            raise ModelError(
                f"weights: {path} is damaged; expected a SHA-256 that starts with {digest}. Delete "
                f"the file to download it again from {member.url}"
            )
    return path
