"""Trace a network to its operations in order, and find those that produce its layers' outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, partialmethod
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import attention, contexts, exported
from repsim_kernels.forward.inputs import Call, Form, Inputs, call_network, pack
from repsim_kernels.forward.sites import Output, Site, resolve_sites

Values = dict[fx.Node, Any]
FindCalls = Callable[[str], list[fx.Node]]  # layer name -> operations that produce its output

# PyTorch runs each of these as one operation, unless a module inside an encoder layer has a hook.
FUSED = nn.TransformerEncoderLayer, nn.MultiheadAttention

# These return two values, and torch.fx does not look inside them.
_PAIRED = nn.MultiheadAttention, nn.RNNBase

# Errors of the machine rather than the model: the next attempt may succeed.
TRANSIENT = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError


class Untraceable(LayerError):
    """The model can't be traced by the chosen tracer."""


class Trace:
    """The operations of a model in order, and the one that produces each layer's tensor.

    If images are passed as `like`, `torch.export` traces the model for images of their shape,
    layout and dtype, and if `dynamic` for any number of them that `serves` accepts; otherwise
    `torch.fx` traces it for inputs of any kind that are passed in the given form. Raises
    Untraceable if the tracer fails.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        like: Tensor | Inputs | None = None,
        *,
        dynamic: bool = False,
        output: Output = None,
        call: Call = call_network,
        form: Form = None,
    ) -> None:
        self.model, self.exported = model, like is not None
        root, sites = _Root(model, call), resolve_sites(model, layers, output)
        if like is None:
            module, graph, self._find_calls = _trace_by_fx(root, sites, form)
        else:
            like = Inputs((like,)) if isinstance(like, Tensor) else like
            module, graph, self._find_calls = _trace_by_export(root, sites, like, dynamic)
        self._interpreter = fx.Interpreter(module, graph=graph)
        self.inputs: list[fx.Node] = [x for x in graph.nodes if x.op == "placeholder"]
        operations = [x for x in graph.nodes if x.op != "placeholder"]
        self.nodes: list[fx.Node] = [*self.inputs, *operations]
        self.operations, self.output = operations, operations[-1]

    def bind(self, inputs: Inputs) -> Values:
        """Return the values that a pass starts with."""
        return dict(zip(self.inputs, inputs.tensors, strict=True))

    def serves(self, inputs: Inputs) -> bool:
        """Whether a dynamic trace, for inputs that differ only in their number, is valid here."""
        return exported.check_guards(self._interpreter.module, inputs)

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
        if node.op == "call_function" and not sets_switches(node):  # the shortest way there
            return node.target(*args, **kwargs)  # type: ignore[operator]
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

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, images: Tensor) -> Any:  # a trace has this annotation
        return self._call(self.model, images)


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
    """The identity: makes one operation of a value that no operation of its own returns.

    Its name is part of the hash of a network's operations, by which a study recognises them.
    """
    return value


class _Tracer(fx.Tracer):
    """Traces into the layers' modules, or keeps them whole, and records where the layers are."""

    def __init__(self, sites: Collection[Site], buffers: bool, whole: bool) -> None:
        super().__init__()
        self.calls: dict[str, list[fx.Node]] = {site.layer: [] for site in sites}
        self._sites: dict[nn.Module, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(site.module, []).append(site)
        self._whole, self.proxy_buffer_attributes = whole, buffers
        self._switches = contexts.read_switches()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (x for x in m.modules() if x is not m)
        if any(x in self._sites for x in inside):
            return False
        kinds = {site.kind for site in self._sites.get(m, ())}
        if "output" in kinds and self._whole:
            return True
        if isinstance(m, FUSED):
            # As one operation it takes its fast path; traced into, its slow path, as under a hook.
            return not ((kinds and isinstance(m, nn.TransformerEncoderLayer)) or "heads" in kinds)
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
        sites = self._sites.get(m, [])
        for site in sites:
            mark = partial(self._mark, site)
            if site.kind == "input":
                args, kwargs = site.replace_input(args, kwargs, mark)
            elif isinstance(m, nn.MultiheadAttention) and site.kind == "heads":
                forward = partial(attention.run_attention, m, mark)
        out = super().call_module(m, forward, args, kwargs)
        is_leaf = self.is_leaf_module(m, self.path_of_module(m)) if sites else True
        for site in sites:
            if site.is_plain:
                if not is_leaf:
                    out = self.create_proxy("call_function", output_of, (out,), {})
                self._record(site, out, (args, kwargs))
            elif site.kind == "output":
                out = self._mark_output(site, out, is_leaf)
        return out

    def _mark(self, site: Site, value: Any) -> Any:
        """Return a value as an operation of its own, and record that as the layer."""
        marked = self.create_proxy("call_function", output_of, (value,), {})
        self._record(site, marked, value)
        return marked

    def _mark_output(self, site: Site, out: Any, is_leaf: bool) -> Any:
        """Mark the tensor at a path in a module's output."""
        if is_leaf and isinstance(out, fx.Proxy):
            if isinstance(site.module, _PAIRED):
                value: Any = out
                out = value[0], value[1]
            elif not super().is_leaf_module(site.module, ""):
                raise LayerError(f"what {site.layer!r} returns is not known while it is kept whole")
        return site.replace_output(out, partial(self._mark, site))

    def _record(self, site: Site, out: Any, arguments: Any) -> None:
        proxies: list[fx.Proxy] = []
        fx.node.map_aggregate(arguments, lambda a: _collect_proxy(proxies, a))
        if isinstance(out, fx.Proxy):
            out.node.meta["arguments"] = [proxy.node for proxy in proxies]
            self.calls[site.layer].append(out.node)

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
    root: _Root, sites: dict[str, Site], form: Form
) -> tuple[nn.Module, fx.Graph, FindCalls]:
    count = 1 if form is None else form if isinstance(form, int) else len(form)
    # torch.fx makes one placeholder of each of these.
    concrete = None if form is None else {"images": pack([PH] * count, form)}
    first_error: Exception | None = None
    # The inside of a layer may be untraceable, so the second attempt keeps layers whole. Sizes and
    # branches may depend on buffers, so the third attempt treats those as constants.
    for whole, buffers in ((False, True), (True, True), (True, False)):
        tracer = _Tracer(sites.values(), buffers, whole)
        try:
            with contexts.allow_tracing(), keep_attributes(root.model):
                graph = tracer.trace(root, concrete)
            if form is not None:  # torch.fx flattens the output too
                output = next(iter(reversed(graph.nodes)))
                output.args = tuple(output.args[0][:1])
            return root, graph, tracer.calls.__getitem__
        except TRANSIENT:
            raise
        except Exception as error:
            first_error = first_error or error
    message = f"model: torch.fx can't trace it: {first_line(first_error)}"
    raise Untraceable(message) from first_error


def _trace_by_export(
    root: _Root, sites: dict[str, Site], like: Inputs, dynamic: bool
) -> tuple[nn.Module, fx.Graph, FindCalls]:
    marked = [site for site in sites.values() if not site.is_plain]
    try:
        with ExitStack() as stack:
            for site in marked:
                mark = partial(exported.mark, layer=site.layer)
                stack.enter_context(site.replace(mark))
            module, graph = exported.export(root, like, dynamic)
    except TRANSIENT:
        raise
    except Exception as e:
        raise Untraceable(first_line(e)) from e
    marks: dict[str, list[fx.Node]] = {site.layer: [] for site in marked}
    for x in graph.nodes:
        if x.target is exported.MARK:
            marks[str(x.args[1])].append(x)
            x.target, x.args = output_of, x.args[:1]

    def find_calls(layer: str) -> list[fx.Node]:
        return marks[layer] if layer in marks else exported.find_calls(graph, layer)

    return module, graph, find_calls


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
    """Return the first line of an error's message; the name of its type if it has none.

    A module's repr at the start, which has many lines, is shortened to "Name(…)".
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    end = next((line for line in rest if line.startswith(")")), "") if first[-1] == "(" else ""
    return f"{first}…{end}" if end else first
