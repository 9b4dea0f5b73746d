"""The networks of the study: three that are shipped, torchvision's, or a user's own."""

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision.models as zoo
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from repsim_kernels.experiments.errors import ModelError, one_line
from repsim_kernels.experiments.inputs.checkpoints import copy_state, count_outputs, read_checkpoint

ASSETS = Path(__file__).parents[1] / "assets"
_OUTPUTS = 10  # of the shipped networks: Fashion-MNIST's classes


def _build_alexnet() -> zoo.AlexNet:
    with torch.device("meta"):  # 60 million weights that are replaced below
        model = zoo.AlexNet(_OUTPUTS)
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
        nn.Linear(256, _OUTPUTS),
    )
    return model


def _build_mobilenet_v2() -> zoo.MobileNetV2:
    stages = [  # expansion, channels, blocks, stride; stock but for the fourth stride, 2 there
        [1, 16, 1, 1],
        [6, 24, 2, 2],
        [6, 32, 3, 2],
        [6, 64, 4, 1],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    return zoo.MobileNetV2(_OUTPUTS, width_mult=0.35, inverted_residual_setting=stages)


def _build_resnet50() -> zoo.ResNet:
    with torch.device("meta"):
        model = zoo.ResNet(Bottleneck, [3, 4, 6, 3], _OUTPUTS)
    # The constructor's widths are fixed (`width_per_group` leaves the outputs of blocks wide).
    model.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)  # stock: 7 x 7, stride 2
    model.bn1 = nn.BatchNorm2d(8)
    model.inplanes = 8
    model.layer1 = model._make_layer(Bottleneck, 8, 3)
    model.layer2 = model._make_layer(Bottleneck, 16, 4, stride=2)
    model.layer3 = model._make_layer(Bottleneck, 32, 6, stride=2)
    model.layer4 = model._make_layer(Bottleneck, 64, 3, stride=2)
    model.fc = nn.Linear(256, _OUTPUTS)
    return model


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "alexnet_small": _build_alexnet,
    "mobilenet_v2_small": _build_mobilenet_v2,
    "resnet50_small": _build_resnet50,
}
SMALL: tuple[str, ...] = tuple(_BUILDERS)


def build(name: str) -> nn.Module:
    """One of the study's networks with random weights, for images of 32 x 32.

    Each is torchvision's own class, so that modules keep torchvision's names. It maps images
    (n, 3, 32, 32) to logits (n, 10), and is in training mode.

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
    return _BUILDERS[name]()


def load(
    name: str,
    weights: str | Path | None = None,
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
        and the network as it is returned for a callable; torchvision's builders need a file,
        and have as many outputs as it has. Nothing is downloaded or unpickled.
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
        If the name is unknown, the callable can't be imported, needs arguments, fails or ends the
        program, the file can't be read, or it belongs to another architecture.
    """
    if ":" in name:
        model = _build_user_network(name)
        checkpoint = None if weights is None else read_checkpoint(weights, model)
    elif name in SMALL:
        model = build(name)
        checkpoint = read_checkpoint(weights or ASSETS / f"{name}.safetensors", model)
    elif name in zoo.list_models(module=zoo):
        if weights is None:
            raise ModelError(f"weights: {name!r} needs a checkpoint file; nothing is downloaded")
        with torch.device("meta"):
            stock = zoo.get_model(name, weights=None)
        checkpoint = read_checkpoint(weights, stock)
        outputs = count_outputs(stock, checkpoint.state)
        model = zoo.get_model(name, weights=None, num_classes=outputs)
    else:
        raise ModelError(
            f"model: {name!r} is unknown; expected one of {', '.join(SMALL)}, a classification "
            "builder of torchvision.models, or 'package.module:callable'"
        )
    if checkpoint is not None:
        copy_state(model, checkpoint.state, name, weights or f"{name}.safetensors")
        if weights is not None:
            log(f"weights: {checkpoint.note}")
    return model.eval().requires_grad_(False)


def study_layers(model: nn.Module) -> list[str]:
    """The names of the layers that the study looks at, in the order of the network's definition.

    AlexNet: after each ReLU; MobileNetV2: every convolution and every batch norm, before the
    ReLU6; ResNet: the output of each block. Source: Hayne, Jung & Carter, TMLR 2024.

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


def _build_user_network(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if "/" in name or module_name.startswith(".") or module_name.endswith(".py"):
        raise ModelError(
            f"model: {name!r} is a path; expected 'package.module:callable', a name that Python "
            "imports, as nets:make for nets.py in this folder"
        )
    with _user_code_errors(name, "can't be imported"):
        found = getattr(importlib.import_module(module_name), attribute)
    if callable(found) and not isinstance(found, nn.Module):
        if missing := _required_parameters(found):
            raise ModelError(
                f"model: {name!r} needs arguments ({', '.join(missing)}); expected a callable "
                "without any"
            )
        with _user_code_errors(name, "fails"):
            found = found()
    if not isinstance(found, nn.Module):
        raise ModelError(f"model: {name!r} gives {type(found).__name__}; expected an nn.Module")
    return found


def _required_parameters(function: Callable[..., Any]) -> list[str]:
    """The parameters that a call can't go without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C don't say
        return []
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


@contextmanager
def _user_code_errors(name: str, what: str) -> Iterator[None]:
    """Raise what goes wrong in a user's code as a ModelError that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:  # sys.exit() would end the run as if it were done
        reason = one_line(error)
        if not isinstance(error, ImportError | AttributeError):
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        *_, last = traceback.extract_tb(error.__traceback__)
        if last.filename != __file__ and "importlib" not in last.filename:
            reason += f" ({last.filename}, line {last.lineno})"
        raise ModelError(f"model: {name!r} {what}: {reason}") from error
