"""A cut network held against passes of the network itself, under a forward hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from repsim_kernels.forward.dataflow import Split, check_batch, check_units
from repsim_kernels.forward.fusion import Cells
from repsim_kernels.forward.passes import copied, mask_for_cells, run_head, run_tail
from repsim_kernels.forward.trace import Trace


@dataclass
class Passes:
    """What the network itself gives for some images.

    Attributes
    ----------
    plain : tensor, (n, …)
        Without a hook. A hook can change it to rounding: PyTorch's fused transformer layers run
        operation by operation under one.
    same, half : tensor, (n, …)
        Under a hook that returns a clone of the layer's output, and one that sets every second
        unit of it to zero.
    """

    plain: Tensor
    same: Tensor
    half: Tensor


@dataclass
class Agreement:
    """How a cut network compares with `Passes`."""

    exact: bool  # bit for bit, under both hooks
    close: bool  # up to rounding
    plain: bool  # a hook that changes nothing leaves the output bit-identical
    together: bool  # cells may run together


def run_plain(model: nn.Module, images: Tensor) -> Tensor:
    """Run the network itself; raises LayerError where it gives no tensor (n, …)."""
    return check_batch(model(copied(images)), images, "model: it").detach()


def run_passes(
    model: nn.Module, layer: str, module: nn.Module, images: Tensor, plain: Tensor
) -> Passes:
    """Run the network under two hooks on a layer.

    Raises LayerError where the layer gives no tensor (n, …).
    """
    same = _run_under_hook(model, layer, module, images, torch.clone)
    return Passes(plain, same, run_half(model, layer, module, images))


def run_half(model: nn.Module, layer: str, module: nn.Module, images: Tensor) -> Tensor:
    """Run the network under a hook that sets every second unit of the layer to zero."""

    def mask(out: Tensor) -> Tensor:
        return mask_for_cells(out, _cells(out, 1).masks().view(1, *out.shape[1:]))

    return _run_under_hook(model, layer, module, images, mask)


def compare(trace: Trace, part: Split, images: Tensor, wanted: Passes) -> Agreement:
    """Hold a cut network against passes of the network itself."""
    state = run_head(trace, part, images)
    act = state.activation
    ablated, same = run_tail(state, _cells(act, 1)), run_tail(state)
    agreement = Agreement(
        exact=torch.equal(ablated, wanted.half) and torch.equal(same, wanted.same),
        close=is_close(ablated, wanted.half) and is_close(same, wanted.same),
        plain=torch.equal(same, wanted.plain),
        together=False,
    )
    try:
        both = run_tail(state, _cells(act, 2))
    except Exception:  # whatever comes of a batch size that is fixed somewhere
        return agreement
    # TF32 differs by 1e-3 from one batch size to another.
    least = 1e-2 if act.device.type == "cuda" else 0.0
    agreement.together = is_close(both, torch.cat([ablated, same]), least)
    return agreement


def is_close(got: Tensor, want: Tensor, least: float = 0.0) -> bool:
    """Equal up to rounding, at the scale of the largest value."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point() or not want.numel():
        return torch.equal(got, want)
    slack = max(least, torch.finfo(want.dtype).eps ** 0.5)
    scale = float(want.abs().nan_to_num(0, 0).max())
    return torch.allclose(got, want, rtol=0, atol=slack * scale, equal_nan=True)


def _cells(out: Tensor, count: int) -> Cells:
    """The first `count` of two cells: every second unit, and no unit."""
    labels = -(np.arange(out[0].numel()) % 2)
    table = torch.from_numpy(labels).to(out.device)
    return Cells(labels, table, torch.arange(count, device=out.device))


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
        return run_plain(model, images)
    finally:
        handle.remove()
