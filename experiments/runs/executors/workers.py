"""Distribute a run's units over worker processes, whichever engine runs them."""

from __future__ import annotations

import signal
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

from repsim_kernels.experiments.errors import ExecutorError
from repsim_kernels.experiments.runs.executors import Event
from repsim_kernels.experiments.study.units import Unit

# A new worker imports this module before it watches its parent, so keep these imports fast.
if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.executors.serial import WorkerResult

_MAX_FAILED_STARTS = 3  # consecutive workers that may die before one is ready


class WorkerExecutor(ABC):
    """Gives each worker one unit after another, and replaces workers that die.

    Parameters
    ----------
    names : sequence of str
        The workers' names in events.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.workers = names, len(names)

    @abstractmethod
    def submit(self, worker: int, unit: Unit | None) -> Future[WorkerResult]:
        """Call `serial.measure_unit` in a worker's process, starting the process if necessary."""

    @abstractmethod
    def describe_death(self, worker: int, error: BaseException) -> str:
        """Describe how a worker died, such as "was ended by SIGKILL"; re-raise any other error."""

    @abstractmethod
    def close(self) -> None:
        """See `Executor.close`."""

    def wait(
        self, calls: Collection[Future[WorkerResult]], starting: int
    ) -> set[Future[WorkerResult]]:
        """Wait until at least one call ends; ``starting`` workers are not ready yet."""
        return wait(calls, return_when=FIRST_COMPLETED).done

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """See `Executor.run`. A worker's first call has no unit and makes its studies."""
        vacant, idle = list(range(self.workers)), list[int]()
        calls: dict[Future[WorkerResult], tuple[int, Unit | None, float]] = {}
        deaths = 0  # consecutive, before a worker was ready
        try:
            while units or any(unit for _, unit, _ in calls.values()):
                while idle and units:
                    worker, next_unit = idle.pop(0), units.popleft()
                    calls[self.submit(worker, next_unit)] = worker, next_unit, time.perf_counter()
                    yield Event("started", next_unit, self.names[worker])
                starting = sum(unit is None for _, unit, _ in calls.values())
                for worker in vacant[: max(0, len(units) - starting)]:
                    vacant.remove(worker)
                    calls[self.submit(worker, None)] = worker, None, 0.0
                    starting += 1
                for call in self.wait(calls.keys(), starting):
                    worker, unit, start = calls.pop(call)
                    if (error := call.exception()) is None:
                        idle.append(worker)
                        deaths = 0
                        yield from self._unpack(worker, call.result())
                        continue
                    vacant.append(worker)
                    death = self.describe_death(worker, error)
                    if unit is not None:
                        name, seconds = self.names[worker], time.perf_counter() - start
                        yield Event("failed", unit, name, seconds, 0, f"{name} {death}", str(error))
                    elif (deaths := deaths + 1) == _MAX_FAILED_STARTS:
                        raise ExecutorError(
                            f"workers: {deaths} in a row died while starting, the last {death}; "
                            "expected processes that can start"
                        )
        finally:
            self.close()

    def _unpack(self, worker: int, result: WorkerResult) -> Iterator[Event]:
        if isinstance(result, Exception):
            raise result
        event, messages = result
        for message in messages:
            warnings.warn(message, stacklevel=2)
        if event is not None:
            yield event._replace(worker=self.names[worker])


def make_thread_environment(count: int) -> dict[str, str]:
    """Make the environment variables that limit the threads of libraries, read at import."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(count))


@contextmanager
def block_signals(*signals: signal.Signals) -> Iterator[None]:
    """Block signals until the end of the block; processes started in it inherit this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
