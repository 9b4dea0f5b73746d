"""The operations of a network in their order, and which of them give its layers' outputs."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, fx, nn

from repsim_kernels.errors import LayerError

Values = dict[fx.Node, Any]


class Untraceable(LayerError):
    """A model that can't be traced this way."""


class Trace:
    """The operations of a model in their order, and the one whose value is a layer's output.

    By `torch.fx`, for images of any shape; where that can't trace the model, by `torch.export`, for
    images like those given. Raises Untraceable where it can't either, LayerError where a layer
    isn't called once.
    """

    def __init__(
        self, model: nn.Module, layers: Collection[str], like: Tensor | None = None
    ) -> None:
        """like: images to export the model for; without them fx traces it."""
        self.model = model
        if like is None:
            root, graph, calls = _symbolic(model, layers)
        else:
            root, graph, calls = _exported(model, layers, like)
        self._interpreter = fx.Interpreter(root, graph=graph)
        self.input = next(x for x in graph.nodes if x.op == "placeholder")
        self.nodes: list[fx.Node] = [self.input, *(x for x in graph.nodes if x is not self.input)]
        self.output = self.nodes[-1]
        self.cuts = {layer: _once(layer, calls[layer]) for layer in layers}

    def run(self, node: fx.Node, values: Values) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

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


def _once(layer: str, calls: list[fx.Node]) -> fx.Node:
    if len(calls) != 1:
        sites = "; ".join(f"on {', '.join(map(label, _arguments(x)))}" for x in calls)
        times = f"called {len(calls)} times ({sites})" if calls else "never called"
        raise LayerError(f"layer: {layer!r} is {times}; expected one call in a pass")
    return calls[0]


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

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (x for x in m.modules() if x is not m)
        if any(x in self._calls for x in inside):
            return False
        if m in self._calls and self._whole:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
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


def _collect(found: list[fx.Proxy], value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        found.append(value)
    return value


def _symbolic(
    model: nn.Module, layers: Collection[str]
) -> tuple[nn.Module, fx.Graph, dict[str, list[fx.Node]]]:
    root, modules = _Root(model), dict(model.named_modules(remove_duplicate=False))
    kept = [(vars(m), dict(vars(m))) for m in root.modules()]  # a pass may store what it made
    first: Exception | None = None
    # Inside a layer there may be what can't be traced; sizes and branches may hang on buffers,
    # which are constants then.
    for whole, buffers in ((False, True), (True, True), (True, False)):
        calls: dict[nn.Module, list[fx.Node]] = {modules[layer]: [] for layer in layers}
        try:
            graph = _Tracer(calls, buffers, whole).trace(root)
            return root, graph, {layer: calls[modules[layer]] for layer in layers}
        except Exception as e:
            first = first or e
        finally:
            for attributes, old in kept[1:]:  # the root's are the trace's own
                attributes.clear()
                attributes.update(old)
    raise Untraceable(f"model: torch.fx can't trace it: {_line(first)}") from first


def _exported(
    model: nn.Module, layers: Collection[str], images: Tensor
) -> tuple[nn.Module, fx.Graph, dict[str, list[fx.Node]]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations
            program = torch.export.export(_Root(model), (images,), strict=False)
            root = program.module()
    except Exception as e:
        raise Untraceable(f"torch.export can't either: {_line(e)}") from e
    graph = root.graph
    for x in [x for x in graph.nodes if x.op == "call_module"]:
        graph.erase_node(x)  # of the program's check of its input: everything else is operators
    output = next(iter(reversed(graph.nodes)))
    results = output.args[0]
    if program.call_spec.out_spec.is_leaf():
        output.args = (results[0],)
    return root, graph, {layer: _calls(graph, layer) for layer in layers}


def _calls(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """The operations of a layer whose values others use, of every call of it."""
    path = f"model.{layer}" if layer else "model"
    calls: dict[str, list[fx.Node]] = {}
    for x in graph.nodes:
        for key, (name, _) in (x.meta.get("nn_module_stack") or {}).items():
            if name == path:
                calls.setdefault(key, []).append(x)
    found = []
    for inside in calls.values():
        own = set(inside)
        given = [x for x in inside if not own.issuperset(x.users)]
        if len(given) != 1:
            raise LayerError(
                f"layer: {layer!r} gives {len(given)} tensors of its own; expected a tensor (n, …)"
            )
        found += given
    return found


def _line(error: Exception | None) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
