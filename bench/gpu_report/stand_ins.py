"""Run the report's calls at full size on a CPU, computing only what decides which kernels start.

No kernel runs, and large products and decompositions return values that have the right shapes
and are harmless: a Gram matrix, for example, stays positive definite.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_report.variants import Variant, record_launches
from repsim_kernels import _dispatch
from repsim_kernels.kernels.triton import _launch

_DECOMPOSITIONS = (
    *("_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex", "linalg_qr", "linalg_inv_ex"),
    *("linalg_solve_triangular", "_linalg_solve_ex", "cholesky_solve", "cholesky_inverse"),
)
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_LARGEST = 2e7  # multiplications of a call that is computed


class _StandIns(TorchDispatchMode):
    """Replaces the results of operations that would take long."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _DECOMPOSITIONS or name in _PRODUCTS:
            tensors = [a for a in args if isinstance(a, Tensor)]
            if _count_multiplications(name, tensors) > _LARGEST:
                return _replace_result(func, name, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _count_multiplications(name: str, tensors: list[Tensor]) -> float:
    """Return roughly how many multiplications an operation needs."""
    a, b = tensors[-2:] if len(tensors) > 1 else (tensors[0], tensors[0])
    return a.numel() * b.shape[-1] if a.ndim > 1 else 0


def _replace_result(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    meta = func(*map(to_meta, args), **{k: to_meta(v) for k, v in kwargs.items()})
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # all of it is filled below
    try:
        if isinstance(meta, Tensor):
            return _fill(torch.empty_like(meta, device="cpu"))
        return tuple(_fill(torch.empty_like(part, device="cpu")) for part in meta)
    finally:
        settings.fill_uninitialized_memory = True


def _fill(t: Tensor) -> Tensor:
    """Fill a tensor: square matrices with small multiples of the identity, others with noise."""
    if not t.is_floating_point():
        return t.zero_()
    if t.ndim > 1 and t.shape[-1] == t.shape[-2]:
        # A sum over the batch remains below the identity.
        t.zero_().diagonal(dim1=-2, dim2=-1).fill_(0.5 / math.prod(t.shape[:-2]))
        return t
    if t.ndim and t.shape[-1] > 1:
        return t.copy_(torch.linspace(0.1, 1, t.shape[-1], dtype=t.dtype))
    return t.fill_(0.5)


def _is_unwritten(t: Tensor) -> bool:
    return bool(t.is_floating_point() and t.numel() and t[(0,) * t.ndim].isnan())


@contextmanager
def record_at_full_size(variants: dict[Variant, None]) -> Iterator[None]:
    """Record the launches of calls in the ``with`` block as if CPU tensors were on a GPU."""
    explain = _launch.unsupported
    choose = _dispatch.choose_backend

    def explain_except_device(*tensors: Tensor) -> str | None:
        with (
            patch.object(_launch, "is_interpreted", lambda: True),
            patch.object(_launch, "interpreter_unsupported", lambda: None),
        ):
            return explain(*tensors)

    def choose_as_on_gpu(operation: str, backend: str | None, source: Any, *xs: Any) -> str:
        if backend is None and _dispatch._explain_unsupported(operation, "triton", *xs) is None:
            backend = "triton"
        return choose(operation, backend, source, *xs)

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        for a in arguments:
            if isinstance(a, Tensor) and _is_unwritten(a):
                _fill(a)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(patch.object(_launch, "launch", launch))
            stack.enter_context(record_launches(variants))
            stack.enter_context(patch.object(_launch, "unsupported", explain_except_device))
            stack.enter_context(patch.object(_dispatch, "choose_backend", choose_as_on_gpu))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_StandIns())  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.use_deterministic_algorithms(before)
