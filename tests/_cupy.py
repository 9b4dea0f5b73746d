"""A fake CuPy that records calls and solves by NumPy, tensors for it, and a fake install."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch


class CudaTensor(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    index = 1

    @property
    def device(self):
        return torch.device("cuda", self.index)


def on_cuda(*values: float, index: int = 1) -> torch.Tensor:
    x = torch.tensor(values).as_subclass(CudaTensor)
    x.index = index
    return x


class FakeCupy(ModuleType):
    """The parts of CuPy that the kernels use; `events` records operations on the device in order.

    `spoil`, if set, is called with the values and the vectors (or None) of a batch and changes
    them in place, like a solver that fails without reporting it.
    """

    def __init__(self) -> None:
        super().__init__("cupy")
        self.__spec__ = ModuleSpec("cupy", None)
        self.__version__ = "14.0.0"
        self.events: list[tuple[object, ...]] = []
        self.loaded: list[dict[str, object]] = []
        self.driver = 13_000
        self.RawModule = self.raw_module
        self.spoil: Callable[[np.ndarray, np.ndarray | None], None] | None = None
        self.from_dlpack = np.from_dlpack
        self.linalg = SimpleNamespace(eigh=self.eigh, eigvalsh=self.eigvalsh)
        self.cuda = SimpleNamespace(
            Device=self.device,
            Stream=SimpleNamespace(from_external=lambda stream: self.scope("stream", stream)),
            is_available=lambda: True,
            runtime=SimpleNamespace(driverGetVersion=lambda: self.driver),
        )

    def eigh(self, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, v = np.linalg.eigh(a)
        if self.spoil is not None:
            self.spoil(w, v)
        return w, v

    def eigvalsh(self, a: np.ndarray) -> np.ndarray:
        w = np.linalg.eigvalsh(a)
        if self.spoil is not None:
            self.spoil(w, None)
        return w

    def scope(self, kind: str, target: object) -> SimpleNamespace:
        return Scope(lambda step: self.events.append((kind, target, step)))

    def device(self, index: int) -> SimpleNamespace:
        scope = self.scope("device", index)
        scope.attributes = {"MaxSharedMemoryPerBlockOptin": 232_448}
        return scope

    def raw_module(self, **options: object) -> SimpleNamespace:
        self.loaded.append(options)

        def get_function(name: str) -> SimpleNamespace:
            self.events.append(("load", name))
            return Kernel(self, name)

        return SimpleNamespace(get_function=get_function)


class Scope(SimpleNamespace):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(note=note)

    def __enter__(self):
        self.note("enter")

    def __exit__(self, *_):
        self.note("exit")


class Kernel(SimpleNamespace):
    shared_size_bytes = 448

    def __init__(self, cupy: FakeCupy, name: str) -> None:
        super().__init__(cupy=cupy, name=name)

    def __call__(self, grid, block, arguments, *, shared_mem):
        limit = self.max_dynamic_shared_size_bytes
        self.cupy.events.append(("launch", self.name, grid, block, arguments, shared_mem, limit))


class EditableInstall:
    """An editable install: a source in the checkout, and its build in site-packages."""

    def __init__(self, folder: Path, code: str) -> None:
        self.site, self.checkout = folder / "site-packages", folder / "checkout"
        for place in (self.site, self.checkout):
            (place / "cuda").mkdir(parents=True)
        self.source = self.checkout / "cuda" / "toy.cu"
        self.fatbin = self.site / "cuda" / "toy.fatbin"
        self.source.write_text(code)

    def build(
        self,
        fatbin: bytes = b"",
        architectures: tuple[int, ...] = (80, 90, 100),
        nvcc: str = "13.0.88",
    ) -> None:
        self.fatbin.write_bytes(fatbin)
        hashes = {"toy": hashlib.sha256(self.source.read_bytes()).hexdigest()}
        record = {"nvcc": nvcc, "architectures": list(architectures), "sha256": hashes}
        (self.site / "cuda" / "fatbin.json").write_text(json.dumps(record))
