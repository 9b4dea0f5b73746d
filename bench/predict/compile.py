"""Compile the Triton kernels without a GPU and read their resource usage from the binary.

The launchers run on CPU tensors; each kernel they would launch is compiled instead. All numbers are
read from one binary, because a second run of the assembler may produce a different one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from repsim_kernels.kernels import triton as kernels
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._launch import CompileCase


@dataclass(frozen=True)
class CompiledKernel:
    """Resource usage of a compiled kernel."""

    name: str
    warps: int  # per block
    registers: int  # per thread
    local: int  # bytes of local memory per thread; registers that don't fit are spilled there
    shared: int  # bytes of shared memory per block
    tensor_memory: int  # columns per block; only sm_100 has tensor memory
    tensor_cores: str  # tensor-core instructions, e.g. HGMMA (DMMA is float64); "" for none


def list_cases() -> list[tuple[str, CompileCase]]:
    """Return every AOT case of the Triton kernels with the name of its module."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [
        (name, case)
        for name in names
        for case in getattr(importlib.import_module(f"{kernels.__name__}.{name}"), "AOT_CASES", ())
    ]


@functools.cache
def build(case: CompileCase, arch: int) -> tuple[CompiledKernel, ...]:
    """Compile the distinct kernels that a case launches on sm_``arch``, e.g. 90."""
    if _launch.is_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: the kernels can't be compiled")
    launched: dict[Any, None] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launched[kernel.warmup(*arguments, grid=grid, **options)] = None

    with (
        pretend_gpu(arch),
        patch.object(_launch, "launch", launch),
        patch.object(_launch, "capability", lambda device: divmod(arch, 10)),
        patch.object(_launch, "unsupported", lambda *tensors: None),
    ):
        case.call(torch.device("cpu"))
    return tuple(_read_usage(kernel) for kernel in launched)


def pretend_gpu(arch: int) -> Any:
    """Return a context in which Triton compiles for sm_``arch`` without asking a driver."""
    return patch.object(driver, "_active", _FakeDriver(arch))


class _FakeDriver:
    """Answers the questions that Triton asks the GPU driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target  # Triton caches kernels by device: each target needs its own entry

    def get_current_stream(self, device: Any) -> int:
        return 0


@functools.cache
def _read_usage(kernel: Any) -> CompiledKernel:
    # Disassembling takes as long as compiling; only kernels with matrix products need it.
    sass = ["-sass"] if "mma" in kernel.asm["ptx"] else []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_find_cuobjdump(), "-res-usage", *sass, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, usage)
    products = set(re.findall(r"\b(?:DMMA|HMMA|HGMMA|UTC\w*MMA)\b", text))
    return CompiledKernel(
        name=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        local=stack + local,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_cores=" ".join(sorted(products)),
    )


def _find_cuobjdump() -> str:
    """Return Triton's cuobjdump, or the CUDA toolkit's if Triton stops shipping one."""
    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        path = shutil.which("cuobjdump")
        if path is None:
            raise
        return path
