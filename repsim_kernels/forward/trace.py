"""Trace a network to its operations in order, and find those that produce its layers' outputs."""

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
FindCalls = Callable[[str], list[fx.Node]]  # layer name -> operations that produce its output

# PyTorch runs each of these as one operation, unless a module inside an encoder layer has a hook.
FUSED = nn.TransformerEncoderLayer, nn.MultiheadAttention

# Errors of the machine rather than the model: the next attempt may succeed.
TRANSIENT = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError


class Untraceable(LayerError):
    """The model can't be traced by the chosen tracer."""


class Trace:
    """The operations of a model in order, and the one that produces each layer's output.

    If images are passed as `like`, `torch.export` traces the model for images of their shape,
    layout and dtype; otherwise `torch.fx` traces it for images of any kind. Raises Untraceable if
    the tracer fails.
    """

    def __init__(
        self, model: nn.Module, layers: Collection[str], like: Tensor | None = None
    ) -> None:
        self.model, self.exported = model, like is not None
        if like is None:
            root, graph, self._find_calls = _trace_by_fx(model, layers)
        else:
            root, graph, self._find_calls = _trace_by_export(model, like)
        self._interpreter = fx.Interpreter(root, graph=graph)
        self.input = next(x for x in graph.nodes if x.op == "placeholder")
        self.nodes: list[fx.Node] = [self.input, *(x for x in graph.nodes if x is not self.input)]
        self.output = self.nodes[-1]

    def find_cut(self, layer: str) -> fx.Node:
        """Return the operation that produces a layer's output; LayerError unless it is called once.

        With torch.fx, the calls are those in the trace. A pass may make others: for example,
        ``isinstance(x, Tensor)`` is false in the trace.
        """
        calls = self._find_calls(layer)
        if len(calls) == 1:
            return calls[0]
        times = f"called {len(calls)} times" if calls else "never called"
        sites = "; ".join(f"on {', '.join(map(get_label, _get_arguments(x)))}" for x in calls)
        tracer = "" if self.exported else " in torch.fx's trace of the model"
        raise LayerError(
            f"layer: {layer!r} is {times}{f' ({sites})' if sites else tracer}; "
            "expected one call in a pass"
        )

    def run(self, node: fx.Node, values: Values) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with self.apply_switches(node):
            return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def apply_switches(self, node: fx.Node) -> AbstractContextManager[None]:
        """Set the switches that an operation runs under, if the model changes any."""
        return (
            contexts.set_switches(node.meta["switches"]) if sets_switches(node) else nullcontext()
        )

    def get_module(self, node: fx.Node) -> nn.Module:
        module: nn.Module = self._interpreter.fetch_attr(str(node.target))
        return module

    def get_weights(self, node: fx.Node) -> list[Tensor]:
        """Return the parameters and buffers that an operation reads."""
        if node.op == "call_module":
            module = self.get_module(node)
            return [*module.parameters(), *module.buffers()]
        attributes = [x for x in node.all_input_nodes if x.op == "get_attr"]
        values = [self._interpreter.fetch_attr(str(x.target)) for x in attributes]
        return [t for t in values if isinstance(t, Tensor)]


def get_label(node: fx.Node) -> str:
    """Return a name for an operation's value, for messages."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target).removeprefix("model.")
    return "the images" if node.op == "placeholder" else node.name


def sets_switches(node: fx.Node) -> bool:
    """Whether the model changes a switch, such as autocast, for an operation."""
    return "switches" in node.meta


def _get_arguments(call: fx.Node) -> list[fx.Node]:
    return call.meta.get("arguments", call.all_input_nodes)


class _Root(nn.Module):
    """Wraps a model, to store a trace's constants outside it and to hide its other arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _Proxy(fx.Proxy):
    """Records ``x[i] = y``, which fx refuses, and ``x += y``, which fx records as ``x = x + y``."""

    def _record(self, function: Any, *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})


for _function in (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul,
    operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift,
):  # fmt: skip
    setattr(_Proxy, f"__{_function.__name__}__", partialmethod(_Proxy._record, _function))


def output_of(value: Any) -> Any:
    """The identity: marks the output of a module that was traced into as one operation.

    Its name is part of the hash of a network's operations, by which a study recognises them.
    """
    return value


class _Tracer(fx.Tracer):
    """Traces into the layers, or keeps them whole, and records their calls."""

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
            # As one operation it takes its fast path; traced into, its slow path, as under a hook.
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
            proxies: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda a: _collect_proxy(proxies, a))
            if isinstance(out, fx.Proxy):
                out.node.meta["arguments"] = [proxy.node for proxy in proxies]
                self._calls[m].append(out.node)
        return out

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _stacks_layers(m: nn.Module) -> TypeGuard[nn.TransformerEncoder]:
    """Whether a module is exactly PyTorch's encoder, without hooks."""
    return type(m) is nn.TransformerEncoder and not (m._forward_hooks or m._forward_pre_hooks)


def _run_encoder(encoder: nn.TransformerEncoder, x: Any) -> Any:
    """Run ``encoder(x)`` without its checks of shapes, which fx can't evaluate."""
    for layer in encoder.layers:
        x = layer(x, src_mask=None, is_causal=False, src_key_padding_mask=None)
    return x if encoder.norm is None else encoder.norm(x)


def _collect_proxy(proxies: list[fx.Proxy], value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        proxies.append(value)
    return value


def _trace_by_fx(
    model: nn.Module, layers: Collection[str]
) -> tuple[nn.Module, fx.Graph, FindCalls]:
    root, modules = _Root(model), dict(model.named_modules(remove_duplicate=False))
    first_error: Exception | None = None
    # The inside of a layer may be untraceable, so the second attempt keeps layers whole. Sizes and
    # branches may depend on buffers, so the third attempt treats those as constants.
    for whole, buffers in ((False, True), (True, True), (True, False)):
        calls: dict[nn.Module, list[fx.Node]] = {modules[layer]: [] for layer in layers}
        try:
            with contexts.allow_tracing(), keep_attributes(model):
                graph = _Tracer(calls, buffers, whole).trace(root)
            return root, graph, partial(_get_calls, calls, modules)
        except TRANSIENT:
            raise
        except Exception as error:
            first_error = first_error or error
    message = f"model: torch.fx can't trace it: {first_line(first_error)}"
    raise Untraceable(message) from first_error


def _get_calls(
    calls: dict[nn.Module, list[fx.Node]], modules: dict[str, nn.Module], layer: str
) -> list[fx.Node]:
    return calls[modules[layer]]


def _trace_by_export(model: nn.Module, images: Tensor) -> tuple[nn.Module, fx.Graph, FindCalls]:
    try:
        root, graph = exported.export(_Root(model), images)
    except TRANSIENT:
        raise
    except Exception as e:
        raise Untraceable(first_line(e)) from e
    return root, graph, partial(exported.find_calls, graph)


@contextmanager
def keep_attributes(model: nn.Module) -> Iterator[None]:
    """Restore what passes of a model assign to its modules: attributes, buffers, submodules."""
    saved = [(table, dict(table)) for m in model.modules() for table in _get_tables(m)]
    try:
        yield
    finally:
        for table, old in saved:
            same = all(map(operator.is_, table.values(), old.values()))
            if not same or [*table] != [*old]:  # untouched tables may be in use by other threads
                table.clear()
                table.update(old)


def _get_tables(module: nn.Module) -> list[dict[str, Any]]:
    attributes = vars(module)
    tables = (attributes.get(name) for name in ("_parameters", "_buffers", "_modules"))
    # TorchScript modules store objects of other types under these names.
    return [attributes, *(table for table in tables if isinstance(table, dict))]


def is_within(layer: str, module: str) -> bool:
    """Whether a layer is a module or a submodule of it, by name."""
    return f"{layer}.".startswith(f"{module}." if module else "")


def first_line(error: Exception | None) -> str:
    """Return the first line of an error's message; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
