"""The networks of the study: three that are shipped, torchvision's, or a user's own."""

import argparse
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.models as zoo
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

ASSETS = Path(__file__).parent / "assets"
CONTAINERS = ("state_dict", "model", "model_state_dict")  # entries that hold a state dict
# Of DistributedDataParallel, torch.compile, and Lightning modules or wrappers alike.
PREFIXES = ("module.", "_orig_mod.", "model.")
_SCALAR = np.float64(0).__reduce__()[0]
# What training scripts store with the weights. These types only hold values; loading one runs
# no code of the file's.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),  # of Python 3.13
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # of NumPy 1
]


class ModelError(ValueError):
    """A network that can't be built or loaded; the message is one line."""


def _alexnet(num_classes: int) -> zoo.AlexNet:
    with torch.device("meta"):  # 60 million weights that are replaced below
        model = zoo.AlexNet(num_classes)
    model.features = nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, padding=1),  # stock: 11 x 11, stride 4
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(16, 48, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(48, 96, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(96, 64, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
    model.avgpool = nn.AdaptiveAvgPool2d((3, 3))  # what arrives is 3 x 3
    model.classifier = nn.Sequential(
        nn.Dropout(0.2),
        nn.Linear(64 * 3 * 3, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(256, 256),
        nn.ReLU(inplace=True),
        nn.Linear(256, num_classes),
    )
    return model


def _mobilenet_v2(num_classes: int) -> zoo.MobileNetV2:
    stages = [  # expansion, channels, blocks, stride; stock but for the fourth stride, 2 there
        [1, 16, 1, 1],
        [6, 24, 2, 2],
        [6, 32, 3, 2],
        [6, 64, 4, 1],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    return zoo.MobileNetV2(num_classes, width_mult=0.35, inverted_residual_setting=stages)


def _resnet50(num_classes: int) -> zoo.ResNet:
    with torch.device("meta"):
        model = zoo.ResNet(Bottleneck, [3, 4, 6, 3], num_classes)
    # The constructor's widths are fixed (`width_per_group` leaves the outputs of blocks wide).
    model.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)  # stock: 7 x 7, stride 2
    model.bn1 = nn.BatchNorm2d(8)
    model.inplanes = 8
    model.layer1 = model._make_layer(Bottleneck, 8, 3)
    model.layer2 = model._make_layer(Bottleneck, 16, 4, stride=2)
    model.layer3 = model._make_layer(Bottleneck, 32, 6, stride=2)
    model.layer4 = model._make_layer(Bottleneck, 64, 3, stride=2)
    model.fc = nn.Linear(256, num_classes)
    return model


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "alexnet_small": _alexnet,
    "mobilenet_v2_small": _mobilenet_v2,
    "resnet50_small": _resnet50,
}
SMALL: tuple[str, ...] = tuple(_BUILDERS)


def build(name: str, num_classes: int = 10) -> nn.Module:
    """One of the study's networks with random weights, for images of 32 x 32.

    Each is torchvision's own class, so that modules keep torchvision's names.

    Parameters
    ----------
    name : str
        One of `SMALL`.
    num_classes : int
        Number of outputs.

    Returns
    -------
    model : nn.Module
        Maps images (n, 3, 32, 32) to logits (n, num_classes); in training mode.

    Raises
    ------
    ModelError
        If the name is not one of `SMALL`.

    Notes
    -----
    Architectures: Krizhevsky 2014 (one weird trick), Sandler et al. 2018, He et al. 2016, as in
    torchvision, with widths divided by 4, multiplied by 0.35, divided by 8.
    """
    if name not in _BUILDERS:
        raise ModelError(f"model: {name!r} is unknown; expected one of {', '.join(SMALL)}")
    return _BUILDERS[name](num_classes)


def load(
    name: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    log: Callable[[str], object] = lambda _: None,
) -> nn.Module:
    """A network with its weights, ready for inference.

    Parameters
    ----------
    name : str
        One of `SMALL`; a classification builder of torchvision, such as "resnet50"; or
        "package.module:callable", which returns an nn.Module when called without arguments
        (or is one).
    weights : path, optional
        A file as `read_checkpoint` takes it. The default is the shipped checkpoint for `SMALL`
        and the network as it is returned for a callable; torchvision's builders need a file.
        Nothing is downloaded or unpickled.
    num_classes : int, optional
        Number of outputs; by default 10 for `SMALL` and what the checkpoint has for
        torchvision's builders. A callable decides for itself.
    log : callable, optional
        Called with a line that says how the file was read, if ``weights`` is given.

    Returns
    -------
    model : nn.Module
        In evaluation mode, no gradients; float32 whatever the checkpoint stores, or as a
        callable made it.

    Raises
    ------
    ModelError
        If the name is unknown, the file can't be read, or it belongs to another architecture.
    """
    if ":" in name:
        if num_classes is not None:
            raise ModelError(f"num_classes: {name!r} decides for itself; expected None")
        model = _call(name)
        checkpoint = None if weights is None else read_checkpoint(weights, model)
    elif name in SMALL:
        path = ASSETS / f"{name}.safetensors" if weights is None else Path(weights)
        model = build(name, 10 if num_classes is None else num_classes)
        checkpoint = read_checkpoint(path, model)
    elif name in zoo.list_models(module=zoo):
        if weights is None:
            raise ModelError(f"weights: {name!r} needs a checkpoint file; nothing is downloaded")
        with torch.device("meta"):
            stock = zoo.get_model(name, weights=None)
        checkpoint = read_checkpoint(weights, stock)
        outputs = num_classes or count_outputs(stock, checkpoint.state)
        model = zoo.get_model(name, weights=None, num_classes=outputs)
    else:
        raise ModelError(
            f"model: {name!r} is unknown; expected one of {', '.join(SMALL)}, a classification "
            "builder of torchvision.models, or 'package.module:callable'"
        )
    if checkpoint is not None:
        fill(model, checkpoint.state, name, weights or f"{name}.safetensors")
        if weights is not None:
            log(f"weights: {checkpoint.note}")
    return model.eval().requires_grad_(False)


def study_layers(model: nn.Module) -> list[str]:
    """The layers that the study looks at, in the order of the network's definition.

    AlexNet: after each ReLU; MobileNetV2: every convolution and every batch norm, before the
    ReLU6; ResNet: the output of each block. Source: Hayne, Jung & Carter, TMLR 2024.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    layers : list of str
        Names as in ``model.named_modules()``.

    Raises
    ------
    ModelError
        If the model is of another class, where the choice is the user's.
    """
    kinds: tuple[type[nn.Module], ...]
    if isinstance(model, zoo.AlexNet):
        kinds = (nn.ReLU,)
    elif isinstance(model, zoo.MobileNetV2):
        kinds = (nn.Conv2d, nn.BatchNorm2d)
    elif isinstance(model, zoo.ResNet):
        kinds = (BasicBlock, Bottleneck)
    else:
        modules = dict(model.named_modules())
        leaves = [name for name, module in modules.items() if name and not [*module.children()]]
        some = leaves[:: max(1, len(leaves) // 4)][:4]
        raise ModelError(
            f"layers: no default for {type(model).__name__}; expected names of its modules, "
            f"such as {', '.join(some) or 'none: it has no submodules'}"
        )
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _call(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model: {name!r} can't be imported: {reason}") from error
    model = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {name!r} gives {type(model).__name__}; expected an nn.Module")
    return model


class Checkpoint(NamedTuple):
    """A state dict, and how it was found in its file."""

    state: Mapping[str, torch.Tensor]
    note: str


def read_checkpoint(path: str | Path, model: nn.Module) -> Checkpoint:
    """A state dict from a file, under the model's names; nothing is unpickled.

    Parameters
    ----------
    path : path
        ``.safetensors``, or what ``torch.load(weights_only=True)`` accepts. A state dict, or a
        training checkpoint that holds one as "state_dict", "model" or "model_state_dict".
    model : nn.Module
        Of the checkpoint's architecture, with any number of outputs.

    Returns
    -------
    Checkpoint
        ``state``: without prefixes that all its names have ("module.", "_orig_mod.", "model.",
        or several of them) where that makes more of them the model's. ``note``: the file, then
        the entry and the prefix, for example "a.pt, read from 'model', prefix 'module.' removed".

    Raises
    ------
    ModelError
        If there is no such file, it can't be read, or it holds no state dict or several.
    """
    held = _load(Path(path))
    if not isinstance(held, Mapping) or not held:
        raise ModelError(f"weights: {path} holds no state dict; expected names and tensors")
    state, note = held, str(path)
    inside = [entry for entry in CONTAINERS if _is_state(held.get(entry))]
    if len(inside) > 1:
        raise ModelError(
            f"weights: {path} holds several state dicts, {' and '.join(map(repr, inside))}; "
            "expected one"
        )
    if inside:
        state, note = held[inside[0]], f"{note}, read from {inside[0]!r}"
    for key, value in state.items():
        if not isinstance(key, str):
            raise ModelError(f"weights: {path} is no state dict: {key!r} is no name")
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"weights: {path} is no state dict: {key!r} is {type(value).__name__}; expected "
                f"a tensor, or a state dict as {', '.join(map(repr, CONTAINERS))}"
            )
    own = model.state_dict().keys()
    prefix = max(_shared_prefixes(state), key=lambda p: sum(p + name in state for name in own))
    if prefix:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        note = f"{note}, prefix {prefix!r} removed"
    return Checkpoint(state, note)


def _load(path: Path) -> Any:
    """What a file holds, of tensors and plain values."""
    if not path.is_file():
        raise ModelError(f"weights: there is no file {path}; expected a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights: {path} can't be read: {error}") from error
    except Exception as error:  # whatever torch.load meets in a file that isn't its own
        raise ModelError(
            f"weights: {path} can't be read; expected tensors in .safetensors or torch.save's "
            "format (a pickle of anything else is refused)"
        ) from error


def _is_state(held: Any) -> bool:
    return (
        isinstance(held, Mapping)
        and len(held) > 0
        and all(isinstance(value, torch.Tensor) for value in held.values())
    )


def _shared_prefixes(state: Mapping[str, Any]) -> list[str]:
    """Strings of `PREFIXES` that all names begin with, the empty one first."""
    shared = [""]
    while longer := [
        shared[-1] + part
        for part in PREFIXES
        if all(name.startswith(shared[-1] + part) for name in state)
    ]:
        shared += longer
    return shared


def count_outputs(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int:
    """Number of outputs in a checkpoint: the length of the parameter that is defined last.

    Parameters
    ----------
    model : nn.Module
        Of the checkpoint's architecture, with any number of outputs.
    state : mapping of str to tensor

    Returns
    -------
    outputs : int
        The model's own number where the checkpoint lacks that parameter.
    """
    last, default = [*model.named_parameters()][-1]
    return len(state[last]) if last in state and state[last].ndim else len(default)


def fill(model: nn.Module, state: Mapping[str, torch.Tensor], name: str, path: str | Path) -> None:
    """Copy a state dict into a model, in the model's dtypes.

    Parameters
    ----------
    model : nn.Module
    state : mapping of str to tensor
    name, path : str
        Of the model and the file, for the error.

    Raises
    ------
    ModelError
        If a tensor is missing, unexpected or of another shape; counters of batches may be missing.
    """
    want = model.state_dict()
    wrong = f"weights: {path} is of another architecture than {name!r}"
    for key, value in want.items():
        if key.endswith("num_batches_tracked"):
            continue  # old checkpoints lack it and inference has no use for it
        if key not in state:
            raise ModelError(f"{wrong}: {key!r} is missing; expected {tuple(value.shape)}")
        if state[key].shape != value.shape:
            raise ModelError(
                f"{wrong}: {key!r} is {tuple(state[key].shape)}; expected {tuple(value.shape)}"
            )
    if extra := [key for key in state if key not in want]:
        raise ModelError(f"{wrong}: {extra[0]!r} is unexpected; expected {len(want)} tensors")
    model.load_state_dict(state, strict=False)
