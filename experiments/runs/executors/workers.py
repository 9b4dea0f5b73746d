"""Handing out a run's units to worker processes, whichever engine runs them."""

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

# A new worker imports this module before it watches its parent: nothing slow may be imported here.
if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.executors.serial import Answer

_STARTS = 3  # workers that may die in a row before one is ready


class WorkerExecutor(ABC):
    """Gives each of its workers a unit at a time, and replaces those that die.

    Parameters
    ----------
    names : sequence of str
        What events call the workers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.workers = names, len(names)

    @abstractmethod
    def submit(self, worker: int, unit: Unit | None) -> Future[Answer]:
        """Call `serial.work` in a worker's process, which is started where there is none."""

    @abstractmethod
    def bury(self, worker: int, error: BaseException) -> str:
        """Say how a worker ended, such as "was ended by SIGKILL"; raises any other error."""

    @abstractmethod
    def close(self) -> None:
        """See `Executor.close`."""

    def wait(self, calls: Collection[Future[Answer]], starting: int) -> set[Future[Answer]]:
        """Wait for one call or more to end, while some workers are still starting."""
        return wait(calls, return_when=FIRST_COMPLETED).done

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """See `Executor.run`. A worker's first call, without a unit, makes its studies."""
        vacant, idle = list(range(self.workers)), list[int]()
        calls: dict[Future[Answer], tuple[int, Unit | None, float]] = {}
        deaths = 0  # in a row, before a worker was ready
        try:
            while units or any(unit for _, unit, _ in calls.values()):
                while idle and units:
                    worker, given = idle.pop(0), units.popleft()
                    calls[self.submit(worker, given)] = worker, given, time.perf_counter()
                    yield Event("started", given, self.names[worker])
                starting = sum(unit is None for _, unit, _ in calls.values())
                for worker in vacant[: max(0, len(units) - starting)]:
                    vacant.remove(worker)
                    calls[self.submit(worker, None)] = worker, None, 0.0
                    starting += 1
                for call in self.wait(calls.keys(), starting):
                    worker, unit, began = calls.pop(call)
                    if (error := call.exception()) is None:
                        idle.append(worker)
                        deaths = 0
                        yield from self._unpack(worker, call.result())
                        continue
                    vacant.append(worker)
                    how = self.bury(worker, error)
                    if unit is not None:
                        seconds, why = time.perf_counter() - began, f"{self.names[worker]} {how}"
                        yield Event("failed", unit, self.names[worker], seconds, 0, why, str(error))
                    elif (deaths := deaths + 1) == _STARTS:
                        raise ExecutorError(
                            f"workers: {deaths} in a row died before they began, the last {how}; "
                            "expected processes that can start"
                        )
        finally:
            self.close()

    def _unpack(self, worker: int, answer: Answer) -> Iterator[Event]:
        if isinstance(answer, Exception):
            raise answer
        event, texts = answer
        for text in texts:
            warnings.warn(text, stacklevel=2)
        if event is not None:
            yield event._replace(worker=self.names[worker])


def thread_limits(count: int) -> dict[str, str]:
    """Environment variables by which libraries decide how many threads to start when loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(count))


@contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Hold signals back until the end of the block; processes started in it begin that way."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
