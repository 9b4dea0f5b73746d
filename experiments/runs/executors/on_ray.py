"""A Ray cluster: a resident actor for each GPU, or for each group of CPU cores."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repsim_kernels.experiments.errors import ExecutorError
from repsim_kernels.experiments.runs.executors import Event, Task, told
from repsim_kernels.experiments.runs.executors.pool import few_threads, prepare
from repsim_kernels.experiments.study.units import Unit

_RESTARTS = 3  # of an actor, by Ray
_PATIENCE = 30.0  # seconds until it is said that the cluster lets actors wait
_KNOCK = 10.0  # seconds for a cluster's port to answer
_ROOM = 28  # bytes of a folder that Ray's sockets still fit below: AF_UNIX takes paths of 107
_CHECKOUT = str(Path(__file__).parents[4])


class RayActors:
    """Measures units in actors of a Ray cluster, which store what they measure themselves.

    There are no Ray tasks: actors that hold every CPU would let one wait for ever.

    Parameters
    ----------
    task : Task
        Its folder, and the files that its studies are made of, are on all machines.
    device : str
        "cuda": an actor for each GPU. "cpu": one for each ``task.threads`` cores.
    address : str, optional
        A cluster's; that in RAY_ADDRESS by default, else one is started on this machine and ended
        by `close`, for this process alone.
    workers : int, optional
        How many actors; as many as the cluster holds by default.

    Raises
    ------
    ExecutorError
        Ray is not installed, the cluster can't be reached, or it can't hold so many.
    """

    def __init__(
        self,
        task: Task,
        device: str = "cpu",
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        if find_spec("ray") is None:
            raise ExecutorError(
                "executor: ray is not installed; expected `pip install 'repsim-kernels[ray]'` "
                "to have been run"
            )
        self.task, self.gpu = task, device.startswith("cuda")
        with ExitStack() as stack:
            given = address or os.environ.get("RAY_ADDRESS")
            _connect(stack, None if given == "local" else given, self.gpu, task.threads)
            self.workers = self._room(workers)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Leave the cluster, or end it where it was started here; `run` ends with it."""
        self._open.close()

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """See `Executor.run`."""
        import ray

        seats: list[_Seat] = []
        try:
            for number in range(min(self.workers, len(units))):
                seats.append(_Seat(self, number))
            soon: float | None = time.monotonic() + _PATIENCE
            while units or any(seat.unit for seat in seats):
                for seat in seats:
                    if seat.call is None and units:
                        yield seat.give(units.popleft())
                calls = {seat.call: seat for seat in seats if seat.call is not None}
                wait = None if soon is None else max(0.0, soon - time.monotonic())
                done, _ = ray.wait(list(calls), timeout=wait)
                if soon is not None and time.monotonic() >= soon:
                    _say_who_is_missing(seats, self._each)
                    soon = None
                for call in done:
                    event = calls[call].receive()
                    if event is not None:
                        yield event
        finally:
            for seat in seats:
                ray.kill(seat.actor)  # parts are written whole or not at all
            self.close()

    @property
    def _each(self) -> str:
        return "1 GPU" if self.gpu else _counted(self.task.threads, "core")

    def _room(self, wanted: int | None) -> int:
        """How many actors there are to be; an actor's resources are all of one machine."""
        import ray

        name, noun, each = ("GPU", "GPU", 1) if self.gpu else ("CPU", "core", self.task.threads)
        found: Any = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = [node["Resources"].get(name, 0) for node in found if node["Alive"]]
        room = sum(int(has // each) for has in nodes)
        if room == 0 or not 1 <= (room if wanted is None else wanted) <= room:
            raise ExecutorError(
                f"workers: {'one or more' if wanted is None else wanted} of {self._each} each for "
                f"a cluster of {_counted(len(nodes), 'machine')} with "
                f"{_counted(int(sum(nodes)), noun)}, "
                f"which holds {room}; expected "
                + (f"from 1 to {room}" if room else "a larger cluster, or fewer threads")
            )
        return room if wanted is None else wanted


class _Seat:
    """An actor as this process sees it."""

    def __init__(self, executor: RayActors, number: int) -> None:
        self.executor, self.number = executor, number
        self.name = f"actor {number + 1}"
        self.unit: Unit | None = None
        self._start()

    def _start(self) -> None:
        import ray
        from ray.cloudpickle import dumps

        gpu, task = self.executor.gpu, self.executor.task
        device = "cuda:0" if gpu else "cpu"  # Ray shows an actor its own GPU alone
        path = [os.path.abspath(entry) for entry in sys.path]
        kind: Any = ray.remote(_Actor)
        known = dumps(task)  # type: ignore[no-untyped-call]
        self.actor = kind.options(
            num_cpus=0 if gpu else task.threads,
            num_gpus=1 if gpu else 0,
            max_restarts=_RESTARTS,
            max_task_retries=0,  # the run's own loop tries units again
        ).remote(known, device, self.name, os.getcwd(), path)
        self.up = False
        self._ask()

    def _ask(self) -> None:
        """Call for its being ready: an answer comes when it is, however often it has to start."""
        self.call: Any = self.actor.ready.options(max_task_retries=-1).remote()

    def give(self, unit: Unit) -> Event:
        self.unit, self.began = unit, time.perf_counter()
        self.call = self.actor.measure.remote(unit)
        return Event("started", unit, self.name)

    def receive(self) -> Event | None:
        """What an actor says, or what its death means for the unit in its hands."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = ray.get(self.call)
        except RayTaskError as error:
            raise ExecutorError(f"{self.name}: {_line(error)}") from error
        except RayError as error:
            return self._died(error)
        self.call = None
        if isinstance(answer, Exception):
            raise answer
        if self.unit is None:
            self.up = True
            return None
        self.unit = None
        event, said = answer
        for text in said:
            warnings.warn(text, stacklevel=2)
        return Event(*event)._replace(worker=self.name)

    def _died(self, error: Exception) -> Event | None:
        unit, self.unit = self.unit, None
        if unit is not None:
            self._ask()
            took = time.perf_counter() - self.began
            why = f"{self.name} died: its process was ended, or its machine was lost"
            return Event("failed", unit, self.name, took, error=why, details=str(error))
        if not self.up:
            raise ExecutorError(
                f"workers: {self.name} was started {_RESTARTS + 1} times, and its process ended "
                "each time before it had its studies; expected actors that can start"
            ) from error
        self._start()  # Ray has restarted it as often as it was to
        return None


class _Actor:
    """A process of the cluster that holds the studies, and measures one unit after another."""

    def __init__(
        self, task: bytes, device: str, name: str, folder: str, path: Sequence[str]
    ) -> None:
        self.error: Exception | None = None
        try:
            if os.path.isdir(folder):
                os.chdir(folder)
            sys.path += [entry for entry in path if entry not in sys.path and os.path.exists(entry)]
            self.serial = prepare(pickle.loads(task), device, name, ())
        except Exception as error:  # told when it is asked for: a constructor's own are no one line
            self.error = told(error)

    def ready(self) -> Exception | None:
        """Why the studies can't be made, if they can't."""
        return self.error

    def measure(self, unit: Unit) -> tuple[tuple[Any, ...], list[str]] | Exception:
        """Measure and store a unit: the last event, and what was warned of meanwhile."""
        from repsim_kernels.experiments.runs.executors.worker import measured

        try:
            last, said = measured(self.serial, unit)
        except Exception as error:
            return told(error)
        return tuple(last), said


def _connect(stack: ExitStack, address: str | None, gpu: bool, threads: int) -> None:
    """Join a cluster, or start one; the stack leaves or ends it."""
    options: dict[str, Any] = {}
    if address is None:
        options = _of_our_own(stack, gpu)
    else:
        _knock(address)
    import ray
    from ray.exceptions import RayError
    from ray.job_config import JobConfig

    stack.callback(ray.shutdown)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with few_threads(threads), _undisturbed(address is None):
            ray.init(
                address or "local",
                job_config=JobConfig(code_search_path=[_CHECKOUT]),
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **options,
            )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        where = "one on this machine" if address is None else f"the one at {address}"
        raise ExecutorError(
            f"address: {where} can't be used ({_line(error)}); expected a Ray cluster"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    # Nothing public keeps Ray from printing a page about each process that dies.
    ray._private.worker._worker_logs_enabled = False


def _knock(address: str) -> None:
    """Say at once that nothing listens at HOST:PORT: Ray tries again for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():
        return  # "auto", or a Ray client's
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()
    except (OSError, OverflowError) as error:
        raise ExecutorError(
            f"address: nothing answers at {address} ({error}); expected a Ray cluster"
        ) from error


def _of_our_own(stack: ExitStack, gpu: bool) -> dict[str, Any]:
    """Options of a cluster that nobody else uses and that leaves nothing behind."""
    import torch

    # By default a new cluster's token is written to the home directory and stays there. In the
    # environment of our processes it is as secret, and without one anybody on this machine could
    # run code through the cluster's ports.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    where = tempfile.gettempdir()
    folder = stack.enter_context(
        tempfile.TemporaryDirectory(
            prefix="ray-", dir=where if len(where) <= _ROOM else "/tmp", ignore_cleanup_errors=True
        )
    )
    return {
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "num_gpus": torch.cuda.device_count() if gpu else 0,
        "include_dashboard": False,
        "_temp_dir": os.path.join(folder, "t"),  # Ray lets all users into its own
    }


@contextmanager
def _undisturbed(hold: bool) -> Iterator[None]:
    """Hold Ctrl-C back, where asked: processes of a cluster that is half begun would stay."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT} if hold else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say_who_is_missing(seats: Sequence[_Seat], each: str) -> None:
    up = sum(seat.up for seat in seats)
    if up < len(seats):
        warnings.warn(
            f"waiting for the cluster: {up} of {len(seats)} actors are up; each needs {each} that "
            "nobody holds, and makes its studies first",
            stacklevel=3,
        )


def _line(error: Exception) -> str:
    """The last thing that an error of Ray's says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
