"""Stand-ins for `torch.cuda` and for the start of a Triton kernel, on the phantom device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cusolver import FakeCusolver
from _phantom import DEVICE, Device, PhantomError, PhantomTensor, unwrap
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from repsim_kernels.kernels import cusolver
from repsim_kernels.kernels.triton import _launch, riccati

GRID_LIMITS = (2**31 - 1, 65_535, 65_535)  # of every CUDA device
MEMORY = 139 * 2**30  # an H200's


class Stream:
    """A stream on which everything is finished as soon as it is started."""

    device = DEVICE
    cuda_stream = 0

    def __init__(self, target: Device) -> None:
        self.target = target

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        self.target.record("sync", "synchronize")


class Event:
    """A point of a stream; the time between two is constant."""

    def __init__(self, target: Device) -> None:
        self.target = target

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.target.record("sync", "synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Graph:
    """A CUDA graph: capturing runs nothing, and replaying runs what was captured."""

    def __init__(self, target: Device) -> None:
        self.target = target
        self.calls: list[Any] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert self.target.captured is None
        self.target.captured = self.calls = []

    def capture_end(self) -> None:
        self.target.captured = None

    def replay(self) -> None:
        self.target.record("launch", "graph replay")
        with plain_tensors():
            for call in self.calls:
                call()


class Generator(torch.Generator):
    """A generator of random numbers, of either device; the numbers are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self.name = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return DEVICE if self.name.type == "cuda" else self.name


class Cusolver(FakeCusolver):
    """A cuSOLVER that solves in the memory of the device's tensors; each batch is a launch."""

    def __init__(self, target: Device) -> None:
        super().__init__()
        self.target = target

    def _XsyevBatched(self, *arguments: Any) -> None:
        self.target.record("launch", "XsyevBatched")
        super()._XsyevBatched(*arguments)


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Compute with CPU tensors as if there were no device."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class Kernel:
    """A Triton kernel that runs on the memory of the device's tensors, in the interpreter."""

    def __init__(self, kernel: Any, target: Device) -> None:
        self.kernel, self.fn, self.target = kernel, kernel.fn, target

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        name = self.fn.__name__
        for blocks, limit in zip(grid, GRID_LIMITS, strict=False):
            if not 0 < blocks <= limit:
                raise PhantomError(f"{name}: a grid of {grid}; expected 1 to {limit} blocks")

        def start(*arguments: Any, **options: Any) -> None:
            for a in arguments:
                if isinstance(a, Tensor):
                    _check_argument(name, a)
            self.target.record("launch", name)
            plain = unwrap(arguments)
            if self.target.captured is not None:
                self.target.captured.append(lambda: self.kernel[grid](*plain, **options))
                return
            with plain_tensors():
                self.kernel[grid](*plain, **options)

        return start


def _check_argument(kernel: str, t: Tensor) -> None:
    if not isinstance(t, PhantomTensor):
        raise PhantomError(f"{kernel}: a CPU tensor of shape {tuple(t.shape)}")
    if t.numel() and t.data_ptr() % t.element_size():
        raise PhantomError(f"{kernel}: a tensor of {t.dtype} at a misaligned address")


@contextlib.contextmanager
def phantom_device() -> Iterator[Device]:
    """Make `torch.cuda`, PyTorch's functions and the Triton launcher find a device."""
    target = Device()
    launch, library = _launch.launch, Cusolver(target)

    def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launch(Kernel(kernel, target), grid, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, target.active():
        patch.setattr(_launch, "launch", start)
        patch.setattr(riccati, "_step_graph", riccati.StepGraph())
        patch.setattr(cusolver, "load_library", lambda: library)
        patch.setattr(cusolver, "_HANDLES", {})
        patch.setattr(torch, "Generator", Generator)
        for name, value in _list_functions(target).items():
            patch.setattr(torch.cuda, name, value)
        yield target


def _list_functions(target: Device) -> dict[str, Any]:
    """List what replaces the functions and classes of `torch.cuda`."""
    stream = Stream(target)
    properties = SimpleNamespace(
        name="phantom",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=MEMORY,
        L2_cache_size=0,  # so that the benchmarks need no inputs to replace its contents
    )

    def synchronize(*_: Any) -> None:
        target.record("sync", "synchronize")

    def set_sync_debug_mode(mode: str | int) -> None:
        target.refuses_syncs = mode in ("error", 2)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_sync_debug_mode": lambda: 2 if target.refuses_syncs else 0,
        "set_sync_debug_mode": set_sync_debug_mode,
        "synchronize": synchronize,
        "device": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "Stream": lambda *_, **__: Stream(target),
        "stream": lambda *_: contextlib.nullcontext(),
        "Event": lambda *_, **__: Event(target),
        "CUDAGraph": lambda *_: Graph(target),
        # With this context manager a capture may allocate: it is run at once, and never again.
        "graph": lambda *_, **__: contextlib.nullcontext(),
    }
