"""A process for one package: it answers, is timed, and says what memory it took."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers.jobs import Case, pairs_of, sample
from bench.peers.packages import PACKAGES, Package

_SHARE = 0.8  # of the machine's memory that a package may take before it is said to fail


def serve(key: str, device: str, connection: Connection) -> None:
    """Answer requests until there are no more: (name, arguments) in, (ok, result) out."""
    package = next(package for package in PACKAGES if package.key == key)
    if device == "cpu" or package.kind == "numpy":
        _bound_memory()
    worker = None
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            worker = worker or Worker(package, device)
            answer = True, getattr(worker, name)(*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}".splitlines()[0][:300]
        connection.send(answer)


class Worker:
    """A package at one case after the other."""

    def __init__(self, package: Package, device: str) -> None:
        self.package = package
        self.device = device if package.kind != "numpy" else "cpu"
        self._warm_up()

    def _warm_up(self) -> None:
        """Import what the package needs, so that no job is charged for it."""
        some = np.random.default_rng(0).standard_normal((2, 9, 4), dtype=np.float32)
        x, y = map(self._on_device, some)
        if self.package.pair:
            self.package.pair(x, y)
        if self.package.all_pairs:
            self.package.all_pairs([x, y])
        if self.package.ablations:
            self.package.ablations(x, self._on_device(np.arange(4) % 2))

    def forget(self) -> None:
        """Let go of the inputs, so that others have the memory."""
        self.xs: list[Any] = []
        self.labels = self.whole = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def first(self, case: Case, paths: list[Path], by_loop: bool = False) -> dict[str, Any]:
        """Load the inputs and make the job's first comparisons: values, seconds, memory."""
        self.forget()
        self.case = case
        # Mapped, not read: the processes share the memory, and what they take is beside it.
        self.xs = [self._on_device(np.load(path, mmap_mode="c")) for path in paths]
        for x in self.xs:
            x.max()
        self.labels = self._on_device(case.labels())
        self.whole = None if by_loop else self._whole()
        calls = case.of if self.whole else min(case.of, 2)
        before = self._start_memory()
        start = time.perf_counter()
        values = self._values(calls)
        seconds = time.perf_counter() - start
        memory = self._peak_memory() - before
        return {"values": values, "calls": calls, "seconds": seconds, "memory": memory}

    def time(self, calls: int, least: float) -> float:
        """Seconds of so many of the job's comparisons: the median of as many as `least` s allow.

        One before does not count: it finds caches and pages that others had.
        """
        self._compute(1)
        self._synchronize()
        found: list[float] = []
        end = time.perf_counter() + least
        while not found or time.perf_counter() < end:
            start = time.perf_counter()
            self._compute(calls)
            self._synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def _whole(self) -> Callable[[], Any] | None:
        """The package's own way to the whole job; None where users write a loop."""
        function: Any = self.package.whole(self.case.job)
        arguments = [self.xs] if self.case.job == "pairs" else [self.xs[0], self.labels]
        return function and (lambda: function(*arguments))

    def _compute(self, calls: int) -> list[Any]:
        if self.whole:
            return [self.whole()]
        pair = self.package.pair
        assert pair is not None
        if self.case.job == "pair":
            return [pair(*self.xs)]
        which = sample(self.case, calls)
        if self.case.job == "pairs":
            pairs = pairs_of(self.case)
            return [pair(self.xs[i], self.xs[j]) for i, j in (pairs[k] for k in which)]
        x = self.xs[0]
        return [pair(x, x * (self.labels != k)) for k in which]

    def _values(self, calls: int) -> np.ndarray:
        """Similarities, of all comparisons or of those in the sample."""
        found = self._compute(calls)
        self._synchronize()
        if not self.whole:
            return np.array([float(value) for value in found])
        values = np.asarray(found[0].cpu() if torch.is_tensor(found[0]) else found[0], np.float64)
        if self.case.job == "ablations":
            return 1 - values
        return np.array([values[i, j] for i, j in pairs_of(self.case)])

    def _on_device(self, x: np.ndarray) -> Any:
        if self.package.kind == "torch":
            return torch.from_numpy(x).to(self.device)
        return importlib.import_module("cupy").asarray(x) if self.package.kind == "cupy" else x

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _start_memory(self) -> int:
        """Bytes in use now, from which the peak is counted."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if self.package.kind == "cupy":
                importlib.import_module("cupy").get_default_memory_pool().free_all_blocks()
            return torch.cuda.memory_allocated() + _cupy_bytes(self.package)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    def _peak_memory(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() + _cupy_bytes(self.package)
        return _status("VmHWM")


def _cupy_bytes(package: Package) -> int:
    """What CuPy's pool holds: it keeps what was freed, so that this is its peak."""
    if package.kind != "cupy":
        return 0
    return int(importlib.import_module("cupy").get_default_memory_pool().total_bytes())


def _status(name: str) -> int:
    """A count of bytes that Linux keeps of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status")


def _bound_memory() -> None:
    """Let allocations fail before the machine kills a process for them."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = _status("VmSize") + int(_SHARE * physical)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
