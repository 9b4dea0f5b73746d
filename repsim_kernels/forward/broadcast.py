"""Values that are the same for all cells, beside those of many cells that run together."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from repsim_kernels.forward.trace import Trace, Values

# Element by element, of two operands; the first may be written to.
_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul,
        torch.add, torch.sub, torch.mul,
        torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor,
        torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor,
    }
)  # fmt: skip


def run(trace: Trace, node: fx.Node, values: Values, once: set[fx.Node], cells: int) -> Any:
    """Run an operation for some cells; those of its arguments in `once` have no row for each.

    A skip connection is added to the rows of every cell where it is; for another operation it is
    copied for each, in `values`, and no longer in `once`.
    """
    if once.isdisjoint(node.all_input_nodes):
        return trace.run(node, values)
    if node.op == "call_function" and node.target in _ELEMENTWISE and not node.kwargs:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left not in once:
            rows, shared = values[left], values[right]
            if isinstance(rows, Tensor) and rows.ndim == shared.ndim:
                split = rows.unflatten(0, (cells, -1))
                if split.shape[1:] == shared.shape:
                    with trace.apply_switches(node):
                        result: Tensor = node.target(split, shared)  # type: ignore[operator]
                    return result.flatten(0, 1)
    for x in node.all_input_nodes:
        if x in once:
            values[x] = tiled(values[x], cells)
            once.discard(x)
    return trace.run(node, values)


def tiled(t: Tensor, cells: int) -> Tensor:
    """(cells n, …): the tensor once a cell, with its order of dimensions in memory."""
    strides = torch.empty_like(t, device="meta").stride()
    order = sorted(range(t.ndim), key=strides.__getitem__, reverse=True)
    sizes = cells * len(t), *t.shape[1:]
    out = t.new_empty([sizes[d] for d in order]).permute([order.index(d) for d in range(t.ndim)])
    out.view(cells, *t.shape).copy_(t)
    return out
