"""Worker processes on this machine: one per GPU, or one per group of CPU cores."""

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
    block_signals,
    make_thread_environment,
)
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.executors.serial import WorkerResult


class PoolExecutor(WorkerExecutor):
    """Measures units in worker processes, and replaces a process that dies.

    Each worker is a pool of one process: in a larger pool, the death of one process would break the
    pool and lose the other processes' units.

    Parameters
    ----------
    task : Task
    devices : sequence of str
        The device of each worker: "cuda:0", "cuda:1", …, or "cpu" once per worker.
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

    def submit(self, worker: int, unit: Unit | None) -> Future[WorkerResult]:
        from repsim_kernels.experiments.runs.executors.serial import measure_unit

        call = partial(measure_unit, self.task, self.devices[worker], unit)
        with suppress(KeyError, BrokenProcessPool):  # not started, or died while idle
            return self._pools[worker].submit(call)
        cores = _select_cores(worker, self.workers, self.task.threads)
        self._pools[worker] = ProcessPoolExecutor(
            1, get_context("spawn"), _initialize_worker, (cores,)
        )
        others = set(active_children())
        # SIGTERM waits until the new process is recorded, because `close` must end that process.
        with _limit_threads(self.task.threads), block_signals(signal.SIGINT, signal.SIGTERM):
            future = self._pools[worker].submit(call)
            self._processes[worker] = set(active_children()) - others
        return future

    def describe_death(self, worker: int, error: BaseException) -> str:
        if not isinstance(error, BrokenProcessPool):
            raise error
        self._pools.pop(worker).shutdown()
        return "was ended by " + ", ".join(
            signal.Signals(-code).name if code < 0 else f"exit code {code}"
            for code in (process.exitcode for process in self._processes.pop(worker))
        )

    def close(self) -> None:
        """Kill the workers; this is safe because parts are written atomically."""
        for process in set[Any]().union(*self._processes.values()):
            process.kill()
        for pool in self._pools.values():
            pool.shutdown()
        self._pools.clear()


def _initialize_worker(cores: Sequence[int]) -> None:
    """Set up a worker process before it imports anything that starts threads."""
    # Keep Ctrl-C blocked, as at the start of this process: the main process handles it.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)


def _exit_with_parent() -> None:
    """Wait for the parent process to end, then exit."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _select_cores(number: int, count: int, threads: int) -> list[int]:
    """Select the cores of a worker; groups don't overlap if there are enough cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    size = max(threads, len(cores) // count)
    return (
        [cores[i % len(cores)] for i in range(number * size, (number + 1) * size)] if cores else []
    )


@contextmanager
def _limit_threads(count: int) -> Iterator[None]:
    """Limit the threads of processes started in the block, by environment variables."""
    before = dict(os.environ)
    os.environ.update(make_thread_environment(count))
    try:
        yield
    finally:
        for name in make_thread_environment(count):
            del os.environ[name]
        os.environ.update(before)
