"""Processes of this machine: one for each GPU, or for each group of the CPU's cores."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from repsim_kernels.experiments.errors import ExecutorError
from repsim_kernels.experiments.runs.executors import Event, Task, told
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study.units import Unit

_STARTS = 3  # workers in a row that die before they are ready, and no more are tried


class Pool:
    """Measures units in processes of its own, and starts another in place of one that died.

    Parameters
    ----------
    task : Task
    devices : sequence of str
        A worker for each: "cuda:0", "cuda:1", …, or "cpu" as often as there are to be workers.
    """

    def __init__(self, task: Task, devices: Sequence[str]) -> None:
        self.task, self.devices = task, list(devices)
        self.workers = len(self.devices)

    def close(self) -> None:
        """It holds nothing but while it runs."""

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """See `Executor.run`."""
        seats = [_Seat(self, number) for number in range(self.workers)]
        died = 0
        try:
            while units or any(seat.unit for seat in seats):
                idle = sum(seat.starting for seat in seats)
                for seat in seats:
                    if seat.process is None and idle < len(units):
                        seat.start()
                        idle += 1
                    elif seat.ready and seat.unit is None and units:
                        yield seat.give(units.popleft())
                living = {seat.connection: seat for seat in seats if seat.process is not None}
                for connection in wait(list(living)):
                    seat = living[connection]  # type: ignore[index]
                    began = seat.ready
                    event = seat.receive()
                    died = 0 if seat.ready else died + (not began)
                    if died == _STARTS:
                        raise ExecutorError(
                            f"workers: {died} in a row died before they began, the last by "
                            f"{seat.death}; expected processes that can start"
                        )
                    if event is not None:
                        yield event
        finally:
            for seat in seats:
                seat.stop()


class _Seat:
    """A place for a process, which may be taken by one after another."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.arguments = pool.task, pool.devices[number], number, pool.workers
        device = pool.devices[number]
        self.name = f"worker {number + 1}" + (f" ({device})" if device != "cpu" else "")
        self.process: Any = None
        self.connection: Connection
        self.unit: Unit | None = None
        self.ready = False
        self.death = ""

    @property
    def starting(self) -> bool:
        return self.process is not None and not self.ready

    def start(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, self.name, *self.arguments), daemon=True
        )
        # Ctrl-C is kept from it from its birth on: its imports take seconds, and it would tell.
        resource_tracker.ensure_running()  # which would unblock it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with few_threads(self.arguments[0].threads):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends when the process does

    def give(self, unit: Unit) -> Event:
        self.unit, self.began = unit, time.perf_counter()
        with suppress(OSError):  # where it has died, what is received next says so
            self.connection.send(unit)
        return Event("started", unit, self.name)

    def receive(self) -> Event | None:
        """What a process says, or what its death means for the unit in its hands."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return self._buried()
        if isinstance(message, Exception):
            raise message
        if message is None:
            self.ready = True
            return None
        self.unit = None
        event, said = message
        for text in said:
            warnings.warn(text, stacklevel=2)
        return Event(*event)

    def _buried(self) -> Event | None:
        self.process.join()
        code, unit = self.process.exitcode, self.unit
        self.death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.stop()
        if unit is None:
            return None
        took = time.perf_counter() - self.began
        error = f"{self.name} was ended by {self.death}"
        return Event("failed", unit, self.name, took, error=error)

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()  # parts are written whole or not at all
        self.process.join()
        self.connection.close()
        self.process, self.unit, self.ready = None, None, False


def _work(
    connection: Connection, name: str, task: Task, device: str, number: int, count: int
) -> None:
    """What a worker process does: build the studies, then measure what it is given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's own process decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    from repsim_kernels.experiments.runs.executors.worker import measured

    try:
        serial = prepare(task, device, name, _cores(number, count, task.threads))
        connection.send(None)
        while True:
            connection.send(measured(serial, connection.recv()))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        connection.send(told(error))
        if not isinstance(error, (ValueError, OSError)):
            raise  # a bug, whose traceback is wanted


def prepare(task: Task, device: str, name: str, cores: Sequence[int]) -> Any:
    """Make the studies again, in a process that is to measure units on these cores alone."""
    import torch

    from repsim_kernels.experiments.runs.executors.worker import Serial
    from repsim_kernels.experiments.runs.membership import join

    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(task.threads)
    store = Store(task.folder)
    studies = task.studies(device)
    join(studies, store)
    return Serial(studies, store, name)


@contextmanager
def few_threads(count: int) -> Iterator[None]:
    """For processes that start now: libraries make their threads when they are loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cores(number: int, count: int, threads: int) -> list[int]:
    """The cores of one of several workers: groups that don't overlap, where there are enough."""
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = max(threads, len(ours) // count)
    return [ours[i % len(ours)] for i in range(number * each, (number + 1) * each)] if ours else []


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
