"""Sites: the tensors of a pass that can be ablated, such as a module's output or its heads'."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn

from repsim_kernels import _options
from repsim_kernels._structures import get_parts, name_parts, rebuild
from repsim_kernels.errors import LayerError, OptionError
from repsim_kernels.forward import attention

Replace = Callable[[Any], Any]
Output = int | str | None

_KINDS = "input", "heads"


@dataclass(frozen=True)
class Site:
    """A tensor of a pass, by the module that returns or receives it.

    Attributes
    ----------
    layer : str
        The layer's name, such as "block.mlp", "block.mlp:input" or "block.attn:heads".
    kind : {"output", "input", "heads"}
        The module's output, its first input, or what the heads of `nn.MultiheadAttention` return.
        Other attention modules' heads are the input of a projection, or an output.
    module : nn.Module
    module_name : str
    path : str, optional
        Where the tensor is in the output, unless that is a tensor.
    n_heads : int, optional
        For a layer of heads, their number.
    """

    layer: str
    kind: Literal["output", "input", "heads"]
    module: nn.Module
    module_name: str
    path: str | None = None
    n_heads: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is the whole output of a module."""
        return self.kind == "output" and self.path is None

    @contextmanager
    def replace(self, function: Replace) -> Iterator[None]:
        """Replace the tensor by a function of it, in passes of the network inside a context."""
        if self.kind == "heads":
            assert isinstance(self.module, nn.MultiheadAttention)
            with attention.replace_heads(self.module, self.layer, function):
                yield
            return
        if self.kind == "input":
            handle = self.module.register_forward_pre_hook(
                lambda _module, args, kwargs: self.replace_input(args, kwargs, function),
                with_kwargs=True,
            )
        else:
            handle = self.module.register_forward_hook(
                lambda _module, _inputs, output: self.replace_output(output, function)
            )
        try:
            yield
        finally:
            handle.remove()

    def replace_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], function: Replace
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments with the first one replaced."""
        if args:
            return (function(self._check(args[0], "gets")), *args[1:]), kwargs
        for name, value in kwargs.items():
            return args, kwargs | {name: function(self._check(value, "gets"))}
        raise LayerError(f"layer: {self.layer!r} is called without arguments; expected a tensor")

    def replace_output(self, output: Any, function: Replace) -> Any:
        """Return a module's output with the tensor replaced."""
        if self.path is None or is_tensor(output):
            return function(self._check(output, "returns"))
        replaced = _replace_at(output, self.path, function)
        if replaced is None:
            paths = ", ".join(map(repr, list_paths(output))) or "none"
            raise LayerError(
                f"output: {self.path!r} is not in what {self.layer!r} returns, "
                f"{describe_value(output)}; expected one of its tensors: {paths}"
            )
        return replaced

    def _check(self, value: Any, does: str) -> Any:
        if is_tensor(value):
            return value
        paths = list_paths(value) if does == "returns" else []
        path = int(paths[0]) if paths and paths[0].isdecimal() else paths[0] if paths else None
        hint = f"a tensor, or output={path!r}" if paths else "a tensor (n, …)"
        raise LayerError(f"layer: {self.layer!r} {does} {describe_value(value)}; expected {hint}")


def resolve_sites(
    model: nn.Module, layers: Collection[str], output: Output = None
) -> dict[str, Site]:
    """Return the sites of layers, by name; LayerError if the model lacks a module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    path = None if output is None else str(output)
    return {layer: _resolve(modules, layer, path) for layer in layers}


def _resolve(modules: dict[str, nn.Module], layer: str, path: str | None) -> Site:
    name, kind = split_name(modules, layer)
    module = modules[name]
    if kind == "input":
        return Site(layer, "input", module, name)
    if kind == "output":
        return Site(layer, "output", module, name, path)
    if isinstance(module, nn.MultiheadAttention):
        return Site(layer, "heads", module, name, n_heads=module.num_heads)
    projection = attention.find_projection(module, layer)
    n_heads = attention.find_head_count(module)
    if projection is None:
        return Site(layer, "output", module, name, "0", n_heads)
    inner = f"{name}.{projection}" if name else projection
    return Site(layer, "input", modules[inner], inner, n_heads=n_heads)


def split_name(modules: Collection[str], layer: str) -> tuple[str, str]:
    """Split a layer's name into that of its module, and "output", "input" or "heads"."""
    name, colon, kind = layer.rpartition(":")
    return (name, kind) if colon and layer not in modules and kind in _KINDS else (layer, "output")


def check_output(output: Any) -> Output:
    """Check the option `output`; OptionError if it is no index or path."""
    if output is None or (isinstance(output, (int, str)) and not isinstance(output, bool)):
        return output
    raise OptionError(
        f"output: {_options.short_repr(output)}; expected an index, a path such as '0.hidden', "
        "or None"
    )


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or stands for one while torch.fx traces."""
    return isinstance(value, (Tensor, fx.Proxy))


def list_paths(value: Any, path: str = "") -> list[str]:
    """Return the paths of the tensors in a module's output, such as "hidden_states.3"."""
    if is_tensor(value):
        return [path]
    parts = (get_parts(value) or {}).items()
    return [
        inner
        for key, part in parts
        for inner in list_paths(part, f"{path}.{key}" if path else str(key))
    ]


def _replace_at(value: Any, path: str, function: Replace) -> Any:
    """Return nested containers with the tensor at a path replaced; None if there is none."""
    if not path:
        return function(value) if is_tensor(value) else None
    parts = get_parts(value) or {}
    for name, key in name_parts(parts).items():  # a name may have dots itself
        if path == name or path.startswith(f"{name}."):
            part = _replace_at(parts[key], path[len(name) + 1 :], function)
            if part is not None:
                return rebuild(value, parts | {key: part})
    return None


def describe_value(value: Any) -> str:
    """Describe what a module returns or receives, for errors."""
    kind = type(value).__name__.removeprefix("immutable_")
    if isinstance(value, (tuple, list)):
        return f"a {kind} of {len(value)}"
    return f"a value of type {kind}"
