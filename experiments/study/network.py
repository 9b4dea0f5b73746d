"""A study's access to the user's network: prepares it, restores it exactly, and identifies it."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from math import isfinite, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repsim_kernels.errors import LayerError
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study.configuration import differences
from repsim_kernels.experiments.study.precision import set_tf32
from repsim_kernels.forward import AblatedForward, contexts
from repsim_kernels.forward.sites import describe_value, resolve_sites
from repsim_kernels.forward.trace import Trace, Untraceable

_BATCH = 64  # images per pass in `read_layer`
# PyTorch's switches belong to the process, and several studies may share a network, so only one
# study computes at any moment.
_COMPUTE_LOCK = threading.RLock()
# Addresses and devices, which a description must not depend on.
_PLACES = re.compile(r" at 0x[0-9a-f]+|,? ?device='[^']*'|(?<=cuda):\d+")


@contextmanager
def prepare(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a network in evaluation mode on a device inside a context, and restore it at the end.

    Restores the training flags, the attributes, and the values and memory of parameters, buffers
    and gradients, even after an error or if a pass writes to them. Changes inside the network's
    own lists and dicts are not undone. The parameters may be on several devices.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    tables = [table for module in modules for table in _list_attribute_tables(module)]
    entries = [dict(table) for table in tables]
    try:
        for module in modules:
            module.training = False  # eval() may be overridden; LoRA, for example, merges weights
        with _restore_values(model, device), _move_to(model, device):
            yield
    finally:
        for table, before in zip(tables, entries, strict=True):  # a pass may add attributes
            table.update(before)
            for name in table.keys() - before.keys():
                del table[name]
        for module, training in modes:
            module.training = training


def _list_attribute_tables(module: nn.Module) -> list[dict[str, Any]]:
    """List a module's attributes, and PyTorch's dicts of parameters, buffers and modules."""
    attributes = vars(module)
    separate = (attributes.get(name) for name in ("_parameters", "_buffers", "_modules"))
    return [attributes, *(table for table in separate if isinstance(table, dict))]


@contextmanager
def _restore_values(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore, at the end, parameters and buffers on a device that passes have written to."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device == device]
    # Tensors on other devices are copied to this one, so the originals are not written to.
    saved = [(t, t.data, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        for t, data, value in saved:
            if t.data_ptr() != data.data_ptr():
                t.data = data
            # PyTorch's version counters miss writes through .data and by F.batch_norm.
            if not torch.equal(_view_bytes(t.detach()), _view_bytes(value)):
                t.data.copy_(value)


@contextmanager
def _move_to(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device and back; the caller restores the attribute tables."""
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
    """The size of a layer's output for one image."""

    shape: tuple[int, ...]
    bytes: int

    @property
    def neurons(self) -> int:
        return prod(self.shape)


def pass_one_image(
    model: nn.Module, layers: Sequence[str], image: Tensor
) -> tuple[Any, dict[str, LayerSize]]:
    """Pass a batch of one image; return the network's output and the sizes of the layers.

    Layers that don't run are missing from the sizes.

    Raises
    ------
    LayerError
        A layer does not return a tensor.
    """
    sizes: dict[str, LayerSize] = {}

    def record(layer: str, value: Tensor) -> Tensor:
        sizes[layer] = LayerSize(tuple(value.shape[1:]), value.nbytes // len(value))
        return value

    with torch.no_grad(), ExitStack() as stack:
        for layer, site in resolve_sites(model, layers).items():
            if site.is_plain:
                hook = site.module.register_forward_hook(partial(_check_output, layer))
                stack.callback(hook.remove)
            stack.enter_context(site.replace(partial(record, layer)))
        return model(image), sizes


def _check_output(layer: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    """Check that a layer returns a tensor; LayerError if not."""
    if not isinstance(output, Tensor):
        raise LayerError(
            f"layer: {layer!r} returns {describe_value(output)}; expected a module that returns a "
            f"tensor, its input, '{layer}:input', or for an attention module its heads, "
            f"'{layer}:heads'"
        )


def read_layer(
    forward: AblatedForward, layer: str, images: Tensor, index: Tensor, device: torch.device
) -> Tensor:
    """Return a layer's activations (n, p) for the images with these indices."""
    batches = (images[some].to(device) for some in index.split(_BATCH))
    states = (forward.prefixes(batch, [layer])[layer] for batch in batches)
    return torch.cat([state.activation.flatten(1) for state in states])


class HeldNetwork:
    """The user's network, which a study holds while it computes and otherwise leaves alone.

    Parameters
    ----------
    model : nn.Module
    name : str
        What errors call it.
    weights : str
        Its `fingerprint` when the study was made.
    modules : dict
        Its `describe_modules` when the study was made.
    """

    def __init__(
        self, model: nn.Module, name: str, weights: str, modules: dict[str, dict[str, Any]]
    ) -> None:
        self.model, self.name, self.weights, self.modules = model, name, weights, modules
        self._is_held = False
        self._image: Tensor | None = None  # only if a pass changes values

    def check(self) -> None:
        """Raise StudyError if the network differs from the one that the study was made of."""
        if changed := differences(self.modules, describe_modules(self.model)):
            raise StudyError(
                f"model: the modules of {self.name} have changed since the study was made "
                f"({changed[0]}); expected the same ones, or a new Study"
            )
        if fingerprint(self.model) != self.weights:
            raise StudyError(
                f"model: the weights or buffers of {self.name} have changed since the study was "
                "made; expected the same ones, or a new Study"
            )

    def note_changes(self, image: Tensor) -> None:
        """Note whether a pass has changed the network's values; if so, `hold` makes one first."""
        self._image = image if fingerprint(self.model) != self.weights else None

    @contextmanager
    def hold(self, device: torch.device, tf32: bool) -> Iterator[None]:
        """Put the network in evaluation mode on a device, with TF32 allowed or not, and restore it.

        Raises
        ------
        StudyError
            The network differs from the one that the study was made of.
        """
        with _COMPUTE_LOCK:
            if self._is_held:  # by an outer call in this thread
                yield
                return
            self.check()
            with prepare(self.model, device), set_tf32(tf32):
                self._is_held = True
                try:
                    if self._image is not None:  # a trace may omit the change
                        pass_one_image(self.model, (), self._image)
                    yield
                finally:
                    self._is_held = False


def describe_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe each module of a network by its class and options, as values that JSON can hold.

    The network itself is named "model". Descriptions don't depend on the device or the process.
    """
    return {
        name or "model": _describe_module(module)
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _describe_module(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    label = kind.__qualname__
    if kind.__module__.startswith("torch.nn."):
        # extra_repr omits options, for example an attention's number of heads. Attributes that are
        # not options may be the user's, who may change them at will.
        options = (*signature(kind).parameters, *getattr(kind, "__constants__", ()), "forward")
        attributes = vars(module)
        label = f"nn.{label}" if getattr(nn, label, None) is kind else f"{kind.__module__}.{label}"
        return {"class": label, **{n: _to_plain(attributes[n]) for n in options if n in attributes}}
    # A user's own module may be imported under one name in a script and another in its workers.
    if kind.__module__.startswith("torch."):
        label = f"{kind.__module__}.{label}"
    text = _PLACES.sub("", module.extra_repr())
    return {"class": label, "options": text} if text else {"class": label}


def _to_plain(value: Any) -> Any:
    """Convert an option to a value that JSON can hold, or to its name."""
    if isinstance(value, tuple | list):
        return [_to_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def hash_operations(model: nn.Module, layers: Sequence[str], images: Tensor) -> str:
    """Hash the operations of a forward pass, but no computed values.

    Unlike a hash of logits, it is the same on all machines with the same version of PyTorch. The
    network must be in evaluation mode and cut at ``layers``; the images (n, ...) on its device.
    """
    with contexts.run_eagerly():
        try:
            trace = Trace(model, layers)
        except Untraceable:
            trace = Trace(model, layers, like=images)
    lines = (f"{x.format_node()} {x.meta.get('switches', '')}" for x in trace.nodes)
    return hash_parts(*(_PLACES.sub("", line) for line in lines))


def fingerprint(model: nn.Module) -> str:
    """Hash a network's parameters and buffers, independent of their device.

    Raises
    ------
    StudyError
        A parameter or buffer has no values yet.
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
    """Hash strings, and tensors with their dtypes and shapes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(_view_bytes(part.cpu()).numpy().data)
    return digest.hexdigest()


def _view_bytes(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return dense.contiguous().reshape(-1).view(torch.uint8)
