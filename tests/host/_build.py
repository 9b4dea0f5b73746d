"""Build the CUDA C++ kernels by g++ on shim.h, to run them on the CPU and under sanitizers.

``load_library("jacobi").launch(name, grid, block, *arguments, shared=bytes)`` takes the arguments
of `repsim_kernels.kernels.cupy.module.launch`, with CPU tensors or NumPy arrays, and runs in this
process. With a sanitizer ("address", which includes undefined behaviour, or "thread") it runs in a
separate process on copies of the arguments, since Python does not load the sanitizer's runtime.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

COMPILER = shutil.which("g++")
_HERE = Path(__file__).parent
_SOURCES = _HERE.parent.parent / "repsim_kernels" / "cuda"
_FLAGS = ("-std=c++20", "-O2", "-g", "-pthread", "-Wall", "-Wextra", "-Werror")
_SANITIZE = {
    None: ("-shared", "-fPIC"),
    "address": ("-DSHIM_MAIN", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-DSHIM_MAIN", "-fsanitize=thread"),
}


class HostError(RuntimeError):
    """A launch that a GPU would reject, or that a sanitizer stopped."""


class Library:
    """The kernels of a source, run in this process."""

    def __init__(self, path: Path) -> None:
        self._launch = ctypes.CDLL(str(path)).shim_launch
        self._launch.restype = ctypes.c_char_p

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        *arguments: Any,
        shared: int = 0,
    ) -> None:
        values = [_as_array(argument) for argument in arguments]
        kinds = [_kind(*pair).encode() for pair in zip(arguments, values, strict=True)]
        # Each address refers to a parameter's value: a number, or the pointer to an array.
        pointers = [ctypes.c_void_p(value.ctypes.data) for value in values]
        addresses = [
            value.ctypes.data if _is_scalar(argument) else ctypes.addressof(pointer)
            for argument, value, pointer in zip(arguments, values, pointers, strict=True)
        ]
        error = self._launch(
            name.encode(),
            (ctypes.c_uint * 6)(*_as_dim3(grid), *_as_dim3(block)),
            ctypes.c_size_t(shared),
            len(values),
            (ctypes.c_char_p * len(kinds))(*kinds),
            (ctypes.c_void_p * len(addresses))(*addresses),
        )
        if error:
            raise HostError(f"{name}: {error.decode()}")


class Executable:
    """The kernels of a source with a sanitizer, one process per launch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        *arguments: Any,
        shared: int = 0,
    ) -> None:
        values = [_as_array(argument) for argument in arguments]
        sizes = map(str, (*_as_dim3(grid), *_as_dim3(block), shared))
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / str(position) for position in range(len(values))]
            words = []
            for argument, value, file in zip(arguments, values, files, strict=True):
                file.write_bytes(value.tobytes())
                words.append(f"{_kind(argument, value)}:{file}")
            # GCC 12's runtimes fail with the wide address randomisation of new Linux kernels.
            command = ["setarch", platform.machine(), "--addr-no-randomize", str(self._path)]
            process = subprocess.run(
                [*command, name, *sizes, *words], capture_output=True, text=True, check=False
            )
            if process.returncode:
                raise HostError(f"{name}: exit status {process.returncode}\n{process.stderr}")
            for argument, value, file in zip(arguments, values, files, strict=True):
                if not _is_scalar(argument):
                    value[...] = np.frombuffer(file.read_bytes(), value.dtype).reshape(value.shape)


@cache
def load_library(source: str | Path, sanitizer: str | None = None) -> Library | Executable:
    """Build and load a source of repsim_kernels/cuda by name, or a .cu file by path."""
    path = source if isinstance(source, Path) else _SOURCES / f"{source}.cu"
    text = _translate(path)
    flags = (*_FLAGS, *_SANITIZE[sanitizer])
    key = "\0".join((text, (_HERE / "shim.h").read_text(), str(COMPILER), *flags))
    folder = Path(tempfile.gettempdir()) / f"repsim-kernels-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            unit = Path(work) / "unit.cpp"
            unit.write_text(text)
            new = Path(work) / "new"
            command = [str(COMPILER), *flags, f"-I{_HERE}", str(unit), "-o", str(new)]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                raise HostError(f"{path.name} does not compile\n{process.stderr}")
            new.replace(built)
    return Library(built) if sanitizer is None else Executable(built)


def _translate(path: Path) -> str:
    """Replace declarations of dynamic shared memory, and add a dispatcher over the kernels."""
    text = path.read_text()
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)", text)
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w ]+?)\s*(\w+)\s*\[\s*\]\s*;",
        r"\1 *\2 = reinterpret_cast<\1 *>(shim::dynamic_shared);",
        text,
    )
    cases = "".join(
        f'    if (name == "{name}") return launch({name}, kinds, values, bytes);\n'
        for name in names
    )
    return f"""#include "shim.h"
#line 1 "{path}"
{text}
#line 1 "cases"
void shim::launch_by_name(const std::string &name, const std::vector<std::string> &kinds,
                          void *const *values, size_t bytes) {{
{cases}    error = "no such kernel";
}}
"""


def _as_array(argument: Any) -> np.ndarray:
    if not isinstance(argument, torch.Tensor):
        argument = np.asarray(argument)
        assert argument.flags.c_contiguous, "a kernel sees memory, not strides"
        return argument
    assert argument.is_contiguous(), "a kernel sees memory, not strides"
    if argument.dtype == torch.bfloat16:
        argument = argument.view(torch.uint16)
    return argument.detach().numpy()


def _is_scalar(argument: Any) -> bool:
    return isinstance(argument, np.generic)


def _kind(argument: Any, value: np.ndarray) -> str:
    """Return the type as shim::kind spells it; 16-bit floats are unsigned shorts on the host."""
    assert _is_scalar(argument) or isinstance(argument, np.ndarray | torch.Tensor)
    letter = "u" if value.dtype in (np.float16, np.bool_) else value.dtype.kind
    return ("" if _is_scalar(argument) else "p") + f"{letter}{value.itemsize}"


def _as_dim3(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
