"""Verify a cut network against passes of the network itself under a forward hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from repsim_kernels.forward.dataflow import Split, check_batch, check_units
from repsim_kernels.forward.masks import CellMasks, mask_for_cells
from repsim_kernels.forward.passes import copy_with_strides, run_head, run_tail
from repsim_kernels.forward.trace import Trace


@dataclass
class ReferenceOutputs:
    """The network's own outputs for some images.

    Attributes
    ----------
    intact : tensor, (n, …)
        Without a hook. A hook can change it by rounding: PyTorch's fused transformer layers run
        operation by operation under one.
    unmasked : tensor, (n, …)
        Under a hook that returns a clone of the layer's output.
    half_masked : tensor, (n, …)
        Under a hook that sets every second neuron of the layer to zero.
    """

    intact: Tensor
    unmasked: Tensor
    half_masked: Tensor


@dataclass
class Agreement:
    """How a cut network compares with `ReferenceOutputs`."""

    exact: bool  # bit-identical under both hooks
    close: bool  # equal up to rounding under both hooks
    hook_keeps_bits: bool  # a hook that changes nothing leaves the output bit-identical
    batchable: bool  # two cells in one pass give what each one gives alone


def run_intact(model: nn.Module, images: Tensor) -> Tensor:
    """Run the network without a hook; raises LayerError if it returns no tensor (n, …)."""
    return check_batch(model(copy_with_strides(images)), images, "model: it").detach()


def run_references(
    model: nn.Module, layer: str, module: nn.Module, images: Tensor, intact: Tensor
) -> ReferenceOutputs:
    """Run the network under two hooks on a layer.

    Raises LayerError if the layer returns no tensor (n, …).
    """
    unmasked = _run_under_hook(model, layer, module, images, torch.clone)
    return ReferenceOutputs(intact, unmasked, run_half_masked(model, layer, module, images))


def run_half_masked(model: nn.Module, layer: str, module: nn.Module, images: Tensor) -> Tensor:
    """Run the network under a hook that sets every second neuron of the layer to zero."""

    def mask(out: Tensor) -> Tensor:
        return mask_for_cells(out, _make_cells(out, 1).make_masks().view(1, *out.shape[1:]))

    return _run_under_hook(model, layer, module, images, mask)


def verify_cut(trace: Trace, split: Split, images: Tensor, expected: ReferenceOutputs) -> Agreement:
    """Compare a cut network with the network's own outputs."""
    state = run_head(trace, split, images)
    act = state.activation
    ablated, unmasked = run_tail(state, _make_cells(act, 1)), run_tail(state)
    agreement = Agreement(
        exact=torch.equal(ablated, expected.half_masked)
        and torch.equal(unmasked, expected.unmasked),
        close=is_close(ablated, expected.half_masked) and is_close(unmasked, expected.unmasked),
        hook_keeps_bits=torch.equal(unmasked, expected.intact),
        batchable=False,
    )
    try:
        two_cells = run_tail(state, _make_cells(act, 2))
    except Exception:  # a batch size that is fixed in the model can cause any error
        return agreement
    # TF32 differs by 1e-3 from one batch size to the next.
    slack = 1e-2 if act.device.type == "cuda" else 0.0
    agreement.batchable = is_close(two_cells, torch.cat([ablated, unmasked]), slack)
    return agreement


def is_close(actual: Tensor, expected: Tensor, min_slack: float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest value."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(actual, expected)
    slack = max(min_slack, torch.finfo(expected.dtype).eps ** 0.5)
    scale = float(expected.abs().nan_to_num(0, 0).max())
    return torch.allclose(actual, expected, rtol=0, atol=slack * scale, equal_nan=True)


def _make_cells(out: Tensor, count: int) -> CellMasks:
    """Return the first `count` of two cells: one of every second neuron, and an empty one."""
    labels = -(np.arange(out[0].numel()) % 2)
    table = torch.from_numpy(labels).to(out.device)
    return CellMasks(labels, table, torch.arange(count, device=out.device))


def _run_under_hook(
    model: nn.Module,
    layer: str,
    module: nn.Module,
    images: Tensor,
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    def hook(_module: nn.Module, _inputs: object, out: object) -> Tensor:
        return change(check_units(out, images, layer))

    handle = module.register_forward_hook(hook)
    try:
        return run_intact(model, images)
    finally:
        handle.remove()
