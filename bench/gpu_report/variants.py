"""The kernel variants of a run: recorded from its launches, and compiled without a GPU.

Triton compiles a kernel for each combination of argument types and compile-time constants, of
integers that are 1 or multiples of 16, and of pointers that are aligned to 16 bytes.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from repsim_kernels.kernels.triton import _launch

_LARGE = 2**32  # the smallest kind of integer that Triton passes in 64 bits, and a multiple of 16


class Argument(NamedTuple):
    """What compilation sees of an argument of a launch."""

    name: str
    kind: str  # "pointer", "constant", "dtype", or "number": of any value with the same treatment
    value: Any  # a pointer's dtype, a number's representative
    aligned: bool = True  # pointers only


@dataclass(frozen=True)
class Variant:
    """A kernel and what its compilation depends on; equal variants share one binary."""

    module: str
    kernel: str
    arguments: tuple[Argument, ...]


def describe_launch(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> list[Variant]:
    """Return the variant that a launch needs on a GPU.

    The interpreter can't multiply bfloat16, so launchers that name the type of products name
    float32 there; then the second variant is the one that a GPU may need instead.
    """
    types = {p: str(a) for p, a in kernel.fn.__annotations__.items()}
    parameters = list(inspect.signature(kernel.fn).parameters)
    named = dict(zip(parameters, arguments, strict=False)) | options
    described = [
        _describe(name, value, name not in parameters or "constexpr" in types.get(name, ""))
        for name, value in sorted(named.items())
    ]
    variants = [Variant(kernel.fn.__module__, kernel.fn.__name__, tuple(described))]
    if any(a.kind == "pointer" and a.value == "bfloat16" for a in described):
        products = Argument("PRODUCT", "dtype", "fp32")
        twin = [a._replace(value="bf16") if a == products else a for a in described]
        if twin != described and _launch.is_interpreted():
            variants.append(Variant(kernel.fn.__module__, kernel.fn.__name__, tuple(twin)))
    return variants


def _describe(name: str, value: Any, is_constant: bool) -> Argument:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return Argument(name, "pointer", dtype, value.data_ptr() % 16 == 0)
    if type(value).__name__ == "dtype":
        return Argument(name, "dtype", str(value))
    if is_constant or value is None or value == 1:
        return Argument(name, "constant", value)
    if isinstance(value, int) and not isinstance(value, bool):
        start = 16 if -(2**31) <= value < 2**31 else _LARGE
        return Argument(name, "number", start + (value % 16 != 0))
    return Argument(name, "number", type(value)(1))


def restore_argument(argument: Argument) -> Any:
    """Return an argument that Triton treats like the recorded one."""
    if argument.kind == "pointer":
        memory = torch.empty(32, dtype=getattr(torch, argument.value))
        return memory if argument.aligned else memory[1:]
    if argument.kind == "dtype":
        import triton.language as tl

        return tl.dtype(argument.value)
    return argument.value


def save_variants(path: Path, variants: Iterable[Variant]) -> None:
    path.write_text(json.dumps([[v.module, v.kernel, v.arguments] for v in variants]))


def load_variants(path: Path) -> list[Variant]:
    return [
        Variant(module, kernel, tuple(Argument(*a) for a in arguments))
        for module, kernel, arguments in json.loads(path.read_text())
    ]


@dataclass(frozen=True)
class Compiled:
    """A compiled variant: its place in Triton's cache, and the parts of its key.

    Triton's key also hashes Triton's own files, which differ between versions of Python. Therefore
    the parts travel, and the machine that runs the kernel computes the key.
    """

    name: str
    source: str  # hash of the kernel's source, its constants and types
    options: str  # hash of the compiler's options
    compiler: str  # version of the assembler, and the architecture
    files: tuple[str, ...]
    launcher: str  # C source of the function that starts the kernel; "" from Triton 3.8 on


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile a variant for sm_``arch``, or find it in Triton's cache."""
    from triton.compiler import compiler

    from bench.predict.compile import pretend_gpu

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    arguments = {a.name: restore_argument(a) for a in variant.arguments}
    keys: list[tuple[str, str, str]] = []
    make_key = compiler.get_cache_key

    def record_key(source: Any, backend: Any, options: Any, **more: Any) -> Any:
        keys.append((source.hash(), options.hash(), backend.hash()))
        return make_key(source, backend, options, **more)

    with pretend_gpu(arch), patch.object(compiler, "get_cache_key", record_key):
        kernel.device_caches.clear()  # kernels that this process has compiled have no key
        compiled = kernel.warmup(grid=(1,), **arguments)
    files = [p for p in compiled.metadata_group.values() if p.endswith((".cubin", ".json"))]
    return Compiled(compiled.name, *keys[0], tuple(sorted(files)), _write_launcher(compiled))


def _write_launcher(compiled: Any) -> str:
    """Return the C source that Triton compiles when the kernel is first launched; "" if none."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "compile_module_from_src"):
        return ""
    sources: list[str] = []

    def build(src: str, **_: Any) -> SimpleNamespace:
        sources.append(src)
        return SimpleNamespace(launch=None)

    with (
        patch.object(driver, "compile_module_from_src", build),
        patch.object(driver, "library_dirs", lambda: []),
    ):
        driver.CudaLauncher(compiled.src, compiled.metadata)
    return sources[0]


@contextmanager
def record_launches(variants: dict[Variant, None], run: bool = True) -> Iterator[None]:
    """Record all launches in the ``with`` block; without ``run``, no kernel is started."""
    start = _launch.launch

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        module = getattr(kernel.fn, "__module__", None) or ""  # a test may pass a stand-in
        if 0 not in grid and module.startswith("repsim_kernels."):
            variants.update(dict.fromkeys(describe_launch(kernel, arguments, options)))
        if run:
            start(kernel, grid, *arguments, **options)

    with patch.object(_launch, "launch", launch):
        yield
