"""Which layers of a network are compared, and hooks that see their outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from repsim_kernels import _options
from repsim_kernels.comparison import batches
from repsim_kernels.comparison.batches import Call
from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward import contexts
from repsim_kernels.forward.checks import check_tensors, find_similar_modules

Layers = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Names of layers, a kind of layers, a function that selects them, or None for all."""

Output = int | str | None
"""Where the tensor is in a module's output: an index, a path, or None for the first."""

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
KINDS = ("conv", "linear", "attention", "blocks")
_KINDS_TEXT = ", ".join(map(repr, KINDS))
_COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps


def select_modules(
    model: nn.Module, layers: Layers, owner: str = "the model"
) -> dict[str, nn.Module]:
    """Return the modules that ``layers`` selects, by name; errors call the network ``owner``.

    Names are a tuple, from `list_names`. The network itself is called "output", or "" if it has a
    module of that name. A name may end in ":2" for the second call of a module in a pass, ":3" for
    the third and so on; the result has its module.
    """
    modules = _list_modules(model)
    scripted = [name for name, one in modules.items() if isinstance(one, torch.jit.ScriptModule)]
    if isinstance(layers, tuple):
        for name in layers:
            _check_name(modules, name, owner)
        stems = [_find_module_name(modules, name) for name in layers]
        selected = {stem: modules[stem] for stem in stems}
    else:
        selected = _select_by_rule(modules, layers)
    # A kind can't be recognised in TorchScript.
    is_kind = layers is None or isinstance(layers, str)
    hidden = scripted if is_kind else selected.keys() & scripted
    if hidden:
        raise LayerError(
            f"layers: {min(hidden)!r} of {owner} is TorchScript, which hides its layers; expected "
            "the nn.Module that it was made from"
        )
    if not selected:
        what = repr(layers) if isinstance(layers, str) else "the function"
        raise LayerError(f"layers: {what} selects no module of {type(model).__name__} ({owner})")
    return selected


def list_names(layers: Layers) -> tuple[str, ...] | None:
    """Return the names of layers that are listed; None if they are selected by a rule."""
    is_function = callable(layers) and not isinstance(layers, type)
    if layers is None or is_function or (isinstance(layers, str) and layers in KINDS):
        return None
    names = (layers,) if isinstance(layers, str) else _options.to_tuple(layers)
    if not names or not all(isinstance(name, str) for name in names):
        raise LayerError(
            f"layers: {_options.short_repr(layers)}; expected names, one of {_KINDS_TEXT}, a "
            "function of a name and a module, or None"
        )
    return tuple(dict.fromkeys(names))


def _list_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by name, under each of their names."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # The module that torch.compile wraps takes the place of its wrapper.
        modules[".".join(part for part in name.split(".") if part != _COMPILED)] = module
    root = modules.pop("")
    return {"output" if "output" not in modules else "": root} | modules


def _check_name(modules: dict[str, nn.Module], name: str, owner: str) -> None:
    """Check that a layer's name is that of a module, or of a later call of one."""
    if _find_module_name(modules, name) in modules:
        return
    stem, _, number = name.rpartition(":")
    if stem in modules and number.isdecimal():
        raise LayerError(
            f"layers: {name!r} of {owner}; expected {stem!r} for the first call of the module in a "
            f"pass, '{stem}:2' for the second and so on"
        )
    network, *others = modules
    similar = ", ".join(map(repr, find_similar_modules([*others, network], name)))
    raise LayerError(
        f"layers: {owner} has no module {_options.short_repr(name)}; expected a name from "
        f"named_modules(), such as {similar}, or one of {_KINDS_TEXT}, not in a list"
    )


def _find_module_name(modules: dict[str, nn.Module], name: str) -> str:
    """Return the name of a layer's module: without the number of its call."""
    stem, _, number = name.rpartition(":")
    is_call = re.fullmatch("[2-9]|[1-9][0-9]+", number)  # the first call has no number
    return stem if name not in modules and is_call else name


def _select_by_rule(modules: dict[str, nn.Module], layers: Layers) -> dict[str, nn.Module]:
    """Return the modules of a kind, those that a function selects, or all, each once."""
    names = {module: name for name, module in reversed(modules.items())}
    modules = {
        name: module
        for name, module in modules.items()
        # Parametrizations return weights.
        if names[module] == name and "parametrizations" not in name.split(".")
    }
    if layers is None:
        return modules
    if callable(layers):
        return {name: module for name, module in modules.items() if layers(name, module)}
    if layers == "conv":
        return {name: one for name, one in modules.items() if isinstance(one, _CONVOLUTIONS)}
    if layers == "linear":
        return {name: one for name, one in modules.items() if _is_linear(one)}
    if layers == "blocks":
        return _drop_nested(_find_blocks(modules))
    _, *inner = modules.items()  # without the network itself, whatever its name
    return _drop_nested({name: one for name, one in inner if "Attention" in type(one).__name__})


def _is_linear(module: nn.Module) -> bool:
    # transformers calls the linear layers of GPT-2 so.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _find_blocks(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the members of lists and sequences that have modules of their own.

    A sequence of blocks, such as a stage of a ResNet, is no block.
    """
    (_, root), *inner = modules.items()
    blocks = {
        name: module
        for name, module in inner
        if isinstance(modules.get(name.rpartition(".")[0], root), (nn.ModuleList, nn.Sequential))
        and next(module.children(), None) is not None
        and not isinstance(module, nn.ModuleList)
    }
    return {
        name: module
        for name, module in blocks.items()
        if type(module) is not nn.Sequential
        or not any(other.startswith(f"{name}.") for other in blocks)
    }


def _drop_nested(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out modules inside others."""
    outer: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not any(name.startswith(f"{other}.") for other in outer):
            outer[name] = module
    return outer


def _unwrap(model: Any) -> nn.Module:
    """Return the network that torch.compile or a data-parallel wrapper calls."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, _COMPILED, None), nn.Module):
            model = getattr(model, _COMPILED)
        else:
            return model


@dataclass(frozen=True)
class Network:
    """A network with the layers that are observed, and how it is called.

    Attributes
    ----------
    model : nn.Module
        Without wrappers of torch.compile, DataParallel and DistributedDataParallel.
    layers : names, kind, function or None
        See `select_modules`.
    output : int, str or None
        Where the tensor is in the output of a layer, as an index or a path such as
        "hidden_states.3"; by default the first tensor.
    call : function of the model and a batch
    owner : str
        What errors call the network.
    names : tuple of str or None
        The layers that are listed by name; None if they are selected by a rule.
    modules : dict of str to nn.Module
    copies_input : bool
        Whether the network gets copies of batches, since it writes to them; from `find_layers`.
    """

    model: nn.Module
    layers: Layers = None
    output: Output = None
    call: Call = batches.call_on_inputs
    owner: str = "the model"
    names: tuple[str, ...] | None = field(init=False)
    modules: dict[str, nn.Module] = field(init=False)
    copies_input: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        argument = self.owner.removeprefix("the ")
        if not isinstance(self.model, nn.Module):
            raise LayerError(
                f"{argument}: {_options.short_repr(self.model)}; expected a torch.nn.Module"
            )
        if self.output is not None and not isinstance(self.output, (int, str)):
            raise OptionError(
                f"output: {_options.short_repr(self.output)}; expected an index, a path such as "
                "'hidden_states.3', or None"
            )
        if not callable(self.call):
            raise OptionError(
                f"call: {_options.short_repr(self.call)}; expected a function of the model and a "
                "batch"
            )
        model = _unwrap(self.model)
        check_tensors(model, argument)
        names = list_names(self.layers)
        modules = select_modules(model, self.layers if names is None else names, self.owner)
        for attribute, value in (("model", model), ("names", names), ("modules", modules)):
            object.__setattr__(self, attribute, value)

    def describe(self, layer: str) -> str:
        """Return how errors name a layer."""
        return f"layer {layer!r} of {self.owner}"

    def run(self, batch: Any, visit: Callable[[str, Tensor], None]) -> None:
        """Call the network on a batch, and ``visit`` with each layer's name and output.

        Layers come in the order of their calls. The second call of a module is the layer
        "name:2", and so on. Outputs are visited as soon as they are computed, before an operation
        that works in place can change them.
        """
        if self.copies_input:
            batch = batches.map_tensors(batch, torch.clone)
        _, is_changed = self._call(batch, visit)
        if is_changed and not self.copies_input:
            raise OptionError(
                f"call: {self.owner} writes to the input of some batches, which later passes need; "
                "expected a network, or a `call`, that leaves all batches as they are"
            )

    def _call(self, batch: Any, visit: Callable[[str, Tensor], None]) -> tuple[Counter[str], bool]:
        """Return how often each module was called, and whether the batch was written to."""
        calls: Counter[str] = Counter()

        def hook(name: str) -> Callable[..., None]:
            def record_output(module: nn.Module, inputs: Any, output: Any) -> None:
                calls[name] += 1
                layer = name if calls[name] == 1 else f"{name}:{calls[name]}"
                if self.names is not None and layer not in self.names:
                    return
                tensor = self._find_tensor(output, layer)
                if tensor is not None:
                    # Autocast would also apply to what is computed of the output, and a network
                    # may switch gradients on.
                    with torch.autocast(tensor.device.type, enabled=False), torch.no_grad():
                        visit(layer, tensor)

            return record_output

        batch = batches.to_device(batch, self.model)
        versions = list(map(batches.get_version, batches.list_tensors(batch)))
        with ExitStack() as stack:
            stack.enter_context(contexts.run_eagerly())
            # On the fast path, transformers run without the modules that the hooks are on.
            stack.callback(
                torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
            )
            torch.backends.mha.set_fastpath_enabled(False)
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(hook(name)).remove)
            stack.enter_context(_eval_mode(self.model))
            self.call(self.model, batch)
        return calls, versions != list(map(batches.get_version, batches.list_tensors(batch)))

    def find_layers(self, batch: Any) -> tuple[dict[str, Tensor], int]:
        """Return the output of each layer on a batch, in the order of their calls or names.

        Also returns the bytes for one stimulus of the largest output of any module. Layers that are
        not listed by name are left out if they return no tensor (n, …) of floating-point numbers,
        or the same tensor as another layer.
        """
        n = batches.count_stimuli(batch)
        largest = 0
        outputs: dict[str, Tensor] = {}
        versions: set[tuple[int, int]] = set()  # all outputs are alive, so that ids are unique

        def keep(name: str, output: Tensor) -> None:
            seen = id(output), batches.get_version(output)
            if not _is_usable(output, n):
                if self.names is not None:
                    raise LayerError(
                        f"layers: {name!r} of {self.owner} returns {_describe(output)} for a batch "
                        f"of {n} stimuli; expected dense floating-point numbers ({n}, …)"
                    )
            elif self.names is not None or seen not in versions:
                versions.add(seen)
                outputs[name] = output

        def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal largest
            for a in batches.list_output_tensors(output).values():
                largest = max(largest, a.numel() * a.element_size())  # sparse ones lack nbytes

        with ExitStack() as stack:
            for module in self.model.modules():
                if not isinstance(module, torch.jit.ScriptModule):  # it allows no hooks
                    stack.callback(module.register_forward_hook(measure).remove)
            calls, is_changed = self._call(batches.map_tensors(batch, torch.clone), keep)
        object.__setattr__(self, "copies_input", is_changed)
        largest //= n
        if self.names is None:
            return outputs, largest
        for name in self.names:
            if name not in outputs:
                self._refuse_uncalled(name, calls)
        return {name: outputs[name] for name in self.names}, largest

    def _refuse_uncalled(self, name: str, calls: Counter[str]) -> NoReturn:
        stem = _find_module_name(self.modules, name)
        count = calls[stem]
        if count == 0:
            expected = "a layer that is"
        else:
            expected = f"{stem!r}, its only call" if count == 1 else f"{stem!r} to '{stem}:{count}'"
        raise LayerError(
            f"layers: {name!r} is not called in a pass of {self.owner}; expected {expected}"
        )

    def _find_tensor(self, output: Any, layer: str) -> Tensor | None:
        if isinstance(output, Tensor):
            return output
        tensors = batches.list_output_tensors(output)
        if self.output is None:
            tensor = next(iter(tensors.values()), None)
        else:
            tensor = batches.find_output_tensor(output, str(self.output))
        if tensor is None and self.names is not None:
            paths = ", ".join(map(repr, tensors)) or "none"
            raise LayerError(
                f"output: {self.output!r} is not in the output of {self.describe(layer)}; expected "
                f"one of its tensors: {paths}"
            )
        return tensor


def _is_usable(a: Tensor, n: int) -> bool:
    is_dense = a.layout == torch.strided and not a.is_nested
    return is_dense and a.is_floating_point() and a.ndim > 1 and len(a) == n and a.numel() > 0


def _describe(a: Tensor) -> str:
    kind = "nested" if a.is_nested else "" if a.layout == torch.strided else str(a.layout)
    shape = "" if a.is_nested else f" of shape {tuple(a.shape)}"
    return " ".join(f"{kind} {a.dtype}".replace("torch.", "").split()) + shape


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and every module back into its own mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # modules may do more in it than set their mode
        for module, training in modes:
            module.training = training
