"""Operations on values of several cells, some of which are the same for all cells."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from repsim_kernels.forward.trace import Trace, Values

# Element by element, with two operands; only the first may be written to.
_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul,
        torch.add, torch.sub, torch.mul,
        torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor,
        torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor,
    }
)  # fmt: skip


def run_for_cells(
    trace: Trace, node: fx.Node, values: Values, shared: set[fx.Node], n_cells: int
) -> Any:
    """Run an operation for several cells at once.

    Values have a row for each cell and image, (cells n, …), except those in `shared`, which have
    one for each image, (n, …). An elementwise operation broadcasts a shared operand, such as a
    skip connection. Any other operation needs it repeated for each cell: the repeated value goes
    into `values`, and its node leaves `shared`.
    """
    if not shared or shared.isdisjoint(node.all_input_nodes):
        return trace.run(node, values)
    if node.op == "call_function" and node.target in _ELEMENTWISE and not node.kwargs:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left not in shared:
            rows, operand = values[left], values[right]
            if isinstance(rows, Tensor) and rows.ndim == operand.ndim:
                split = rows.unflatten(0, (n_cells, -1))
                if split.shape[1:] == operand.shape:
                    with trace.apply_switches(node):
                        result: Tensor = node.target(split, operand)  # type: ignore[operator]
                    return result.flatten(0, 1)
    for x in node.all_input_nodes:
        if x in shared:
            values[x] = repeat_for_cells(values[x], n_cells)
            shared.discard(x)
    return trace.run(node, values)


def repeat_for_cells(t: Tensor, n_cells: int) -> Tensor:
    """Copy a tensor (n, …) once for each cell: (cells n, …), in the same memory order."""
    out = empty_for_cells(t, n_cells)
    out.view(n_cells, *t.shape).copy_(t)
    return out


def empty_for_cells(t: Tensor, n_cells: int) -> Tensor:
    """Return unwritten memory for a copy of a tensor (n, …) per cell, in the same memory order."""
    strides = torch.empty_like(t, device="meta").stride()
    order = sorted(range(t.ndim), key=strides.__getitem__, reverse=True)
    sizes = n_cells * len(t), *t.shape[1:]
    return t.new_empty([sizes[d] for d in order]).permute([order.index(d) for d in range(t.ndim)])
