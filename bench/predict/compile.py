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

from bench.predict import sass
from repsim_kernels.kernels import triton as kernels
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._launch import CompileCase


@dataclass(frozen=True)
class Dots:
    """The products in the source's innermost loop, all of one shape."""

    count: int  # per iteration; one of float32 operands with tf32x3 counts three times
    operations: int  # of one of them, in a block


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
    product_loops: tuple[sass.Loop, ...] = ()  # the innermost with such instructions; only sm_90
    dots: Dots | None = None  # of the source; None without products, or outside one inner loop

    @property
    def product_loop(self) -> sass.Loop:
        """The only innermost loop with tensor-core instructions; raises LookupError if not one."""
        if len(self.product_loops) != 1:
            raise LookupError(f"{self.name}: {len(self.product_loops)} product loops, not one")
        return self.product_loops[0]

    @property
    def issue_share(self) -> float:
        """Issue cycles of the product loop as a share of its tensor cores' cycles."""
        loop = self.product_loop
        return loop.issue_cycles(self.warps) / loop.tensor_cycles(self.warps)


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
    disassemble = ["-sass"] if "mma" in kernel.asm["ptx"] else []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_find_cuobjdump(), "-res-usage", *disassemble, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, usage)
    products = set(re.findall(r"\b(?:DMMA|HMMA|HGMMA|UTC\w*MMA)\b", text))
    has_loops = disassemble and kernel.metadata.target.arch == 90
    return CompiledKernel(
        name=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        local=stack + local,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_cores=" ".join(sorted(products)),
        product_loops=tuple(sass.find_product_loops(sass.parse(text))) if has_loops else (),
        dots=read_dots(kernel.asm["ttir"]),
    )


def read_dots(ttir: str) -> Dots | None:
    """Read the products of Triton's intermediate code.

    Returns None if there are none, or if they are in several loops or of several shapes.
    """
    loops: list[tuple[int, int]] = []  # the indentation and the line number of the loops around
    found: dict[tuple[int | None, int], int] = {}  # counts by innermost loop and operations
    for number, line in enumerate(ttir.splitlines()):
        indentation = len(line) - len(line.lstrip())
        while loops and loops[-1][0] >= indentation:
            loops.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append((indentation, number))
        dot = re.search(r"\btt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", line)
        if dot:
            m, k, n = (int(dot[i]) for i in (1, 2, 4))
            place = loops[-1][1] if loops else None, 2 * m * n * k
            times = 3 if "tf32x3" in line and dot[3] == "f32" else 1
            found[place] = found.get(place, 0) + times
    if len(found) != 1:
        return None
    (((loop, operations), count),) = found.items()
    return None if loop is None else Dots(count, operations)


def _find_cuobjdump() -> str:
    """Return Triton's cuobjdump, or the CUDA toolkit's if Triton stops shipping one."""
    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        path = shutil.which("cuobjdump")
        if path is None:
            raise
        return path
