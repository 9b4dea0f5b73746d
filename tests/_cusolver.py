"""A fake cuSOLVER, called through ctypes: it checks its arguments and solves by NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from repsim_kernels.kernels import cusolver

STREAM = 77


class FakeCusolver:
    """The functions of cuSOLVER that are used, for matrices in CPU memory.

    Attributes
    ----------
    problems : list of Exception
        Failed checks of arguments.
    calls : list of tuples
        The name and arguments of each call.
    statuses : dict of str to int
        Functions that only return this status.
    info : dict of int to int
        Matrices, by their number in the batch, to report this status for.
    spoil : callable, optional
        Called with the values and vectors (or None) of a batch, to change them in place like a
        solver that fails without reporting it.
    """

    def __init__(self) -> None:
        self.problems: list[Exception] = []
        self.calls: list[tuple[Any, ...]] = []
        self.statuses: dict[str, int] = {}
        self.info: dict[int, int] = {}
        self.spoil: Callable[[np.ndarray, np.ndarray | None], None] | None = None
        self.streams: dict[int, int | None] = {}
        self.parameters: set[int] = set()
        self.sizes: dict[tuple[Any, ...], tuple[int, int]] = {}
        for name, types in cusolver.SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(c_int, *types)(self._make_callback(name)))

    def names(self) -> list[str]:
        return [name.removeprefix("cusolverDn") for name, *_ in self.calls]

    def _make_callback(self, name: str) -> Callable[..., int]:
        run = getattr(self, f"_{name.removeprefix('cusolverDn')}")

        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if name in self.statuses:
                return self.statuses[name]
            try:
                run(*arguments)
            except Exception as error:  # ctypes would only print it
                self.problems.append(error)
                return 3
            return 0

        return call

    def _Create(self, handle: Any) -> None:
        handle[0] = 4096 + len(self.streams)
        self.streams[handle[0]] = None

    def _CreateParams(self, params: Any) -> None:
        params[0] = 8192 + len(self.parameters)
        self.parameters.add(params[0])

    def _SetStream(self, handle: int, stream: int | None) -> None:
        assert handle in self.streams
        self.streams[handle] = stream or 0  # the default stream

    def _check(self, problem: tuple[Any, ...], batch: int) -> np.dtype:
        handle, params, jobz, uplo, n, kind_a, a, lda, kind_w, w, kind = problem
        assert self.streams[handle] is not None, "no stream was set"
        assert params in self.parameters
        assert jobz in (0, 1)
        assert uplo in (0, 1)
        assert n >= 1
        assert lda >= n
        assert batch >= 1
        assert a, "no matrices"
        assert w, "no values"
        assert kind_a == kind_w == kind
        return np.dtype({0: np.float32, 1: np.float64}[kind])

    def _XsyevBatched_bufferSize(self, *arguments: Any) -> None:
        *problem, on_device, on_host, batch = arguments
        self._check(tuple(problem), batch)
        n = problem[4]
        on_device[0], on_host[0] = 8 * batch * n * n + 3, 5 * n
        self.sizes[*problem, batch] = on_device[0], on_host[0]

    def _XsyevBatched(self, *arguments: Any) -> None:
        *problem, on_device, device_bytes, on_host, host_bytes, info, batch = arguments
        dtype = self._check(tuple(problem), batch)
        _, _, jobz, uplo, n, _, a, lda, _, w, _ = problem
        needed = self.sizes[*problem, batch]
        assert device_bytes >= needed[0]
        assert host_bytes >= needed[1]
        ctypes.memset(on_device, 255, device_bytes)
        ctypes.memset(on_host, 255, host_bytes)
        matrices = _view(a, dtype, batch, n, lda)[:, :, :n]
        # A row here is a column there, and the upper triangle is the lower one.
        triangle = "L" if uplo == 1 else "U"
        if jobz:
            values, vectors = np.linalg.eigh(matrices, triangle)
        else:
            values, vectors = np.linalg.eigvalsh(matrices, triangle), None
        if self.spoil is not None:
            self.spoil(values, vectors)
        matrices[...] = np.nan if vectors is None else vectors.swapaxes(1, 2)
        _view(w, dtype, batch, n)[...] = values
        _view(info, np.dtype(np.int32), batch)[...] = [self.info.get(i, 0) for i in range(batch)]


def _view(address: int, dtype: np.dtype, *shape: int) -> np.ndarray:
    """View memory as an array."""
    bytes_ = ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(bytes_.from_address(address), dtype).reshape(shape)


def install(monkeypatch: Any, library: FakeCusolver | None) -> None:
    """Let the package use this library, or none, for CPU tensors as if they were on a GPU."""

    def explain_unsupported(a: torch.Tensor) -> str | None:
        return None if library is not None else "no cuSOLVER"

    monkeypatch.setattr(cusolver, "unsupported", explain_unsupported)
    monkeypatch.setattr(cusolver, "load_library", lambda: library)
    monkeypatch.setattr(cusolver, "_HANDLES", {})
    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM)
    )


class FakeDevice:
    """Stands for `torch.cuda.device`; `entered` is the number of devices that are entered."""

    entered = 0

    def __init__(self, device: torch.device) -> None:
        assert device == torch.device("cpu")

    def __enter__(self) -> None:
        FakeDevice.entered += 1

    def __exit__(self, *_: object) -> None:
        FakeDevice.entered -= 1
