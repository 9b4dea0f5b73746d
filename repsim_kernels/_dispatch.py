"""The dispatcher: chooses the backend of an operation, and runs its kernel."""

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
from repsim_kernels._operations import BACKENDS, OPERATIONS, Operation
from repsim_kernels.errors import BackendUnavailable, ConvergenceError

KERNELS: dict[tuple[str, str], str] = {
    (op.name, backend): op.target(backend)
    for op in OPERATIONS
    if op.kernel is None
    for backend in op.backends
}
"""Where the kernel of each operation and backend is, as "module:function"."""

# Internal operations; `gram_products` and `unpack_gram` take the Grams of their own backend.
_INTERNAL_OPERATIONS = (
    Operation(
        "layer_grams",
        "layer_grams",
        ("reference", "torch", "triton"),
        with_precision=("torch", "triton"),
    ),
    Operation("gram_products", "layer_grams", ("reference", "torch", "triton")),
    Operation("unpack_gram", "layer_grams", ("reference", "torch")),
    Operation("permuted_products", "calibration", ("reference", "torch", "triton")),
    Operation("find_candidates", "nearest", ("torch", "triton"), batched=("torch", "triton")),
    Operation("searchlight_rdms", "searchlight", ("torch", "triton"), batched=("torch", "triton")),
    Operation("calibrate_by_moments", "calibration", ("torch",), with_precision=("torch",)),
    *(
        Operation(f"{name}_gradients", "gradients", ("torch",))
        for name in ("cka", "procrustes", "rsa")
    ),
)
# Internal operations that kernels of the torch backend take as arguments, so that Triton can serve
# them on a GPU.
_FIND, _MULTIPLY = {"find": "find_candidates"}, {"multiply": "permuted_products"}
_INNER = {
    **{op.name: _FIND for op in OPERATIONS if op.family in ("neighbours", "pairwise")},
    "calibrate": _FIND | _MULTIPLY,
    "calibrate_by_moments": _MULTIPLY,
    "searchlight": {"compute": "searchlight_rdms"},
}
_ALL_OPERATIONS = (*OPERATIONS, *_INTERNAL_OPERATIONS)
_BATCHED = {(op.name, backend) for op in _ALL_OPERATIONS for backend in op.batched}
_WITH_PRECISION = {(op.name, backend) for op in _ALL_OPERATIONS for backend in op.with_precision}
# `forward` also runs kernels that are not public operations, in place of a network's own layers.
# Where `masked_pointwise` can run, so can `linear_cells`.
_ALL_KERNELS = (
    KERNELS
    | {
        (op, "triton"): f"repsim_kernels.kernels.triton.{module}:{op}"
        for op, module in (
            ("ablate", "masked_copies"),
            ("masked_pointwise", "masked_pointwise"),
            ("linear_cells", "linear_cells"),
        )
    }
    | {
        (op.name, backend): op.target(backend)
        for op in _INTERNAL_OPERATIONS
        for backend in op.backends
    }
)
_BACKENDS: Any = torch.backends
# Backends to try for arrays on a GPU, by library and in this order; torch serves the rest.
_GPU_BACKENDS = {"cupy": ("cupy", "triton"), "torch": ("triton", "cupy")}


@functools.cache
def _load_kernel(operation: str, backend: str) -> Callable[..., Any]:
    """Import the function that serves an operation on a backend."""
    module, _, name = _ALL_KERNELS[operation, backend].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return _accept_tensors(function) if backend == "reference" else function


def _accept_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of NumPy arrays so that it accepts tensors."""

    @functools.wraps(function)
    def run(*xs: Any, **options: Any) -> Any:
        options = {name: _arrays.to_numpy(value) for name, value in options.items()}
        return function(*map(_arrays.to_numpy, xs), **options)

    return run


def _explain_no_triton() -> str | None:
    """Return why Triton can't be used; None if it is installed."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def unavailable_reason(backend: str) -> str | None:
    """Return why a backend can't be used on this machine; None if it can."""
    if backend == "cupy":
        from repsim_kernels.kernels.cupy import module

        return module.unsupported()
    if backend == "triton":
        if reason := _explain_no_triton():
            return reason
        from repsim_kernels.kernels.triton import _launch

        if _launch.is_interpreted():
            return _launch.interpreter_unsupported()
        return None if torch.cuda.is_available() else "there is no CUDA device"
    return None


def get_requested_backend(backend: str | None = None) -> str | None:
    """Return the backend that the argument or REPSIM_BACKEND names; None if neither does."""
    if backend is not None:
        return _options.check_choice(backend, "backend", BACKENDS)
    variable = os.environ.get("REPSIM_BACKEND")
    return _options.check_choice(variable, "REPSIM_BACKEND", BACKENDS) if variable else None


def choose_backend(operation: str, backend: str | None, source: Source, *xs: Any) -> str:
    """Return the backend that serves an operation on the tensors `xs`.

    The argument takes precedence over REPSIM_BACKEND; BackendUnavailable if the named backend can't
    serve the operation. If neither names one, arrays on a GPU get the first of `_GPU_BACKENDS` that
    has a kernel for them, and all others torch.
    """
    requested = get_requested_backend(backend)
    if requested is None:
        if source.device.startswith("cuda"):
            for candidate in _GPU_BACKENDS[source.library]:
                if _explain_unsupported(operation, candidate, *xs) is None:
                    return candidate
        return "torch"
    reason = _explain_unsupported(operation, requested, *xs)
    if reason is not None:
        name = "REPSIM_BACKEND" if backend is None else "backend"
        raise BackendUnavailable(f"{name}: {requested!r} can't serve {operation}: {reason}")
    return requested


def _explain_unsupported(operation: str, backend: str, *xs: Any) -> str | None:
    """Return why a backend can't serve an operation on these tensors; None if it can."""
    target = _ALL_KERNELS.get((operation, backend))
    if target is None:
        return "it has no kernel for this operation"
    if backend in ("reference", "torch"):
        return None
    if backend == "triton" and (reason := _explain_no_triton()):
        return reason
    module = importlib.import_module(target.partition(":")[0])
    unsupported: str | None = module.unsupported(*xs)
    return unsupported


def uses_triton(operation: str, *tensors: Any) -> bool:
    """Whether `choose_backend` picks Triton for an operation of `forward` on these tensors.

    False if REPSIM_BACKEND names a backend that can't serve it; PyTorch then runs the network.
    """
    try:
        source = Source("torch", str(tensors[0].device))
        return choose_backend(operation, None, source, *tensors) == "triton"
    except BackendUnavailable:
        return False


def load_triton_kernel(operation: str) -> Callable[..., Any]:
    """Return the launcher of a Triton kernel; call it only where `uses_triton` is true."""
    return _load_kernel(operation, "triton")


def call(
    operation: str,
    backend: str | None,
    source: Source,
    *xs: Any,
    precision: str | None = None,
    **options: Any,
) -> Any:
    """Run an operation on checked arguments; return the result as arrays of `source`.

    Each of `xs` is a tensor (…, n, p); for operations on lists, a list of tensors (n, p_i) or None.
    If the kernel doesn't accept batches, it runs on each item and the results are stacked.
    `options` are passed to the kernel unchanged, `precision` only if it has a choice.
    """
    chosen = choose_backend(operation, backend, source, *xs)
    if precision is not None and (operation, chosen) in _WITH_PRECISION:
        options["precision"] = precision
    if chosen == "torch" and operation in _INNER:
        first = xs[0] if isinstance(xs[0], Tensor) else xs[0][0]
        own = Source("torch", str(first.device))
        for argument, inner in _INNER[operation].items():
            options[argument] = functools.partial(call, inner, get_requested_backend(backend), own)
    function = _load_kernel(operation, chosen)
    if (operation, chosen) not in _BATCHED:
        function = functools.partial(_loop_over_batch, function)
    with _isolate_settings(), _translate_errors(operation, options):
        result = function(*xs, **options)
    return source.restore(result)


@contextlib.contextmanager
def _isolate_settings() -> Iterator[None]:
    """Disable the caller's autocast, and NumPy's warnings of NaN (it means "not defined" here).

    Also disable the shorter float32 products that `torch.set_float32_matmul_precision` allows.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(divide="ignore", invalid="ignore"))
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device, enabled=False))
        for switch in (_BACKENDS.mkldnn.matmul, _BACKENDS.cuda.matmul):
            if switch.fp32_precision in ("bf16", "tf32"):
                stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        yield


@contextlib.contextmanager
def _translate_errors(operation: str, options: dict[str, Any]) -> Iterator[None]:
    """Raise a ConvergenceError in place of the LinAlgError of NumPy or PyTorch."""
    try:
        yield
    except Exception as error:
        if not type(error).__name__.endswith("LinAlgError"):
            raise
        # Too small a ridge makes a factorisation fail, not an eigensolver fail to converge.
        ridges = {k: options[k] for k in ("penalty", "ridge") if isinstance(options.get(k), float)}
        name = next((k for k, value in ridges.items() if value > 0), None)
        if name is None or "converge" in str(error):
            line = _options.to_one_line(str(error), 200)
            raise ConvergenceError(f"{operation}: {line}") from error
        raise ConvergenceError(
            f"{name}: {options[name]:g} leaves a matrix singular to rounding; expected a larger one"
        ) from error


def _loop_over_batch(function: Callable[..., Any], *xs: Any, **options: Any) -> Any:
    """Run a function that accepts no batches on each item of a batch, and stack the results."""
    if all(not isinstance(x, Tensor) or x.ndim == 2 for x in xs):
        return function(*xs, **options)
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in xs))
    expanded = [x.expand(lead + x.shape[-2:]) for x in xs]
    results = [function(*(x[i] for x in expanded), **options) for i in np.ndindex(*lead)]
    return _stack(results, lead)


def _stack(results: list[Any], lead: tuple[int, ...]) -> Any:
    """Stack arrays, or dicts or tuples of arrays, along the leading dimensions `lead`."""
    first = results[0]
    if isinstance(first, dict):
        return {key: _stack([r[key] for r in results], lead) for key in first}
    if isinstance(first, tuple):
        items = (_stack(list(values), lead) for values in zip(*results, strict=True))
        return _arrays.rebuild_sequence(first, items)
    stacked = torch.stack(results) if isinstance(first, Tensor) else np.stack(results)
    return stacked.reshape(lead + np.shape(first))


def show_config() -> None:
    """Print versions, devices, and which backends are usable, or why they are not.

    Returns
    -------
    None

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.show_config()
    repsim_kernels ..., numpy ..., torch ...
    threads ..., CUDA device: ...
      reference usable, ... operations
      torch     usable, ... operations
      triton    ...
      cupy      ...
    """
    import repsim_kernels

    versions = {"repsim_kernels": repsim_kernels, "numpy": np, "torch": torch}
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"threads {torch.get_num_threads()}, CUDA device: {cuda}")
    for backend in BACKENDS:
        reason = unavailable_reason(backend)
        count = sum(b == backend for _, b in KERNELS)
        status = f"usable, {count} operations" if reason is None else f"no: {reason}"
        if backend == "cupy" and reason is None:
            from repsim_kernels.kernels.cupy import module

            status += f"; {module.describe_build()}"
        print(f"  {backend:<10}{status}")
