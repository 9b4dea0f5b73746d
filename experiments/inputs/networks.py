"""The networks of a study: the shipped ones, torchvision's, or a user's own."""

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
from torchvision.models.vision_transformer import EncoderBlock

from repsim_kernels.experiments.errors import ModelError, one_line
from repsim_kernels.experiments.inputs.checkpoints import copy_state, count_outputs, read_checkpoint

ASSETS = Path(__file__).parents[1] / "assets"
_OUTPUTS = 10  # outputs of the shipped networks: Fashion-MNIST's classes


def _build_alexnet() -> zoo.AlexNet:
    with torch.device("meta"):  # avoids allocating 60 million weights that are replaced below
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
    model.avgpool = nn.AdaptiveAvgPool2d((3, 3))  # its input is 3 x 3
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
    stages = [  # expansion, channels, blocks, stride; stock except for the fourth stride, 2 there
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
    # The constructor's widths are fixed; `width_per_group` does not narrow the blocks' outputs.
    model.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)  # stock: 7 x 7, stride 2
    model.bn1 = nn.BatchNorm2d(8)
    model.inplanes = 8
    model.layer1 = model._make_layer(Bottleneck, 8, 3)
    model.layer2 = model._make_layer(Bottleneck, 16, 4, stride=2)
    model.layer3 = model._make_layer(Bottleneck, 32, 6, stride=2)
    model.layer4 = model._make_layer(Bottleneck, 64, 3, stride=2)
    model.fc = nn.Linear(256, _OUTPUTS)
    return model


def _build_vit() -> zoo.VisionTransformer:
    model = zoo.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=4,
        num_heads=4,
        hidden_dim=96,
        mlp_dim=192,
        num_classes=_OUTPUTS,
    )
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision's is zero
    return model


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "alexnet_small": _build_alexnet,
    "mobilenet_v2_small": _build_mobilenet_v2,
    "resnet50_small": _build_resnet50,
    "vit_small": _build_vit,
}
SMALL: tuple[str, ...] = tuple(_BUILDERS)


def build(name: str) -> nn.Module:
    """Build one of the shipped networks with random weights, for images of 32 x 32.

    Each is an instance of torchvision's class, so modules have torchvision's names. It maps images
    (n, 3, 32, 32) to logits (n, 10), and is in training mode.

    Raises
    ------
    ModelError
        If the name is not one of `SMALL`.

    Notes
    -----
    Architectures: Krizhevsky 2014 (one weird trick), Sandler et al. 2018 and He et al. 2016, as in
    torchvision, with widths divided by 4, multiplied by 0.35 and divided by 8. The vision
    transformer (Dosovitskiy et al. 2021) is an eighth as wide as ViT-B. It has 4 blocks, each with
    4 heads and an MLP that is twice as wide as the block. Its patches are 8 x 8.
    """
    if name not in _BUILDERS:
        raise ModelError(f"model: {name!r} is unknown; expected one of {', '.join(SMALL)}")
    return _BUILDERS[name]()


def load(
    name: str,
    weights: str | Path | None = None,
    log: Callable[[str], object] = lambda _: None,
) -> nn.Module:
    """Load a network with its weights, ready for inference.

    Parameters
    ----------
    name : str
        One of `SMALL`; a classification builder of torchvision, for example "resnet50"; or
        "package.module:callable", an nn.Module or a function that returns one when called without
        arguments.
    weights : path, optional
        A checkpoint file for `read_checkpoint`. By default a network of `SMALL` gets its shipped
        checkpoint, and a callable's network stays unchanged; torchvision's builders require a
        file and get as many outputs as it has. Nothing is downloaded or unpickled.
    log : callable, optional
        Called, if ``weights`` is given, with one line that describes how the file was read.

    Returns
    -------
    model : nn.Module
        In evaluation mode, without gradients; float32 whatever the checkpoint stores, or the dtype
        of a callable's network.

    Raises
    ------
    ModelError
        If the name is unknown; the callable can't be imported, needs arguments, fails or exits;
        or the file can't be read or doesn't match the architecture.

    Examples
    --------
    >>> import torch
    >>> from repsim_kernels.experiments.inputs.networks import load
    >>> tuple(load("alexnet_small")(torch.zeros(2, 3, 32, 32)).shape)
    (2, 10)
    """
    if ":" in name:
        model = _build_user_network(name)
        checkpoint = None if weights is None else read_checkpoint(weights, model)
    elif name in SMALL:
        model = build(name)
        checkpoint = read_checkpoint(weights or ASSETS / f"{name}.safetensors", model)
    elif name in zoo.list_models(module=zoo):
        if weights is None:
            raise ModelError(
                f"weights: required for {name!r}, which is not downloaded; pass a checkpoint file"
            )
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


def list_default_layers(model: nn.Module) -> list[str]:
    """List a network's default layers for a study, in the order in which they run.

    AlexNet: each ReLU; MobileNetV2: every convolution and batch norm, before the ReLU6; ResNet:
    the output of each block. Source: Hayne, Jung & Carter, TMLR 2024. VisionTransformer: the heads
    of each block's attention, before they are projected, and the output of the block.

    Raises
    ------
    ModelError
        For any other class: the user has to choose the layers.

    Examples
    --------
    >>> from repsim_kernels.experiments.inputs.networks import build, list_default_layers
    >>> list_default_layers(build("alexnet_small"))[-2:]
    ['classifier.2', 'classifier.5']
    >>> list_default_layers(build("vit_small"))[-2:]
    ['encoder.layers.encoder_layer_3.self_attention:heads', 'encoder.layers.encoder_layer_3']
    """
    if isinstance(model, zoo.VisionTransformer):
        blocks = [
            name for name, module in model.named_modules() if isinstance(module, EncoderBlock)
        ]
        return [layer for block in blocks for layer in (f"{block}.self_attention:heads", block)]
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
        examples = leaves[:: max(1, len(leaves) // 4)][:4]
        raise ModelError(
            f"layers: no default for {type(model).__name__}; expected names of its modules, "
            f"for example {', '.join(examples) or 'none: it has no submodules'}"
        )
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _build_user_network(name: str) -> nn.Module:
    """Import "package.module:callable" and call it, unless it is a network already."""
    module_name, _, attribute = name.partition(":")
    if "/" in name or module_name.startswith(".") or module_name.endswith(".py"):
        raise ModelError(
            f"model: {name!r} is a path; expected 'package.module:callable', a name that Python "
            "imports, for example nets:make for nets.py in this folder"
        )
    with _wrap_user_errors(name, "can't be imported"):
        target = getattr(importlib.import_module(module_name), attribute)
    if callable(target) and not isinstance(target, nn.Module):
        if missing := _list_required_parameters(target):
            raise ModelError(
                f"model: {name!r} needs arguments ({', '.join(missing)}); expected a callable "
                "without required arguments"
            )
        with _wrap_user_errors(name, "fails"):
            target = target()
    if not isinstance(target, nn.Module):
        raise ModelError(
            f"model: {name!r} is or returns {type(target).__name__}; expected an nn.Module"
        )
    return target


def _list_required_parameters(function: Callable[..., Any]) -> list[str]:
    """List the parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return []
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


@contextmanager
def _wrap_user_errors(name: str, what: str) -> Iterator[None]:
    """Turn exceptions in a user's code into a ModelError that names the file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # sys.exit() would end the run silently
        reason = one_line(error)
        if not isinstance(error, ImportError | AttributeError):
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        *_, last = traceback.extract_tb(error.__traceback__)
        if last.filename != __file__ and "importlib" not in last.filename:
            reason += f" ({last.filename}, line {last.lineno})"
        raise ModelError(f"model: {name!r} {what}: {reason}") from error
