"""The CUDA C++ of repsim_kernels/cuda, loaded and started through CuPy.

A fatbin that was built from the source as it stands is loaded. Else NVRTC compiles the source at
its first use, and CuPy keeps the result on disk, by the hash of the source and the options.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import repsim_kernels
from repsim_kernels.kernels._cuda import check_grid

# CuPy adds -ftz=true and the device's architecture: what CMakeLists.txt gives nvcc.
NVRTC_OPTIONS = ("-std=c++17",)


def unsupported(*tensors: Tensor) -> str | None:
    """Why no native kernel can serve these tensors (without any: nothing); None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    for t in tensors:
        if t.device.type != "cuda":
            return f"it needs CUDA tensors, not {t.device.type}"
    if len({t.device for t in tensors}) > 1:
        return "the tensors are on different devices"
    try:
        import cupy  # type: ignore[import-not-found]
    except Exception as error:  # whatever a broken installation, or a cache it can't write, raises
        cause = error.__cause__ or error
        return f"CuPy can't be imported: {type(cause).__name__}: {' '.join(str(cause).split())}"
    if not hasattr(cupy.cuda.Stream, "from_external"):
        return f"CuPy {cupy.__version__} is older than 14"
    return None if cupy.cuda.is_available() else "CuPy finds no CUDA device"


def launch(
    source: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: object,
    shared: int = 0,
) -> None:
    """Start a kernel of cuda/<source>.cu on the device of its tensors, on torch's current stream.

    Tensors are passed as pointers, NumPy scalars as what they are: np.int32 is C's int. ``shared``
    counts the bytes of dynamic shared memory, up to what the device gives to a block. A grid beyond
    CUDA's limits raises ValueError.
    """
    import cupy

    check_grid(name, grid)

    device = next(a.device for a in arguments if isinstance(a, Tensor))
    values = tuple(map(_argument, arguments))
    if 0 in grid:  # nothing to do, but CuPy would start one block
        return
    with (
        cupy.cuda.Device(device.index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream(device)),
    ):
        _kernel(source, name, device.index)(grid, block, values, shared_mem=shared)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    import cupy

    return int(cupy.cuda.Device(device.index).attributes["MaxSharedMemoryPerBlockOptin"])


def describe_build() -> str:
    """Where the kernels come from, on the current device if there is one, and why."""
    device = None if unsupported() else torch.cuda.current_device()
    reasons = [why for path in _files("*.cu") if (why := _why_nvrtc(path.stem, device))]
    if reasons:
        return f"NVRTC at first use: {'; '.join(dict.fromkeys(reasons))}"
    record = _record()
    assert record is not None
    return f"fatbin for {', '.join(f'sm_{a}' for a in record['architectures'])}"


def _argument(value: object) -> np.generic:
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    if isinstance(value, np.generic):
        return value
    # CuPy would take a Python number for 64 bits, whatever the kernel reads.
    raise TypeError(f"{value!r} has no C type: expected a tensor or a NumPy scalar")


@functools.cache
def _kernel(source: str, name: str, device: int) -> Any:
    """The kernel, loaded for a device, which is the current one."""
    import cupy

    if _why_nvrtc(source, device) is None:
        module = cupy.RawModule(path=str(_files(f"{source}.fatbin")[0]))
    else:
        code = _files(f"{source}.cu")[0].read_text(encoding="utf-8")
        module = cupy.RawModule(code=code, backend="nvrtc", options=NVRTC_OPTIONS)
    kernel = module.get_function(name)
    # Without it a block gets 48 KiB. Once for all launches, so that threads don't race for it.
    most = shared_memory(torch.device("cuda", device))
    kernel.max_dynamic_shared_size_bytes = most - kernel.shared_size_bytes
    return kernel


def _why_nvrtc(source: str, device: int | None) -> str | None:
    """Why a source's fatbin can't be used, on a device if one is given; None if it can."""
    record = _record()
    if record is None:
        return "no fatbin was built (there was no nvcc, or REPSIM_CUDA=OFF)"
    now = hashlib.sha256(_files(f"{source}.cu")[0].read_bytes()).hexdigest()
    if record["sha256"].get(source) != now:
        return f"{source}.cu is not what the fatbin was built from"
    if device is None:
        return None
    import cupy

    major, minor = torch.cuda.get_device_capability(device)
    built = [divmod(architecture, 10) for architecture in record["architectures"]]
    # Code for one minor version runs on the later ones; there is PTX for all after the last.
    if (major, minor) < max(built) and not any(a == major and b <= minor for a, b in built):
        return f"the fatbin has no code for sm_{major}{minor}"
    nvcc = tuple(map(int, record["nvcc"].split(".")[:2]))
    driver = cupy.cuda.runtime.driverGetVersion()  # 1000 · major + 10 · minor
    if (driver // 1000, driver % 1000 // 10) < nvcc:
        return f"the driver is older than CUDA {'.'.join(map(str, nvcc))}, which built the fatbin"
    return None


def _record() -> dict[str, Any] | None:
    """What the build wrote down: nvcc's version, the architectures, the hashes of the sources."""
    found = _files("fatbin.json")
    return json.loads(found[0].read_text(encoding="utf-8")) if found else None


def _files(pattern: str) -> list[Path]:
    """The package's files in cuda/: an editable install has what was built in a second place."""
    return [
        path
        for folder in repsim_kernels.__path__
        for path in sorted(Path(folder, "cuda").glob(pattern))
    ]
