"""The worker process of one package: it computes, times itself and reports its memory."""

from __future__ import annotations

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

from bench.common import memory
from bench.peers.jobs import Workload, list_pairs, sample_comparisons
from bench.peers.packages import PACKAGES, Package

_MEMORY_SHARE = 0.8  # of the machine's memory; allocations beyond this share fail


def serve(key: str, device: str, connection: Connection) -> None:
    """Answer requests (name, arguments) with (ok, result) until the connection closes."""
    package = next(package for package in PACKAGES if package.key == key)
    if device == "cpu" or package.kind == "numpy":
        _limit_memory()
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
    """Runs a package on one workload after another."""

    def __init__(self, package: Package, device: str) -> None:
        self.package = package
        self.device = device if package.kind != "numpy" else "cpu"
        self._warm_up()

    def _warm_up(self) -> None:
        """Import what the package needs, so that imports are not timed."""
        arrays = np.random.default_rng(0).standard_normal((2, 9, 4), dtype=np.float32)
        x, y = map(self._to_device, arrays)
        if self.package.pair:
            self.package.pair(x, y)
        if self.package.all_pairs:
            self.package.all_pairs([x, y])
        if self.package.ablations:
            self.package.ablations(x, self._to_device(np.arange(4) % 2))

    def forget(self) -> None:
        """Release the inputs, so that other processes have the memory."""
        self.xs: list[Any] = []
        self.labels: Any = None
        self.job_function: Callable[[], Any] | None = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def start(self, workload: Workload, paths: list[Path], by_loop: bool = False) -> dict[str, Any]:
        """Load the inputs, make the first comparisons, and return values, seconds and memory."""
        self.forget()
        self.workload = workload
        # Memory-mapped, so that all processes share the inputs and none is charged for them.
        self.xs = [self._to_device(np.load(path, mmap_mode="c")) for path in paths]
        for x in self.xs:
            x.max()
        self.labels = self._to_device(workload.labels())
        self.job_function = None if by_loop else self._bind_job_function()
        total = workload.n_comparisons
        calls = total if self.job_function else min(total, 2)
        before = self._start_memory()
        start = time.perf_counter()
        values = self._compute_values(calls)
        seconds = time.perf_counter() - start
        memory = self._read_peak_memory() - before
        return {"values": values, "calls": calls, "seconds": seconds, "memory": memory}

    def time_calls(self, calls: int, min_seconds: float) -> float:
        """Return the median seconds of ``calls`` comparisons, repeated for ``min_seconds`` or more.

        The comparison before them is not timed, since caches and pages belonged to other processes.
        """
        self._compute(1)
        self._synchronize()
        times: list[float] = []
        end = time.perf_counter() + min_seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            self._compute(calls)
            self._synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _bind_job_function(self) -> Callable[[], Any] | None:
        """Return the package's function for the whole job; None if users write a loop."""
        function: Any = self.package.job_function(self.workload.job)
        arguments = [self.xs] if self.workload.job == "pairs" else [self.xs[0], self.labels]
        return function and (lambda: function(*arguments))

    def _compute(self, calls: int) -> list[Any]:
        if self.job_function:
            return [self.job_function()]
        pair = self.package.pair
        assert pair is not None
        if self.workload.job == "pair":
            return [pair(*self.xs)]
        which = sample_comparisons(self.workload, calls)
        if self.workload.job == "pairs":
            pairs = list_pairs(self.workload)
            return [pair(self.xs[i], self.xs[j]) for i, j in (pairs[k] for k in which)]
        x = self.xs[0]
        return [pair(x, x * (self.labels != k)) for k in which]

    def _compute_values(self, calls: int) -> np.ndarray:
        """Return the similarities of all comparisons, or of a sample."""
        results = self._compute(calls)
        self._synchronize()
        if not self.job_function:
            return np.array([float(value) for value in results])
        result = results[0].cpu() if torch.is_tensor(results[0]) else results[0]
        values = np.asarray(result, np.float64)
        if self.workload.job == "ablations":
            return 1 - values
        return np.array([values[i, j] for i, j in list_pairs(self.workload)])

    def _to_device(self, x: np.ndarray) -> Any:
        if self.package.kind == "torch":
            return torch.from_numpy(x).to(self.device)
        return importlib.import_module("cupy").asarray(x) if self.package.kind == "cupy" else x

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _start_memory(self) -> int:
        """Reset the peak and return the bytes in use now."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if self.package.kind == "cupy":
                importlib.import_module("cupy").get_default_memory_pool().free_all_blocks()
            return torch.cuda.memory_allocated() + _count_cupy_bytes(self.package)
        return memory.start_peak()

    def _read_peak_memory(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() + _count_cupy_bytes(self.package)
        return memory.read_peak()


def _count_cupy_bytes(package: Package) -> int:
    """Return the size of CuPy's memory pool, its peak because the pool keeps freed blocks."""
    if package.kind != "cupy":
        return 0
    return int(importlib.import_module("cupy").get_default_memory_pool().total_bytes())


def _limit_memory() -> None:
    """Make allocations fail before the system kills a process that uses too much memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory.read_status("VmSize") + int(_MEMORY_SHARE * physical)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
