"""The CUDA C++ kernels compiled without a GPU: by nvcc, and by NVRTC as CuPy calls it."""

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
# What CMakeLists.txt gives nvcc beside the targets.
NVCC_OPTIONS = ("-std=c++17", "-ftz=true", "-Werror=all-warnings")
# What CuPy adds to the options it is given.
NVRTC_OPTIONS = (*module.NVRTC_OPTIONS, "-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class Built:
    """A kernel as ptxas reports it; bytes of stack and spills include the functions it calls."""

    name: str
    registers: int
    stack: int
    spills: int


class CompileError(Exception):
    """What a compiler said of a source that it doesn't take."""


def nvcc(source: Path, folder: Path, *options: str) -> str:
    """What nvcc says while it compiles a source to folder/out."""
    command = [str(NVCC), *NVCC_OPTIONS, *options, str(source), "-o", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def build(source: Path, arch: int, folder: Path) -> list[Built]:
    """The kernels of a source, compiled to machine code."""
    return list(kernels(nvcc(source, folder, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v")))


def kernels(log: str) -> Iterator[Built]:
    """What ptxas -v says; the paragraph of a kernel has its functions that aren't inlined, too."""
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name, registers = part.split("'")[1], re.search(r"Used (\d+) registers", part)
        assert registers, part
        yield Built(
            name,
            int(registers[1]),
            stack=sum(map(int, re.findall(r"(\d+) bytes stack frame", part))),
            spills=sum(map(int, re.findall(r"(\d+) bytes spill", part))),
        )


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The library of the NVRTC wheel that PyTorch brings; None where there is none."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found and found.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.[0-9]*")):
            return ctypes.CDLL(str(path))
    return None


def run_nvrtc(code: str, arch: int, *more: str) -> tuple[bytes, str]:
    """The machine code of a source, and NVRTC's log."""
    library = nvrtc()
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


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(library, f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.raw
