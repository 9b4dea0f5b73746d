"""Set PyTorch's TF32 switches inside a context, and restore them exactly afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends
_CUDA = (_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn)
_CPU = (_backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn)
# Parents first: a switch set to "none" reads as its parent's value. `cudnn` is the parent of all of
# CUDA. The parent `mkldnn` is omitted: setting it also sets the topmost one (PyTorch 2.11 to 2.14).
_SWITCHES = (_backends, _backends.cudnn, *_CUDA, *_CPU)


@contextmanager
def set_tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid CUDA, inside a context, to round float32 products and convolutions to TF32.

    CPUs compute in float32 either way. PyTorch has these switches under old and new names and
    refuses to read the old ones if the two disagree (`torch.export` reads them), so both are set.

    Parameters
    ----------
    allowed : bool
    """
    before: list[str] = []
    legacy = None
    try:
        for switch in _SWITCHES:
            before.append(switch.fp32_precision)  # its own value: all parents are "none" by now
            switch.fp32_precision = "none"
        legacy = _read_legacy()
        _write_legacy("high" if allowed else "highest", allowed)
        for switch in _CUDA:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        for switch in _CPU:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if legacy is not None:
            _write_legacy(*legacy)
        for switch, value in zip(
            _SWITCHES, before, strict=False
        ):  # `before` is shorter if interrupted
            switch.fp32_precision = value


def _read_legacy() -> tuple[str, bool]:
    """Read the switches under their old names; all new ones must be "none"."""
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it disagrees with the new switches, which forbid TF32
        convolutions = True
    return torch.get_float32_matmul_precision(), convolutions


def _write_legacy(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
