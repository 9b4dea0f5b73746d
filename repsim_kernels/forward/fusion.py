"""What follows a masked layer and is done by one kernel together with the mask.

Kernels take over the first operations of a tail where nothing else uses what is between them. One
cell at a time the result has to be a forward hook's, bit for bit, which of these only the mask and
ReLU keep; several cells together are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repsim_kernels import _dispatch
from repsim_kernels.forward.dataflow import Split, Step
from repsim_kernels.forward.trace import Trace, Values, sets_switches


@dataclass(frozen=True)
class Cells:
    """Some of the cells of a layer's units."""

    labels: np.ndarray[Any, Any]  # (p,), or memberships (C, p)
    table: Tensor  # the same on the activation's device
    ids: Tensor  # those that are wanted, on the activation's device

    def some(self, ids: list[int]) -> Cells:
        return Cells(self.labels, self.table, torch.tensor(ids, device=self.table.device))

    def masks(self) -> Tensor:
        """(len(ids), p): the units of each wanted cell."""
        if self.table.dtype == torch.bool:
            return self.table[self.ids]
        return self.table == self.ids[:, None]


def uses_triton(activation: Tensor) -> bool:
    """Whether kernels mask this activation; else PyTorch's operations do."""
    return _dispatch.uses_triton("ablate", activation)


def run(trace: Trace, split: Split, values: Values, cells: Cells) -> list[Step]:
    """Mask the cut's value for some cells, and do as much of the tail as one kernel can.

    Leaves in ``values`` what the rest of the tail needs, and gives its steps.
    """
    plan = _plan(trace, split, values, several=len(cells.ids) > 1)
    return _skip(split, plan.steps, values, _start(values[split.cut], cells, plan))


def _skip(split: Split, count: int, values: Values, result: Tensor) -> list[Step]:
    """Put the result of a tail's first steps into ``values``, and give the steps that are left."""
    done, rest = split.tail[:count], split.tail[count:]
    values[done[-1].node if done else split.cut] = result
    for step in done:
        for x in step.dropped:
            values.pop(x, None)
    return rest


@dataclass(frozen=True)
class Linear:
    """A linear layer directly behind the masks, for all cells of a partition in one product.

    W (x ⊙ m_c) = W x - W (x ⊙ (1 - m_c)), and each column of W is in one cell.
    """

    split: Split
    steps: int  # of the tail, with what does nothing before it
    x: Tensor  # (n, p)
    cells: Cells
    weight: Tensor
    bias: Tensor | None

    def run(self, values: Values) -> list[Step]:
        """Leaves in ``values`` what the rest of the tail needs, and gives its steps."""
        whole = F.linear(self.x, self.weight, self.bias)  # (n, k)
        masks = self.cells.masks()
        order = masks.nonzero()[:, 1]  # one cell after the other
        sizes = masks.sum(1).tolist()
        columns = self.x.index_select(1, order).split(sizes, 1)
        out = whole.expand(len(sizes), *whole.shape).clone()  # (C, n, k)
        # Some outputs at a time: the gathered weights stay in a cache, and need no copy of all.
        rows = max(1, _GATHERED // (len(order) * self.weight.element_size()))
        for weights, part in zip(self.weight.split(rows), out.split(rows, 2), strict=True):
            pieces = weights.index_select(1, order).split(sizes, 1)
            for cell, x, w in zip(part, columns, pieces, strict=True):
                cell.addmm_(x, w.mT, alpha=-1)
        return _skip(self.split, self.steps, values, out.flatten(0, 1))


_GATHERED = 2**23  # bytes of weights at a time
# To gather a column of the weights costs as much as the products of so many rows.
_GATHER = 300


def linear(trace: Trace, split: Split, values: Values, cells: Cells, count: int) -> Linear | None:
    """The linear layer behind the masks, where one product for `count` cells is the cheaper."""
    x, flat = values[split.cut], False
    if count < 2 or cells.labels.ndim > 1 or (count - 1) * len(x) <= _GATHER:
        return None
    for steps, operation in _chain(trace, split, values):
        if isinstance(operation, _Product) and operation.weight.ndim == 2:
            x = x.flatten(1) if flat else x
            weight = operation.weight
            fits = x.ndim == 2 and x.dtype == weight.dtype in (torch.float32, torch.float64)
            if not fits or torch.is_autocast_enabled(x.device.type):
                return None
            if not torch.isfinite(x).all():  # a mask hides infinity, a difference doesn't
                return None
            return Linear(split, steps, x, cells, weight, operation.bias)
        if operation == "flatten":
            flat = True
        elif operation != "nothing":
            return None
    return None


@dataclass(frozen=True)
class _Norm:
    """A batch norm in eval mode."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def folded(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, rounded to float32 once."""
        scale = (self.var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.mean.double() * scale
        if self.bias is not None:
            shift = shift + self.bias.double()
        return scale.float(), shift.float()


@dataclass(frozen=True)
class _Product:
    """A linear layer, or a 1x1 convolution."""

    weight: Tensor
    bias: Tensor | None = None

    def fits(self, x: Tensor, flat: bool) -> bool:
        """Whether the kernels can do it behind the mask of an activation."""
        if torch.is_autocast_enabled(x.device.type) or (flat and self.weight.ndim > 2):
            return False
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return _dispatch.uses_triton("masked_pointwise", x, *parameters)


_Operation = _Norm | _Product | Literal["relu", "relu6", "flatten", "nothing"] | None


@dataclass
class _Plan:
    """What one kernel does behind the mask, in this order."""

    x: Tensor  # the activation
    several: bool  # whether there is more than one cell
    steps: int = 0  # of the tail
    flat: bool = False
    product: _Product | None = None
    norm: tuple[Tensor, Tensor] | None = None  # scale and shift
    activate: str = "none"

    def takes(self, operation: _Operation) -> bool:
        """Add an operation, if a kernel does it together with those that are there."""
        begun = self.product is not None or self.norm is not None
        waiting = self.flat and self.product is None  # for the linear layer behind a flatten
        if operation is None or self.activate != "none":
            return False
        if operation == "relu" or operation == "relu6":
            if waiting:
                return False
            self.activate = operation
        elif not self.several:
            return False
        elif operation == "flatten":
            if begun or self.flat:
                return False
            self.flat = True
        elif isinstance(operation, _Product):
            if begun or not operation.fits(self.x, self.flat):
                return False
            self.product = operation
        elif isinstance(operation, _Norm):
            if self.norm is not None or waiting or self._last_is_not_channels():
                return False
            self.norm = operation.folded()
        return True

    def _last_is_not_channels(self) -> bool:
        """Whether a batch norm would take another dimension than the outputs of a linear layer."""
        linear = self.product is not None and self.product.weight.ndim == 2
        return linear and self.x.ndim > 2 and not self.flat


def _plan(trace: Trace, split: Split, values: Values, several: bool) -> _Plan:
    plan = _Plan(values[split.cut], several)
    for count, operation in _chain(trace, split, values):
        if operation == "nothing":
            continue
        if not plan.takes(operation):
            break
        if operation != "flatten":
            plan.steps = count
    return plan


def _start(activation: Tensor, cells: Cells, plan: _Plan) -> Tensor:
    """(C n, …): the activation masked for each cell, and what the plan says behind it."""
    if plan.product is None:
        ablate = _dispatch.triton_kernel("ablate")
        return ablate(activation, cells.table, cells.ids, epilogue=(plan.norm, plan.activate))
    x = activation.flatten(1) if plan.flat else activation
    weight, bias, scale = plan.product.weight, plan.product.bias, None
    if plan.norm is not None:
        scale, shift = plan.norm
        bias = shift if bias is None else (bias.double() * scale + shift).float()
    options = {"scale": scale, "activate": plan.activate, "precision": _choose_precision(weight)}
    if x.ndim == 2 and cells.labels.ndim == 1:
        linear_cells = _dispatch.triton_kernel("linear_cells")
        return linear_cells(x, cells.labels, weight, bias, cells.ids.tolist(), **options)
    masked_pointwise = _dispatch.triton_kernel("masked_pointwise")
    return masked_pointwise(x, cells.table, cells.ids, weight, bias, **options)


def _choose_precision(weight: Tensor) -> str:
    """TF32 where PyTorch would take it for this layer: by default for convolutions alone."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if weight.ndim == 2 else backends.cudnn.conv
    return "tf32" if backend.fp32_precision == "tf32" else "tf32x3"


def _chain(trace: Trace, split: Split, values: Values) -> Iterator[tuple[int, _Operation]]:
    """The operations behind the cut, numbered from 1, while nothing else uses what they take."""
    node = split.cut
    for count, step in enumerate(split.tail, 1):
        if set(node.users) != {step.node}:
            return
        node = step.node
        yield count, _operation(trace, split, values, node)


def _operation(trace: Trace, split: Split, values: Values, node: fx.Node) -> _Operation:
    """What a node does to its first argument, if that is known, and the same for all stimuli."""
    if sets_switches(node):
        return None
    if node.op == "call_module":
        return _module(trace.module(node)) if len(node.args) == 1 and not node.kwargs else None
    function = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
    rest: tuple[Any, ...] = (node.args[1:], node.kwargs)
    operands: list[fx.Node] = []
    fx.node.map_arg(rest, operands.append)
    if function is None or any(x not in split.inputs or x in split.varying for x in operands):
        return None
    args, kwargs = fx.node.map_arg(rest, values.__getitem__)
    return function(*args, **kwargs)


def _module(module: nn.Module) -> _Operation:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    match module:
        case nn.Identity() | nn.Dropout() | nn.Dropout1d() | nn.Dropout2d() | nn.Dropout3d():
            operation: _Operation = "nothing"
        case nn.ReLU():
            operation = "relu"
        case nn.ReLU6():
            operation = "relu6"
        case nn.Flatten(start_dim=1, end_dim=-1):
            operation = "flatten"
        case nn.Linear(weight=weight, bias=bias):
            operation = _Product(weight, bias)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() as c:
            operation = _conv(c.weight, c.bias, c.stride, c.padding, groups=c.groups)
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() as b:
            operation = _batch_norm(b.running_mean, b.running_var, b.weight, b.bias, eps=b.eps)
        case _:
            return None
    # A class of someone's own may do more; PyTorch makes one where it parametrizes a module.
    return operation if type(module).__module__.startswith("torch.nn.modules.") else None


def _batch_norm(
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Operation:
    if training or mean is None or var is None:
        return None
    return _Norm(mean, var, weight, bias, eps)


def _conv(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Operation:
    def every(sizes: Any, wanted: int) -> bool:
        return all(k == wanted for k in (sizes if isinstance(sizes, (tuple, list)) else [sizes]))

    pointwise = every(tuple(weight.shape[2:]), 1) and every(stride, 1) and every(padding, 0)
    return _Product(weight, bias) if pointwise and groups == 1 else None


def _flatten(start_dim: int = 0, end_dim: int = -1) -> _Operation:
    return "flatten" if (start_dim, end_dim) == (1, -1) else None


def _relu(inplace: bool = False) -> _Operation:
    return "relu"


def _relu6(inplace: bool = False) -> _Operation:
    return "relu6"


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> _Operation:
    return None if training else "nothing"


_METHODS: dict[Any, Callable[..., _Operation]] = {
    "relu": _relu,
    "relu_": _relu,
    "flatten": _flatten,
}
_FUNCTIONS: dict[Any, Callable[..., _Operation]] = {
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.relu6: _relu6,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
    F.linear: _Product,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    torch.flatten: _flatten,
}
