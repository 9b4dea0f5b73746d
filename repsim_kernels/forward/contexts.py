"""PyTorch's switches: those that a network sets in its forward pass, and those set around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

_DEVICES = ("cpu", "cuda")
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


class Switches(NamedTuple):
    """Switches that decide what an operation computes.

    A trace lists the operations of a forward pass without its ``with`` blocks, so each operation
    carries the switches that it ran under.
    """

    autocast: tuple[tuple[bool, torch.dtype], ...]  # enabled and dtype, for each of _DEVICES
    attention: tuple[bool, ...]  # whether scaled_dot_product_attention may use each of _ATTENTION
    dtype: torch.dtype  # default dtype of new tensors

    def with_autocast(self, device: str, dtype: torch.dtype | None, enabled: bool) -> Switches:
        states = dict(zip(_DEVICES, self.autocast, strict=True))
        if device in states:
            states[device] = enabled, dtype or states[device][1]
        return self._replace(autocast=tuple(states.values()))


def read_switches() -> Switches:
    """Return the current switches."""
    return Switches(
        autocast=tuple(
            (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES
        ),
        attention=tuple(_get_cuda_function(f"{name}_sdp_enabled")() for name in _ATTENTION),
        dtype=torch.get_default_dtype(),
    )


@contextmanager
def set_switches(switches: Switches) -> Iterator[None]:
    """Set the switches that differ from the current ones, and restore them on exit."""
    current = read_switches()
    with ExitStack() as stack:
        for device, new, old in zip(_DEVICES, switches.autocast, current.autocast, strict=True):
            if new != old:
                enabled, dtype = new
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        for name, on, was_on in zip(_ATTENTION, switches.attention, current.attention, strict=True):
            if on != was_on:
                stack.callback(_get_cuda_function(f"enable_{name}_sdp"), was_on)
                _get_cuda_function(f"enable_{name}_sdp")(on)
        if switches.dtype != current.dtype:
            stack.callback(torch.set_default_dtype, current.dtype)
            torch.set_default_dtype(switches.dtype)
        yield


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run without gradients or compilers, with PyTorch counting writes to tensors."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # inference tensors don't count writes
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # it loads slowly; without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def allow_tracing() -> Iterator[None]:
    """Let torch.fx trace into compiled modules and into PyTorch's transformer layers.

    By default torch.fx refuses compiled modules. Transformer layers check tensors to choose their
    fast path. torch.fx can't evaluate these checks, so the fast path is switched off.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, enabled)
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:
            config: Any = sys.modules["torch._dynamo"].config
            stack.enter_context(config.patch(error_on_nested_fx_trace=False))
        yield


def _get_cuda_function(name: str) -> Any:
    return getattr(torch.backends.cuda, name)
