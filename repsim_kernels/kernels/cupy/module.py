"""Loading and launching the CUDA C++ kernels of repsim_kernels/cuda through CuPy.

A fatbin is loaded if it was built from the current source. Otherwise NVRTC compiles the source at
first use, and CuPy caches the result on disk by the hash of the source and the options.
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

# CuPy adds -ftz=true and the device's architecture, as CMakeLists.txt does for nvcc.
NVRTC_OPTIONS = ("-std=c++17",)


def unsupported(*tensors: Tensor) -> str | None:
    """Return why no native kernel can take these tensors (or any tensor), or None if one can."""
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
    except Exception as error:  # a broken installation or an unwritable cache may raise anything
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

    Tensors are passed as pointers, NumPy scalars by value in their own type: np.int32 is C's int.
    ``shared`` is the dynamic shared memory in bytes, up to the device's limit per block. Raises
    ValueError for a grid beyond CUDA's limits.
    """
    import cupy

    check_grid(name, grid)

    device = next(a.device for a in arguments if isinstance(a, Tensor))
    values = tuple(map(_to_kernel_argument, arguments))
    if 0 in grid:  # CuPy would start one block
        return
    with (
        cupy.cuda.Device(device.index),
        cupy.cuda.Stream.from_external(torch.cuda.current_stream(device)),
    ):
        _load_kernel(source, name, device.index)(grid, block, values, shared_mem=shared)


def shared_memory_limit(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may use on a CUDA device."""
    import cupy

    return int(cupy.cuda.Device(device.index).attributes["MaxSharedMemoryPerBlockOptin"])


def describe_build() -> str:
    """Describe where the kernels come from, for the current device if one exists, and why."""
    device = None if unsupported() else torch.cuda.current_device()
    reasons = [why for path in _find_files("*.cu") if (why := _why_not_fatbin(path.stem, device))]
    if reasons:
        return f"NVRTC at first use: {'; '.join(dict.fromkeys(reasons))}"
    record = _read_build_record()
    assert record is not None
    return f"fatbin for {', '.join(f'sm_{a}' for a in record['architectures'])}"


def _to_kernel_argument(value: object) -> np.generic:
    """Convert a tensor to its address; NumPy scalars are passed through."""
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    if isinstance(value, np.generic):
        return value
    # CuPy would pass a Python number as 64 bits, whatever type the kernel reads.
    raise TypeError(f"{value!r} has no C type: expected a tensor or a NumPy scalar")


@functools.cache
def _load_kernel(source: str, name: str, device: int) -> Any:
    """Load a kernel for a device, which must be the current one."""
    import cupy

    if _why_not_fatbin(source, device) is None:
        module = cupy.RawModule(path=str(_find_files(f"{source}.fatbin")[0]))
    else:
        code = _find_files(f"{source}.cu")[0].read_text(encoding="utf-8")
        module = cupy.RawModule(code=code, backend="nvrtc", options=NVRTC_OPTIONS)
    kernel = module.get_function(name)
    # The default limit is 48 KiB per block. Raised once, on loading, so that threads don't race.
    limit = shared_memory_limit(torch.device("cuda", device))
    kernel.max_dynamic_shared_size_bytes = limit - kernel.shared_size_bytes
    return kernel


def _why_not_fatbin(source: str, device: int | None) -> str | None:
    """Return why a source's fatbin can't be used (on a device, if any), or None if it can."""
    record = _read_build_record()
    if record is None:
        return "no fatbin was built (there was no nvcc, or REPSIM_CUDA=OFF)"
    digest = hashlib.sha256(_find_files(f"{source}.cu")[0].read_bytes()).hexdigest()
    if record["sha256"].get(source) != digest:
        return f"{source}.cu is not what the fatbin was built from"
    if device is None:
        return None
    import cupy

    major, minor = torch.cuda.get_device_capability(device)
    built = [divmod(architecture, 10) for architecture in record["architectures"]]
    # Code for a minor version runs on later ones; beyond the newest target there is PTX.
    if (major, minor) < max(built) and not any(a == major and b <= minor for a, b in built):
        return f"the fatbin has no code for sm_{major}{minor}"
    nvcc = tuple(map(int, record["nvcc"].split(".")[:2]))
    driver = cupy.cuda.runtime.driverGetVersion()  # 1000 · major + 10 · minor
    if (driver // 1000, driver % 1000 // 10) < nvcc:
        return f"the driver is older than CUDA {'.'.join(map(str, nvcc))}, which built the fatbin"
    return None


def _read_build_record() -> dict[str, Any] | None:
    """Read the build's record: nvcc's version, the architectures, the hashes of the sources."""
    paths = _find_files("fatbin.json")
    return json.loads(paths[0].read_text(encoding="utf-8")) if paths else None


def _find_files(pattern: str) -> list[Path]:
    """List the package's files in cuda/; an editable install has built files in a second folder."""
    return [
        path
        for folder in repsim_kernels.__path__
        for path in sorted(Path(folder, "cuda").glob(pattern))
    ]
