"""Fuse the mask with the first operations after the layer, so that one kernel does both.

A chain of operations can be fused if no other operation uses the values in between. With one cell
per pass, the result must be bit-identical to a forward hook's, so only a ReLU or ReLU6 is fused
with the mask. With several cells per pass, the result agrees up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repsim_kernels import _dispatch
from repsim_kernels.forward.dataflow import Split, Step
from repsim_kernels.forward.masks import CellMasks
from repsim_kernels.forward.trace import Trace, Values, sets_switches


def uses_triton(activation: Tensor) -> bool:
    """Whether Triton kernels mask this activation, rather than PyTorch's operations."""
    return _dispatch.uses_triton("ablate", activation)


def run_fused(trace: Trace, split: Split, values: Values, cells: CellMasks) -> list[Step]:
    """Mask the activation in `values`, run what one kernel can fuse, and return the other steps.

    `values` keeps the values that those steps need.
    """
    plan = _plan_kernel(trace, split, values, several=len(cells.ids) > 1)
    return _skip_steps(split, plan.steps, values, _run_kernel(values[split.cut], cells, plan))


def _skip_steps(split: Split, count: int, values: Values, result: Tensor) -> list[Step]:
    """Put the result of a tail's first `count` steps into `values`, and return the other steps."""
    done, remaining = split.tail[:count], split.tail[count:]
    values[done[-1].node if done else split.cut] = result
    for step in done:
        for x in step.to_drop:
            values.pop(x, None)
    return remaining


@dataclass(frozen=True)
class PartitionedLinear:
    """A linear layer directly after the masks, for all cells of a partition in one product.

    With m_c zero on the neurons of cell c and one elsewhere, and a fill f, the layer computes
    W (x ⊙ m_c + f ⊙ (1 - m_c)) = W x - W ((x - f) ⊙ (1 - m_c)). Each column of W belongs to at
    most one cell, so all the second terms together cost one product.
    """

    split: Split
    steps: int  # steps of the tail that this replaces
    x: Tensor  # (n, p)
    removed: Tensor  # x less the fill, (n, p)
    cells: CellMasks
    weight: Tensor
    bias: Tensor | None

    def run(self, values: Values) -> list[Step]:
        """Compute the layer's output for all cells, and return the steps of the tail after it.

        `values` keeps the values that those steps need.
        """
        whole = F.linear(self.x, self.weight, self.bias)  # (n, k)
        masks = self.cells.make_masks()
        order = masks.nonzero()[:, 1]  # neurons, sorted by cell
        sizes = masks.sum(1).tolist()
        columns = self.removed.index_select(1, order).split(sizes, 1)
        out = whole.expand(len(sizes), *whole.shape).clone()  # (C, n, k)
        # In blocks of outputs, so that gathered weights fit in a cache and W is never copied whole.
        rows = max(1, _BLOCK_BYTES // (len(order) * self.weight.element_size()))
        for weights, part in zip(self.weight.split(rows), out.split(rows, 2), strict=True):
            pieces = weights.index_select(1, order).split(sizes, 1)
            for cell, x, w in zip(part, columns, pieces, strict=True):
                cell.addmm_(x, w.mT, alpha=-1)
        return _skip_steps(self.split, self.steps, values, out.flatten(0, 1))


_BLOCK_BYTES = 2**23  # of weights gathered in one block
# Gathering a column of the weights costs as much as its products with this number of rows.
_GATHER_ROWS = 300


def find_linear(
    trace: Trace, split: Split, values: Values, cells: CellMasks, n_cells: int
) -> PartitionedLinear | None:
    """Return the linear layer after the masks; None if there is none, or it would not pay off."""
    x, flat = values[split.cut], False
    if n_cells < 2 or cells.labels.ndim > 1 or (n_cells - 1) * len(x) <= _GATHER_ROWS:
        return None
    for steps, operation in _iter_chain(trace, split, values):
        if isinstance(operation, _Product) and operation.weight.ndim == 2:
            x = x.flatten(1) if flat else x
            weight = operation.weight
            fits = x.ndim == 2 and x.dtype == weight.dtype in (torch.float32, torch.float64)
            if not fits or torch.is_autocast_enabled(x.device.type):
                return None
            removed = x if cells.fill is None else x - cells.fill.reshape(x.shape)
            if not torch.isfinite(removed).all():  # a mask hides infinity; a sum makes it NaN
                return None
            return PartitionedLinear(split, steps, x, removed, cells, weight, operation.bias)
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

    def fold(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift, each rounded to float32 once."""
        scale = (self.var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.mean.double() * scale
        if self.bias is not None:
            shift = shift + self.bias.double()
        return scale.float(), shift.float()


@dataclass(frozen=True)
class _Product:
    """A linear layer or a 1x1 convolution."""

    weight: Tensor
    bias: Tensor | None = None

    def is_fusible(self, x: Tensor, flat: bool) -> bool:
        """Whether a kernel can compute it together with the mask of an activation."""
        if torch.is_autocast_enabled(x.device.type) or (flat and self.weight.ndim > 2):
            return False
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return _dispatch.uses_triton("masked_pointwise", x, *parameters)


_Operation = _Norm | _Product | Literal["relu", "relu6", "flatten", "nothing"] | None


@dataclass
class _KernelPlan:
    """The operations that one kernel does after the mask: flatten, product, norm, activation."""

    x: Tensor  # the activation
    several: bool  # more than one cell
    steps: int = 0  # steps of the tail that the kernel replaces
    flat: bool = False
    product: _Product | None = None
    norm: tuple[Tensor, Tensor] | None = None  # scale and shift
    activate: str = "none"

    def try_add(self, operation: _Operation) -> bool:
        """Try to add an operation after the earlier ones; return whether the kernel can do it."""
        begun = self.product is not None or self.norm is not None
        needs_product = self.flat and self.product is None  # a flatten is fused only with one
        if operation is None or self.activate != "none":
            return False
        if operation == "relu" or operation == "relu6":
            if needs_product:
                return False
            self.activate = operation
        elif not self.several:
            return False
        elif operation == "flatten":
            if begun or self.flat:
                return False
            self.flat = True
        elif isinstance(operation, _Product):
            if begun or not operation.is_fusible(self.x, self.flat):
                return False
            self.product = operation
        elif isinstance(operation, _Norm):
            if self.norm is not None or needs_product or self._last_dim_is_not_channels():
                return False
            self.norm = operation.fold()
        return True

    def _last_dim_is_not_channels(self) -> bool:
        """Whether a batch norm would use a dimension other than the linear layer's outputs."""
        linear = self.product is not None and self.product.weight.ndim == 2
        return linear and self.x.ndim > 2 and not self.flat


def _plan_kernel(trace: Trace, split: Split, values: Values, several: bool) -> _KernelPlan:
    plan = _KernelPlan(values[split.cut], several)
    for count, operation in _iter_chain(trace, split, values):
        if operation == "nothing":
            continue
        if not plan.try_add(operation):
            break
        if operation != "flatten":
            plan.steps = count
    return plan


def _run_kernel(activation: Tensor, cells: CellMasks, plan: _KernelPlan) -> Tensor:
    """Mask the activation for each cell, and run the planned operations on it: (C n, …)."""
    if plan.product is None:
        ablate = _dispatch.load_triton_kernel("ablate")
        return ablate(activation, cells.table, cells.ids, epilogue=(plan.norm, plan.activate))
    x = activation.flatten(1) if plan.flat else activation
    weight, bias, scale = plan.product.weight, plan.product.bias, None
    if plan.norm is not None:
        scale, shift = plan.norm
        bias = shift if bias is None else (bias.double() * scale + shift).float()
    options = {"scale": scale, "activate": plan.activate, "precision": _choose_precision(weight)}
    if x.ndim == 2 and cells.labels.ndim == 1:
        linear_cells = _dispatch.load_triton_kernel("linear_cells")
        return linear_cells(x, cells.labels, weight, bias, cells.ids.tolist(), **options)
    masked_pointwise = _dispatch.load_triton_kernel("masked_pointwise")
    return masked_pointwise(x, cells.table, cells.ids, weight, bias, **options)


def _choose_precision(weight: Tensor) -> str:
    """Return "tf32" if PyTorch would use it here: by default, for convolutions only."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if weight.ndim == 2 else backends.cudnn.conv
    return "tf32" if backend.fp32_precision == "tf32" else "tf32x3"


def _iter_chain(trace: Trace, split: Split, values: Values) -> Iterator[tuple[int, _Operation]]:
    """Yield the operations after the cut, numbered from 1, until another one uses their input."""
    node = split.cut
    for count, step in enumerate(split.tail, 1):
        if set(node.users) != {step.node}:
            return
        node = step.node
        yield count, _classify(trace, split, values, node)


def _classify(trace: Trace, split: Split, values: Values, node: fx.Node) -> _Operation:
    """Return what a node does to its first argument; None if unknown or image-dependent."""
    if sets_switches(node):
        return None
    if node.op == "call_module":
        has_options = len(node.args) > 1 or node.kwargs
        return None if has_options else _classify_module(trace.get_module(node))
    classify = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
    options: tuple[Any, ...] = (node.args[1:], node.kwargs)
    operands: list[fx.Node] = []
    fx.node.map_arg(options, operands.append)
    per_image = split.per_image_inputs
    if classify is None or any(x not in split.inputs or x in per_image for x in operands):
        return None
    args, kwargs = fx.node.map_arg(options, values.__getitem__)
    return classify(*args, **kwargs)


def _classify_module(module: nn.Module) -> _Operation:
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
            operation = _classify_conv(c.weight, c.bias, c.stride, c.padding, groups=c.groups)
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() as b:
            operation = _classify_batch_norm(
                b.running_mean, b.running_var, b.weight, b.bias, eps=b.eps
            )
        case _:
            return None
    # A subclass defined elsewhere may do more; PyTorch creates one when it parametrizes a module.
    return operation if type(module).__module__.startswith("torch.nn.modules.") else None


def _classify_batch_norm(
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


def _classify_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Operation:
    def all_equal(sizes: Any, value: int) -> bool:
        return all(k == value for k in (sizes if isinstance(sizes, (tuple, list)) else [sizes]))

    pointwise = (
        all_equal(tuple(weight.shape[2:]), 1) and all_equal(stride, 1) and all_equal(padding, 0)
    )
    return _Product(weight, bias) if pointwise and groups == 1 else None


def _classify_flatten(start_dim: int = 0, end_dim: int = -1) -> _Operation:
    return "flatten" if (start_dim, end_dim) == (1, -1) else None


def _classify_relu(inplace: bool = False) -> _Operation:
    return "relu"


def _classify_relu6(inplace: bool = False) -> _Operation:
    return "relu6"


def _classify_dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> _Operation:
    return None if training else "nothing"


_METHODS: dict[Any, Callable[..., _Operation]] = {
    "relu": _classify_relu,
    "relu_": _classify_relu,
    "flatten": _classify_flatten,
}
_FUNCTIONS: dict[Any, Callable[..., _Operation]] = {
    F.relu: _classify_relu,
    torch.relu: _classify_relu,
    torch.relu_: _classify_relu,
    F.relu6: _classify_relu6,
    F.dropout: _classify_dropout,
    F.batch_norm: _classify_batch_norm,
    F.linear: _Product,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _classify_conv),
    torch.flatten: _classify_flatten,
}
