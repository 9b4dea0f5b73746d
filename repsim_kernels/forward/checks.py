"""Checks of a network, its layers and its images."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from repsim_kernels import _options
from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward.inputs import Call, Images, Inputs, to_inputs
from repsim_kernels.forward.sites import split_name
from repsim_kernels.forward.trace import is_within


def resolve_layers(model: nn.Module, layer: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of layers, without duplicates; LayerError if the model lacks one."""
    if not isinstance(model, nn.Module):
        raise LayerError(f"model: {_options.short_repr(model)}; expected a torch.nn.Module")
    names = (layer,) if isinstance(layer, str) else _options.to_tuple(layer)
    if not names or not all(isinstance(name, str) for name in names):
        raise LayerError(
            f"layer: {_options.short_repr(layer)}; expected a name or a sequence of names"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer_name in names:
        name, _ = split_name(modules, layer_name)
        if name not in modules:
            similar = ", ".join(map(repr, find_similar_modules(modules, name))) or "''"
            raise LayerError(
                f"layer: the model has no module {_options.short_repr(name)}; expected a name from "
                f"model.named_modules(), such as {similar}"
            )
        _check_not_scripted(modules, name)
    return tuple(dict.fromkeys(names))


def find_similar_modules(modules: Iterable[str], name: str) -> list[str]:
    """Return up to three names of a model's modules that an unknown name may stand for."""
    known = [module for module in modules if module]
    nested = [module for module in known if module.endswith(f".{name}")]
    return (nested or difflib.get_close_matches(name, known) or known)[:3]


def check_images(model: nn.Module, images: Images) -> Inputs:
    """Check inputs of a model, and that it is in eval mode; return the inputs."""
    inputs = to_inputs(model, images)
    check_eval(model)
    return inputs


def check_call(call: Any) -> Call | None:
    """Check the option `call`; OptionError if it is no function."""
    if call is not None and not callable(call):
        raise OptionError(
            f"call: {_options.short_repr(call)}; expected a function of the model and its inputs"
        )
    return call


def check_eval(model: nn.Module) -> None:
    """Check that every module is in eval mode."""
    for name, module in model.named_modules():
        if module.training:
            module_name = repr(name) if name else "it"
            raise LayerError(f"model: {module_name} is in training mode; expected model.eval()")


def _check_not_scripted(modules: dict[str, nn.Module], layer: str) -> None:
    """Check that a layer is not inside a TorchScript module, which hides it."""
    for name, module in modules.items():
        if is_within(layer, name) and isinstance(module, torch.jit.ScriptModule):
            owner = f"module {name!r}" if name else "the model"
            raise LayerError(
                f"layer: {layer!r} is TorchScript, because {owner} was scripted or traced, which "
                "hides its layers; pass the nn.Module that it was made from"
            )


def check_tensors(model: nn.Module, argument: str = "model") -> None:
    """Check that parameters and buffers have shapes and values, and are on one device."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            module_name, count = repr(name) if name else "it", len(module.device_ids)
            raise LayerError(
                f"{argument}: {module_name} is split over {count} devices by DataParallel; "
                "pass its .module"
            )
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(t):
            raise LayerError(
                f"{argument}: {name!r} has no shape yet; run the model once on a batch"
            )
        if t.is_meta:
            raise LayerError(
                f"{argument}: {name!r} is on meta, which holds no values; load weights"
            )
