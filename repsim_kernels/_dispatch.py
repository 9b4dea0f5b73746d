"""Which function serves an operation on which backend: one table, and the way through it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels import _arrays, _options
from repsim_kernels._arrays import Source
from repsim_kernels._operations import BACKENDS, OPERATIONS
from repsim_kernels.errors import BackendUnavailable, ConvergenceError

TABLE: dict[tuple[str, str], str] = {
    (op.name, backend): op.target(backend)
    for op in OPERATIONS
    if op.kernel is None
    for backend in op.backends
}
_TAKES_BATCHES = {(op.name, backend) for op in OPERATIONS for backend in op.batched}
# With the kernels that `forward` runs in place of a network's own operations, which are no
# functions of the package. Where `masked_pointwise` can run, `linear_cells` can.
_TARGETS = TABLE | {
    (op, "triton"): f"repsim_kernels.kernels.triton.{op}:{op}"
    for op in ("ablate", "masked_pointwise", "linear_cells")
}
# Where arrays on a GPU go, if there is a kernel that takes them; else to torch.
_ON_GPU = {"cupy": ("cupy", "triton"), "torch": ("triton", "cupy")}


@functools.cache
def _load(operation: str, backend: str) -> Callable[..., Any]:
    module, _, name = _TARGETS[operation, backend].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return _on_numpy(function) if backend == "reference" else function


def _on_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of NumPy arrays take tensors."""

    @functools.wraps(function)
    def run(*xs: Any, **options: Any) -> Any:
        options = {name: _arrays.to_numpy(value) for name, value in options.items()}
        return function(*map(_arrays.to_numpy, xs), **options)

    return run


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def unavailable(backend: str) -> str | None:
    """Why a backend can't serve anything on this machine; None if it can."""
    if backend == "cupy":
        from repsim_kernels.kernels.cupy import module

        return module.unsupported()
    if backend == "triton":
        if why := _triton_missing():
            return why
        from repsim_kernels.kernels.triton import _launch

        if _launch.interpreted():
            return _launch.interpreter_unsupported()
        return None if torch.cuda.is_available() else "there is no CUDA device"
    return None


def named_backend(backend: str | None = None) -> str | None:
    """The backend that an argument names, else REPSIM_BACKEND; None where neither names one."""
    if backend is not None:
        return _options.option(backend, "backend", BACKENDS)
    named = os.environ.get("REPSIM_BACKEND")
    return _options.option(named, "REPSIM_BACKEND", BACKENDS) if named else None


def choose(operation: str, backend: str | None, source: Source, *xs: Any) -> str:
    """The backend that serves an operation on tensors: `backend`, else REPSIM_BACKEND.

    Where neither names one, kernels that take arrays on the source's GPU, else torch.
    """
    named = named_backend(backend)
    if named is None:
        if source.device.startswith("cuda"):
            for candidate in _ON_GPU[source.kind]:
                if _why_not(operation, candidate, *xs) is None:
                    return candidate
        return "torch"
    why = _why_not(operation, named, *xs)
    if why is not None:
        raise BackendUnavailable(f"backend {named!r} can't serve {operation}: {why}")
    return named


def _why_not(operation: str, backend: str, *xs: Any) -> str | None:
    """Why a backend can't serve an operation on these tensors; None if it can."""
    target = _TARGETS.get((operation, backend))
    if target is None:
        return "it has no kernel for this operation"
    if backend in ("reference", "torch"):
        return None
    if backend == "triton" and (why := _triton_missing()):
        return why
    module = importlib.import_module(target.partition(":")[0])
    reason: str | None = module.unsupported(*xs)
    return reason


def uses_triton(operation: str, *tensors: Any) -> bool:
    """Whether `choose` picks Triton for an operation of `forward` on tensors.

    Where a backend is named that can't serve it, PyTorch does: the network runs either way.
    """
    try:
        source = Source("torch", str(tensors[0].device))
        return choose(operation, None, source, *tensors) == "triton"
    except BackendUnavailable:
        return False


def triton_kernel(operation: str) -> Callable[..., Any]:
    """The launcher of an operation that `uses_triton`."""
    return _load(operation, "triton")


def call(
    operation: str,
    backend: str | None,
    source: Source,
    *xs: Any,
    precision: str | None = None,
    **options: Any,
) -> Any:
    """Run an operation on checked arguments; the result is of the kind and device of `source`.

    Each of `xs` is a tensor (…, n, p), or a list of them (n, p_i) or None for operations on lists.
    Where the kernel takes no batches, the leading dimensions are looped over and the results
    stacked. `options` go to the kernel as they are; `precision` only where it can be chosen.
    """
    chosen = choose(operation, backend, source, *xs)
    if precision is not None and chosen == "triton":
        options["precision"] = precision
    function = _load(operation, chosen)
    if (operation, chosen) not in _TAKES_BATCHES:
        function = functools.partial(_over_batches, function)
    with _own_settings(), _own_errors(operation, options):
        result = function(*xs, **options)
    return source.restore(result)


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Without the caller's autocast, and without warnings of NaN, which says "not defined"."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(divide="ignore", invalid="ignore"))
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _own_errors(operation: str, options: dict[str, Any]) -> Iterator[None]:
    """Turn the LinAlgError of NumPy or PyTorch into the package's own."""
    try:
        yield
    except Exception as error:
        if not type(error).__name__.endswith("LinAlgError"):
            raise
        given = (k for k in ("penalty", "ridge") if isinstance(options.get(k), float))
        name = next((k for k in given if options[k] > 0), None)
        if name is None or "converge" in str(error):
            line = _options.one_line(str(error), 200)
            raise ConvergenceError(f"{operation}: {line}") from error
        raise ConvergenceError(
            f"{name}: {options[name]:g} leaves a matrix singular to rounding; expected a larger one"
        ) from error


def _over_batches(function: Callable[..., Any], *xs: Any, **options: Any) -> Any:
    """Run a function of single representations, or of lists of them, on each item of a batch."""
    if all(not isinstance(x, Tensor) or x.ndim == 2 for x in xs):
        return function(*xs, **options)
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in xs))
    whole = [x.expand(lead + x.shape[-2:]) for x in xs]
    results = [function(*(x[i] for x in whole), **options) for i in np.ndindex(*lead)]
    return _stack(results, lead)


def _stack(results: list[Any], lead: tuple[int, ...]) -> Any:
    first = results[0]
    if isinstance(first, dict):
        return {key: _stack([r[key] for r in results], lead) for key in first}
    if isinstance(first, tuple):
        return _arrays.rebuild(first, (_stack(list(r), lead) for r in zip(*results, strict=True)))
    stacked = torch.stack(results) if isinstance(first, Tensor) else np.stack(results)
    return stacked.reshape(lead + np.shape(first))


def show_config() -> None:
    """Print the versions, the devices and which backends are usable, or why they are not."""
    import repsim_kernels

    versions = {"repsim_kernels": repsim_kernels, "numpy": np, "torch": torch}
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"threads {torch.get_num_threads()}, CUDA device: {cuda}")
    for backend in BACKENDS:
        reason = unavailable(backend)
        count = sum(b == backend for _, b in TABLE)
        usable = f"usable, {count} operations"
        if backend == "cupy" and reason is None:
            from repsim_kernels.kernels.cupy import module

            usable += f"; {module.how()}"
        print(f"  {backend:<10}" + (usable if reason is None else f"no: {reason}"))
