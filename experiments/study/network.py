"""A user's network in the hands of a study: made ready for a while, then exactly as it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study.configuration import differences
from repsim_kernels.forward import contexts
from repsim_kernels.forward.trace import Trace, Untraceable

# What a description must not depend on: where an object lies, and on which device.
_PLACES = re.compile(r" at 0x[0-9a-f]+|,? ?device='[^']*'|(?<=cuda):\d+")


@contextmanager
def prepare(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a network in evaluation mode on a device, and put everything back at the end.

    Training flags, attributes, and the values and memory of parameters, buffers and gradients are
    those of before, also after an error and where a pass writes to them. What the network keeps in
    lists or dicts of its own is not undone. Its parameters may be on several devices.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    tables = [table for module in modules for table in _attribute_tables(module)]
    entries = [dict(table) for table in tables]
    try:
        for module in modules:
            module.training = False  # eval() may be overridden, as by LoRA, which merges weights
        with _restore_values(model, device), _move_to(model, device):
            yield
    finally:
        for table, before in zip(tables, entries, strict=True):  # a pass may store what it made
            table.update(before)
            for name in table.keys() - before.keys():
                del table[name]
        for module, training in modes:
            module.training = training


def _attribute_tables(module: nn.Module) -> list[dict[str, Any]]:
    """A module's attributes, and the parameters, buffers and modules that PyTorch keeps apart."""
    own = vars(module)
    apart = (own.get(name) for name in ("_parameters", "_buffers", "_modules"))
    return [own, *(table for table in apart if isinstance(table, dict))]


@contextmanager
def _restore_values(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back the values of the parameters and buffers that passes on a device have written to."""
    own = [t for t in (*model.parameters(), *model.buffers()) if t.device == device]
    # What is elsewhere is copied to the device, and not written to.
    kept = [(t, t.data, t.detach().clone()) for t in own]
    try:
        yield
    finally:
        for t, data, value in kept:
            if t.data_ptr() != data.data_ptr():
                t.data = data
            # PyTorch doesn't count writes through .data, nor those of F.batch_norm.
            if not torch.equal(_bytes_of(t.detach()), _bytes_of(value)):
                t.data.copy_(value)


@contextmanager
def _move_to(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device; its tables are the caller's care."""
    if all(t.device == device for t in (*model.parameters(), *model.buffers())):
        yield
        return
    parameters = [(p, p.data, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None  # gradients stay where they are
        model.to(device)
        yield
    finally:
        for parameter, data, grad in parameters:
            parameter.data, parameter.grad = data, grad


class LayerSize(NamedTuple):
    """What a layer gives for an image."""

    neurons: int
    bytes: int


def show_image(
    model: nn.Module, layers: Sequence[str], image: Tensor
) -> tuple[Any, dict[str, LayerSize]]:
    """What a network gives for a batch of one image, and the sizes of those layers that run.

    A layer that gives no tensor is left out as well.
    """
    sizes: dict[str, LayerSize] = {}

    def note(layer: str, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes[layer] = LayerSize(output.numel(), output.nbytes // len(output))

    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, name=layer: note(name, output)
        )
        for layer in layers
    ]
    try:
        with torch.no_grad():
            return model(image), sizes
    finally:
        for handle in handles:
            handle.remove()


class Identity:
    """What a network is known by: its parameters and buffers, and its modules.

    Parameters
    ----------
    model : nn.Module

    Raises
    ------
    StudyError
        One of its tensors has no values yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights, self.modules = fingerprint(model), describe_modules(model)

    def check(self, model: nn.Module, name: str) -> None:
        """Raise StudyError where a network, which messages call `name`, is not this one."""
        if changed := differences(self.modules, describe_modules(model)):
            raise StudyError(
                f"model: the modules of {name} have changed since the study was made "
                f"({changed[0]}); expected the same ones, or a new Study"
            )
        if fingerprint(model) != self.weights:
            raise StudyError(
                f"model: the weights or buffers of {name} have changed since the study was made; "
                "expected the same ones, or a new Study"
            )


def describe_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe each module of a network, by name: its class and its options, as JSON has them.

    The network itself is "model". The same on any device and in any process.
    """
    return {
        name or "model": _describe_module(module)
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _describe_module(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    label = kind.__qualname__
    if kind.__module__.startswith("torch.nn."):
        # Their extra_repr leaves options out, such as the heads of an attention. Other attributes
        # may be a user's, who may change them at will.
        options = (*signature(kind).parameters, *getattr(kind, "__constants__", ()), "forward")
        own = vars(module)
        label = f"nn.{label}" if getattr(nn, label, None) is kind else f"{kind.__module__}.{label}"
        return {"class": label, **{name: _plain(own[name]) for name in options if name in own}}
    # A user's own module may be imported under one name in a script and another in its workers.
    if kind.__module__.startswith("torch."):
        label = f"{kind.__module__}.{label}"
    text = _PLACES.sub("", module.extra_repr())
    return {"class": label, "options": text} if text else {"class": label}


def _plain(value: Any) -> Any:
    """An option as JSON has it; of what isn't plain, its name."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def hash_operations(model: nn.Module, layers: Sequence[str], images: Tensor) -> str:
    """Hash the operations of a forward pass, without any computed value.

    The hash is the same on any machine that has the same version of PyTorch, unlike one of logits.
    The network is in evaluation mode, the layers are those that it is cut at, and the images,
    (n, ...), are on its device.
    """
    with contexts.run_eagerly():
        try:
            trace = Trace(model, layers)
        except Untraceable:
            trace = Trace(model, layers, like=images)
    lines = (f"{x.format_node()} {x.meta.get('switches', '')}" for x in trace.nodes)
    return hash_parts(*(_PLACES.sub("", line) for line in lines))


def fingerprint(model: nn.Module) -> str:
    """A hash of a network's parameters and buffers, the same on whatever device they are.

    Raises
    ------
    StudyError
        One of them has no values yet.
    """
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if is_lazy(tensor) or tensor.is_meta:
            raise StudyError(f"model: {name!r} has no values yet; expected an initialised network")
    in_order = sorted(named, key=lambda pair: pair[0])
    return hash_parts(*(part for name, tensor in in_order for part in (name, tensor.detach())))


def hash_parts(*parts: str | Tensor) -> str:
    """A hash of texts, and of tensors with their dtypes and shapes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(_bytes_of(part.cpu()).numpy().data)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.contiguous().reshape(-1).view(torch.uint8)
