"""Compile the CUDA C++ kernels without a GPU: by nvcc, and by NVRTC as CuPy calls it."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from repsim_kernels.kernels.cupy import module

NVCC = shutil.which("nvcc")
TARGETS = (80, 90, 100)
SOURCES = sorted((Path(module.__file__).parents[2] / "cuda").glob("*.cu"))
# The options that CMakeLists.txt passes to nvcc, apart from the targets.
NVCC_OPTIONS = ("-std=c++17", "-ftz=true", "-Werror=all-warnings")
# Our options and those that CuPy adds.
NVRTC_OPTIONS = (*module.NVRTC_OPTIONS, "-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports for a kernel; stack and spills (bytes) include the functions it calls."""

    name: str
    registers: int
    stack: int
    spills: int


class CompileError(Exception):
    """The log of a compiler that rejected a source."""


def nvcc(source: Path, folder: Path, *options: str) -> str:
    """Compile a source to folder/out by nvcc and return its log."""
    command = [str(NVCC), *NVCC_OPTIONS, *options, str(source), "-o", str(folder / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise CompileError(process.stdout + process.stderr)
    return process.stdout + process.stderr


def build(source: Path, arch: int, folder: Path) -> list[KernelResources]:
    """Compile a source to machine code and return its kernels' resources."""
    return list(read_kernels(nvcc(source, folder, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v")))


def read_kernels(log: str) -> Iterator[KernelResources]:
    """Parse the log of ptxas -v; a kernel's paragraph includes functions that aren't inlined."""
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name, registers = part.split("'")[1], re.search(r"Used (\d+) registers", part)
        assert registers, part
        yield KernelResources(
            name,
            int(registers[1]),
            stack=sum(map(int, re.findall(r"(\d+) bytes stack frame", part))),
            spills=sum(map(int, re.findall(r"(\d+) bytes spill", part))),
        )


@cache
def load_nvrtc() -> ctypes.CDLL | None:
    """Load the library of PyTorch's NVRTC wheel; None if it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.[0-9]*")):
            return ctypes.CDLL(str(path))
    return None


def run_nvrtc(code: str, arch: int, *more: str) -> tuple[bytes, str]:
    """Compile a source by NVRTC and return the machine code and the log."""
    library = load_nvrtc()
    assert library is not None
    program = ctypes.c_void_p()
    options = [f"-arch=sm_{arch}", *NVRTC_OPTIONS, *more]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None
    )
    assert status == 0
    try:
        status = library.nvrtcCompileProgram(program, len(options), array)
        log = _read(library, program, "ProgramLog").rstrip(b"\0\n").decode()
        if status:
            raise CompileError(log)
        return _read(library, program, "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, output: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(library, f"nvrtcGet{output}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(library, f"nvrtcGet{output}")(program, buffer) == 0
    return buffer.raw
