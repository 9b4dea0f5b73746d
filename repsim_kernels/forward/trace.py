"""The operations of a network in their order, and which of them give its layers' outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, partialmethod
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import contexts, exported

Values = dict[fx.Node, Any]
Calls = Callable[[str], list[fx.Node]]  # the operations that give a layer's output

# PyTorch runs these as one operation, where no module inside an encoder layer has a hook.
FUSED = nn.TransformerEncoderLayer, nn.MultiheadAttention

# Errors of the machine, not of the model: the next attempt may succeed.
TRANSIENT = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError


class Untraceable(LayerError):
    """A model that can't be traced this way."""


class Trace:
    """The operations of a model in their order, and the one whose value is a layer's output.

    By `torch.fx`, for images of any shape; where that can't trace the model, by `torch.export`, for
    images like those given. Raises Untraceable where it can't either.
    """

    def __init__(
        self, model: nn.Module, layers: Collection[str], like: Tensor | None = None
    ) -> None:
        """like: images to export the model for; without them fx traces it."""
        self.model, self.exported = model, like is not None
        if like is None:
            root, graph, self._calls = _symbolic(model, layers)
        else:
            root, graph, self._calls = _exported(model, like)
        self._interpreter = fx.Interpreter(root, graph=graph)
        self.input = next(x for x in graph.nodes if x.op == "placeholder")
        self.nodes: list[fx.Node] = [self.input, *(x for x in graph.nodes if x is not self.input)]
        self.output = self.nodes[-1]

    def cut(self, layer: str) -> fx.Node:
        """The operation that gives a layer's output; LayerError where the layer isn't called once.

        What a trace by fx says of a layer holds for the trace alone: ``isinstance(x, Tensor)`` is
        false in it.
        """
        calls = self._calls(layer)
        if len(calls) == 1:
            return calls[0]
        times = f"called {len(calls)} times" if calls else "never called"
        sites = "; ".join(f"on {', '.join(map(label, _arguments(x)))}" for x in calls)
        how = "" if self.exported else ", as torch.fx traces the model"
        raise LayerError(
            f"layer: {layer!r} is {times}{f' ({sites})' if sites else how}; "
            "expected one call in a pass"
        )

    def run(self, node: fx.Node, values: Values) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with self.apply_switches(node):
            return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def apply_switches(self, node: fx.Node) -> AbstractContextManager[None]:
        """The switches that an operation runs under, where the model sets any."""
        return (
            contexts.set_switches(node.meta["switches"]) if sets_switches(node) else nullcontext()
        )

    def module(self, node: fx.Node) -> nn.Module:
        module: nn.Module = self._interpreter.fetch_attr(str(node.target))
        return module

    def weights(self, node: fx.Node) -> list[Tensor]:
        """The parameters and buffers that an operation reads."""
        if node.op == "call_module":
            module = self.module(node)
            return [*module.parameters(), *module.buffers()]
        given = [x for x in node.all_input_nodes if x.op == "get_attr"]
        values = [self._interpreter.fetch_attr(str(x.target)) for x in given]
        return [t for t in values if isinstance(t, Tensor)]


def label(node: fx.Node) -> str:
    if node.op in ("call_module", "get_attr"):
        return str(node.target).removeprefix("model.")
    return "the images" if node.op == "placeholder" else node.name


def sets_switches(node: fx.Node) -> bool:
    """Whether the model runs an operation under autocast or another switch of its own."""
    return "switches" in node.meta


def _arguments(call: fx.Node) -> list[fx.Node]:
    return call.meta.get("arguments", call.all_input_nodes)


class _Root(nn.Module):
    """Keeps what a trace stores off the model, and the defaults of its other arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _Proxy(fx.Proxy):
    """Records ``x[i] = y``, which fx refuses, and ``x += y``, which it takes for ``x = x + y``."""

    def _record(self, function: Any, *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})


for _function in (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul,
    operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift,
):  # fmt: skip
    setattr(_Proxy, f"__{_function.__name__}__", partialmethod(_Proxy._record, _function))


def output_of(value: Any) -> Any:
    """What a module that was traced into gave: an operation of its own, for the layer's users."""
    return value


class _Tracer(fx.Tracer):
    """Notes the calls of the layers; goes into them, or keeps them whole."""

    def __init__(self, layers: dict[nn.Module, list[fx.Node]], buffers: bool, whole: bool) -> None:
        super().__init__()
        self._calls, self._whole, self.proxy_buffer_attributes = layers, whole, buffers
        self._switches = contexts.read_switches()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (x for x in m.modules() if x is not m)
        if any(x in self._calls for x in inside):
            return False
        if m in self._calls and self._whole:
            return True
        if isinstance(m, FUSED):
            # Run as it is, it takes its fast path; traced into, the slow one, as under a hook.
            return not (m in self._calls and isinstance(m, nn.TransformerEncoderLayer))
        return super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        switches = contexts.read_switches()
        if switches != self._switches:
            node.meta["switches"] = switches
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if _stacks_layers(m) and len(args) == 1 and not kwargs:
            forward = partial(_run_encoder, m)
        out = super().call_module(m, forward, args, kwargs)
        if m in self._calls:
            if not self.is_leaf_module(m, self.path_of_module(m)):
                out = self.create_proxy("call_function", output_of, (out,), {})
            found: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda a: _collect(found, a))
            if isinstance(out, fx.Proxy):
                out.node.meta["arguments"] = [proxy.node for proxy in found]
                self._calls[m].append(out.node)
        return out

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _stacks_layers(m: nn.Module) -> TypeGuard[nn.TransformerEncoder]:
    """Whether a module is PyTorch's encoder, with nothing of someone else's around it."""
    return type(m) is nn.TransformerEncoder and not (m._forward_hooks or m._forward_pre_hooks)


def _run_encoder(encoder: nn.TransformerEncoder, x: Any) -> Any:
    """``encoder(x)``, without its questions about shapes, which fx can't answer."""
    for layer in encoder.layers:
        x = layer(x, src_mask=None, is_causal=False, src_key_padding_mask=None)
    return x if encoder.norm is None else encoder.norm(x)


def _collect(found: list[fx.Proxy], value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        found.append(value)
    return value


def _symbolic(model: nn.Module, layers: Collection[str]) -> tuple[nn.Module, fx.Graph, Calls]:
    root, modules = _Root(model), dict(model.named_modules(remove_duplicate=False))
    first: Exception | None = None
    # Inside a layer there may be what can't be traced; sizes and branches may hang on buffers,
    # which are constants then.
    for whole, buffers in ((False, True), (True, True), (True, False)):
        calls: dict[nn.Module, list[fx.Node]] = {modules[layer]: [] for layer in layers}
        try:
            with contexts.allow_tracing(), keep_attributes(model):
                graph = _Tracer(calls, buffers, whole).trace(root)
            return root, graph, partial(_calls_of, calls, modules)
        except TRANSIENT:
            raise
        except Exception as e:
            first = first or e
    raise Untraceable(f"model: torch.fx can't trace it: {first_line(first)}") from first


def _calls_of(
    calls: dict[nn.Module, list[fx.Node]], modules: dict[str, nn.Module], layer: str
) -> list[fx.Node]:
    return calls[modules[layer]]


def _exported(model: nn.Module, images: Tensor) -> tuple[nn.Module, fx.Graph, Calls]:
    try:
        root, graph = exported.export(_Root(model), images)
    except TRANSIENT:
        raise
    except Exception as e:
        raise Untraceable(first_line(e)) from e
    return root, graph, partial(exported.find_calls, graph)


@contextmanager
def keep_attributes(model: nn.Module) -> Iterator[None]:
    """Put back what passes of a model assign to its modules: attributes, buffers, submodules."""
    kept = [(table, dict(table)) for m in model.modules() for table in _tables(m)]
    try:
        yield
    finally:
        for table, old in kept:
            same = all(map(operator.is_, table.values(), old.values()))
            if not same or [*table] != [*old]:  # else other threads may be reading it
                table.clear()
                table.update(old)


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    own = vars(module)
    tables = (own.get(name) for name in ("_parameters", "_buffers", "_modules"))
    return [own, *(table for table in tables if isinstance(table, dict))]  # not TorchScript's


def is_within(layer: str, module: str) -> bool:
    """Whether a layer is a module or inside it, by name."""
    return f"{layer}.".startswith(f"{module}." if module else "")


def first_line(error: Exception | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
