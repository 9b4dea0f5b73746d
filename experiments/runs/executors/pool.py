"""Processes of this machine: one for each GPU, or for each group of the CPU's cores."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from typing import TYPE_CHECKING, Any

from repsim_kernels.experiments.runs.executors import Task
from repsim_kernels.experiments.runs.executors.workers import (
    WorkerExecutor,
    held_back,
    thread_limits,
)
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.executors.serial import Answer


class PoolExecutor(WorkerExecutor):
    """Measures units in processes of its own, and starts another in place of one that died.

    Each is a pool of one: in a larger pool a death would cost the neighbours' units, too.

    Parameters
    ----------
    task : Task
    devices : sequence of str
        One for each worker: "cuda:0", "cuda:1", …, or "cpu" as often as there should be workers.
    """

    def __init__(self, task: Task, devices: Sequence[str]) -> None:
        super().__init__(
            [
                f"worker {number}" + (f" ({device})" if device != "cpu" else "")
                for number, device in enumerate(devices, 1)
            ]
        )
        self.task, self.devices = task, devices
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._processes: dict[int, set[Any]] = {}

    def submit(self, worker: int, unit: Unit | None) -> Future[Answer]:
        from repsim_kernels.experiments.runs.executors.serial import work

        call = partial(work, self.task, self.devices[worker], unit)
        with suppress(KeyError, BrokenProcessPool):  # not started, or died with nothing to do
            return self._pools[worker].submit(call)
        cores = _cores(worker, self.workers, self.task.threads)
        self._pools[worker] = ProcessPoolExecutor(1, get_context("spawn"), _begin, (cores,))
        others = set(active_children())
        # SIGTERM is held back until the process is known, which `close` must end.
        with _few_threads(self.task.threads), held_back(signal.SIGINT, signal.SIGTERM):
            future = self._pools[worker].submit(call)
            self._processes[worker] = set(active_children()) - others
        return future

    def bury(self, worker: int, error: BaseException) -> str:
        if not isinstance(error, BrokenProcessPool):
            raise error
        self._pools.pop(worker).shutdown()
        return "was ended by " + ", ".join(
            signal.Signals(-code).name if code < 0 else f"exit code {code}"
            for code in (process.exitcode for process in self._processes.pop(worker))
        )

    def close(self) -> None:
        """End the workers at once; a part is written whole or not at all."""
        for process in set[Any]().union(*self._processes.values()):
            process.kill()
        for pool in self._pools.values():
            pool.shutdown()
        self._pools.clear()


def _begin(cores: Sequence[int]) -> None:
    """Set up a worker process, before it imports anything that starts threads."""
    # Ctrl-C stays held back, as it has been from the start: the run's own process decides.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cores(number: int, count: int, threads: int) -> list[int]:
    """The cores of one of several workers: groups that don't overlap, where there are enough."""
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = max(threads, len(ours) // count)
    return [ours[i % len(ours)] for i in range(number * each, (number + 1) * each)] if ours else []


@contextmanager
def _few_threads(count: int) -> Iterator[None]:
    """Set `thread_limits` for the processes that are started in the block."""
    before = dict(os.environ)
    os.environ.update(thread_limits(count))
    try:
        yield
    finally:
        for name in thread_limits(count):
            del os.environ[name]
        os.environ.update(before)
