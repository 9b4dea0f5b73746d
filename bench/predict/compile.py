"""Kernels built without a GPU: launchers run on CPU tensors, and what they start is compiled.

Everything is read from the binary itself; another run of the assembler may give another one.
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
class Built:
    """A kernel as the compiler left it."""

    name: str
    warps: int  # of a block
    registers: int  # of a thread
    local: int  # bytes of a thread in local memory, where registers that don't fit are spilled
    shared: int  # bytes of a block
    tensor_memory: int  # columns of a block; sm_100 alone has it
    tensor_cores: str  # its instructions, such as HGMMA; DMMA is float64's; "" for none


def cases() -> list[tuple[str, CompileCase]]:
    """Every case of the kernels, with the name of its module."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [
        (name, case)
        for name in names
        for case in getattr(importlib.import_module(f"{kernels.__name__}.{name}"), "AOT_CASES", ())
    ]


@functools.cache
def build(case: CompileCase, arch: int) -> tuple[Built, ...]:
    """The kernels that a case starts on a GPU such as sm_90 (``arch`` 90), each once."""
    if _launch.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: the kernels can't be compiled")
    started: dict[Any, None] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        started[kernel.warmup(*arguments, grid=grid, **options)] = None

    with (
        patch.object(driver, "_active", _Driver(arch)),
        patch.object(_launch, "launch", launch),
        patch.object(_launch, "capability", lambda device: divmod(arch, 10)),
        patch.object(_launch, "unsupported", lambda *tensors: None),
    ):
        case.call(torch.device("cpu"))
    return tuple(_read(kernel) for kernel in started)


class _Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target  # kernels are remembered by device: none may serve another target

    def get_current_stream(self, device: Any) -> int:
        return 0


@functools.cache
def _read(kernel: Any) -> Built:
    # Disassembling takes as long as compiling, and is in vain for kernels without products.
    sass = ["-sass"] if "mma" in kernel.asm["ptx"] else []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "-res-usage", *sass, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, usage)
    products = set(re.findall(r"\b(?:DMMA|HMMA|HGMMA|UTC\w*MMA)\b", text))
    return Built(
        name=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        local=stack + local,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_cores=" ".join(sorted(products)),
    )


def _cuobjdump() -> str:
    """Triton's own, or one of a CUDA toolkit should Triton stop shipping it."""
    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        path = shutil.which("cuobjdump")
        if path is None:
            raise
        return path
