"""Trace a network by ``torch.export``, and flatten the result to one graph of operations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import contexts
from repsim_kernels.forward.contexts import Switches
from repsim_kernels.forward.inputs import Inputs, pack

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_TORCH_FUNC = ("torch._functorch", "torch._C._functorch")
_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


@torch.library.custom_op("repsim_kernels::mark", mutates_args=())
def mark(x: Tensor, layer: str) -> Tensor:
    """Return a copy: an operation that marks a layer's tensor in the graph."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, layer: str) -> Tensor:
    return x.clone()


MARK = torch.ops.repsim_kernels.mark.default


def export(root: nn.Module, inputs: Inputs, dynamic: bool) -> tuple[nn.Module, fx.Graph]:
    """Export a module for inputs like these; return a module with its tensors, and the graph.

    If `dynamic`, the graph serves every number of stimuli that `check_guards` accepts. Inputs that
    are the same for all stimuli keep their shapes.
    """
    sizes = [{0: Dim.AUTO} if inputs.is_batch(i) else None for i in range(len(inputs.tensors))]
    shapes = (pack(sizes, inputs.form),) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        images = inputs.pack()
        program = torch.export.export(root, (images,), dynamic_shapes=shapes, strict=False)
        module = program.module()
    graph = _inline_regions(module)
    # The operations of torch.func open and close levels of PyTorch's state. A pass that stops in
    # between would leave a level open for the whole process.
    if any(str(getattr(x.target, "__module__", "")).startswith(_TORCH_FUNC) for x in graph.nodes):
        raise LayerError("the model uses torch.func (vmap, grad, jvp), which can't be cut")
    output = next(iter(reversed(graph.nodes)))
    if program.call_spec.out_spec.is_leaf():
        output.args = (output.args[0][0],)
    return module, graph


def check_guards(module: nn.Module, inputs: Inputs) -> bool:
    """Whether the sizes of inputs meet all conditions under which a module was exported.

    The exporter records a condition where the model's Python code or an operation depends on a
    size. It does so only for sizes from 2, for which it assumes that nothing is special about 1.
    """
    check = getattr(module, "_guards_fn", None)
    if check is None or len(inputs) < 2:
        return False
    try:
        check(*inputs.tensors)
    except AssertionError:
        return False
    return True


def is_size(x: fx.Node) -> bool:
    """Whether a value is a number that depends on the number of stimuli, but on no values."""
    value = x.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return False
    # Loads slowly, unless the exporter has loaded it already.
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return not free_unbacked_symbols(value)


def find_calls(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """Return, for each call of a layer, the operation whose value is used outside the layer."""
    path = f"model.{layer}" if layer else "model"
    inside: dict[str, list[fx.Node]] = {}
    for x in graph.nodes:
        for key, (name, _) in (x.meta.get("nn_module_stack") or {}).items():
            if name == path:
                inside.setdefault(key, []).append(x)
    calls = []
    for operations in inside.values():
        values = [x for x in operations if not is_size(x)]
        outputs = [x for x in values if not set(operations).issuperset(x.users)]
        if len(outputs) != 1:
            raise LayerError(
                f"layer: {layer!r} gives {len(outputs)} tensors; expected a tensor (n, …)"
            )
        calls += outputs
    return calls


def _inline_regions(module: nn.Module) -> fx.Graph:
    """Return a program's graph with its nested graphs inlined.

    The exporter turns each region under autocast or a gradient mode into a function. A layer in a
    region must be cut like any other, so the region's operations are moved out of the function and
    keep its switches.
    """
    flat = fx.Graph()

    def move(owner: Any, inputs: Sequence[fx.Node] | None, switches: Switches) -> Any:
        """Copy a graph's operations and return its result; `inputs` is None for the outer graph."""
        values: dict[fx.Node, Any] = {}
        regions: set[Any] = set()
        remaining = iter(inputs or ())
        for x in owner.graph.nodes:
            if x.op == "placeholder" and inputs is not None:
                values[x] = next(remaining)
            elif x.op == "output" and inputs is not None:
                return fx.node.map_arg(x.args[0], values.__getitem__)
            elif x.target in (_AUTOCAST, _GRAD):
                values[x] = move_region(owner, x, values, switches)  # a tuple
                regions.add(x)
            elif x.target is operator.getitem and x.args[0] in regions:
                values[x] = values[x.args[0]][x.args[1]]
            elif x.op == "call_module":
                continue  # the program's check of its input, its only call of a module
            elif not _reads_region_graph(owner, x):
                values[x] = copy = flat.node_copy(x, values.__getitem__)
                if switches != outside:
                    copy.meta["switches"] = switches
        return None

    def move_region(
        owner: Any, call: fx.Node, values: dict[fx.Node, Any], switches: Switches
    ) -> Any:
        arguments: Any = call.args
        if call.target is _AUTOCAST:
            device, dtype, enabled, _, graph, *inputs = arguments
            switches = switches.with_autocast(device, dtype, enabled)
        else:  # a gradient mode, without effect: no pass tracks gradients
            _, graph, *inputs = arguments
        return move(getattr(owner, graph.target), [values[x] for x in inputs], switches)

    outside = contexts.read_switches()
    move(module, None, outside)
    return flat


def _reads_region_graph(owner: nn.Module, x: fx.Node) -> bool:
    """Whether a node only reads the graph of a region."""
    graph = isinstance(getattr(owner, str(x.target), None), fx.GraphModule)
    return x.op == "get_attr" and graph and all(y.target in (_AUTOCAST, _GRAD) for y in x.users)
