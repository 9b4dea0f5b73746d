"""Verify a cut network against passes of the network itself under a forward hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.errors import LayerError
from repsim_kernels.forward.dataflow import Split, check_batch, check_units
from repsim_kernels.forward.inputs import Inputs, Network
from repsim_kernels.forward.masks import CellMasks, mask_for_cells
from repsim_kernels.forward.memory import Batch
from repsim_kernels.forward.passes import run_head, run_tail
from repsim_kernels.forward.sites import Site, list_paths
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
    batchable: bool  # passes of two cells, or of one image, give what each cell gives alone


def run_intact(network: Network, inputs: Inputs) -> Tensor:
    """Run the network without a hook; raises LayerError if it returns no tensor (n, …)."""
    return check_logits(network.run(inputs), inputs).detach()


def check_logits(value: Any, inputs: Inputs) -> Tensor:
    """Check that a network returns a tensor (n, …)."""
    paths = list_paths(value)
    if isinstance(value, Tensor) or not paths:
        return check_batch(value, len(inputs), "model: it")
    path = "logits" if "logits" in paths else paths[0]
    stars = "" if inputs.form is None else "*" if isinstance(inputs.form, int) else "**"
    by_attribute = path.isidentifier() and hasattr(value, path)
    part = f".{path}" if by_attribute else f"[{int(path) if path.isdecimal() else path!r}]"
    raise LayerError(
        f"model: it returns {type(value).__name__}; expected a tensor (n, …): pass "
        f"call=lambda model, inputs: model({stars}inputs){part}"
    )


def run_references(
    network: Network, site: Site, inputs: Inputs, intact: Tensor
) -> ReferenceOutputs:
    """Run the network under two hooks on a layer.

    Raises LayerError if the layer returns no tensor (n, …).
    """
    unmasked = _run_under_hook(network, site, inputs, torch.clone)
    return ReferenceOutputs(intact, unmasked, run_half_masked(network, site, inputs))


def run_half_masked(network: Network, site: Site, inputs: Inputs) -> Tensor:
    """Run the network under a hook that sets every second neuron of the layer to zero."""

    def mask(out: Tensor) -> Tensor:
        return mask_for_cells(out, _make_cells(out, 1).make_masks().view(1, *out.shape[1:]))

    return _run_under_hook(network, site, inputs, mask)


def verify_cut(trace: Trace, split: Split, inputs: Inputs, expected: ReferenceOutputs) -> Agreement:
    """Compare a cut network with the network's own outputs."""
    state = run_head(trace, split, inputs)
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
        one_image = run_tail(state, _make_cells(act, 1), Batch([0], 0, 1)) if split.sizes else None
    except Exception:  # a batch size that is fixed in the model can cause any error
        return agreement
    # TF32 differs by 1e-3 from one batch size to the next.
    slack = 1e-2 if act.device.type == "cuda" else 0.0
    agreement.batchable = is_close(two_cells, torch.cat([ablated, unmasked]), slack) and (
        one_image is None or is_close(one_image, ablated[:1], slack)
    )
    return agreement


def is_close(actual: Tensor, expected: Tensor, min_slack: float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest value."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if torch.equal(actual, expected):  # far cheaper than what follows
        return True
    if not expected.is_floating_point():
        return False
    slack = max(min_slack, torch.finfo(expected.dtype).eps ** 0.5)
    scale = float(expected.abs().nan_to_num(0, 0).max())
    return torch.allclose(actual, expected, rtol=0, atol=slack * scale, equal_nan=True)


def _make_cells(out: Tensor, count: int) -> CellMasks:
    """Return the first `count` of two cells: one of every second neuron, and an empty one."""
    labels = -(np.arange(out[0].numel()) % 2)
    table = torch.from_numpy(labels).to(out.device)
    return CellMasks(labels, table, torch.arange(count, device=out.device))


def _run_under_hook(
    network: Network, site: Site, inputs: Inputs, change: Callable[[Tensor], Tensor]
) -> Tensor:
    calls = 0

    def hook(out: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return change(check_units(out, len(inputs), site.layer))

    with site.replace(hook):
        out = run_intact(network, inputs)
    if not calls and not site.is_plain:
        raise LayerError(f"layer: {site.layer!r} is never called; expected one call in a pass")
    return out
