"""A Ray cluster: a task for each unit, on a GPU or on a group of CPU cores."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from repsim_kernels.experiments.errors import ExecutorError, one_line
from repsim_kernels.experiments.runs.executors import Task
from repsim_kernels.experiments.runs.executors.workers import (
    WorkerExecutor,
    held_back,
    thread_limits,
)
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.executors.serial import Answer

_PATIENCE = 30.0  # seconds until a warning that the cluster lets workers wait
_KNOCK = 10.0  # seconds for a cluster's port to answer
_ROOM = 28  # bytes of a folder that Ray's sockets still fit below: AF_UNIX takes paths of 107


class RayExecutor(WorkerExecutor):
    """Measures each unit in a task of a Ray cluster, which stores it.

    Ray runs tasks in processes that it keeps for the run's later ones. Each has studies of its
    own, so that as many hold some as tasks can run at once, and those that Ray has let idle.

    Parameters
    ----------
    task : Task
        Its folder, and the files that its studies are made of, are on all machines.
    device : str
        "cuda": a worker for each GPU. "cpu": one for each ``task.threads`` cores.
    address : str, optional
        A cluster's; that in RAY_ADDRESS by default, else one is started on this machine and ended
        by `close`, for this process alone.
    workers : int, optional
        How many tasks at a time; as many as the cluster holds by default.

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
        # Ray prints a page about each process that dies, unless it is told so when imported.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        try:
            import ray
        except ImportError:
            raise ExecutorError(
                "executor: ray is not installed; expected `pip install 'repsim-kernels[ray]'` "
                "to have been run"
            ) from None
        gpu = device.startswith("cuda")
        self._each = "1 GPU" if gpu else _counted(task.threads, "core")
        with ExitStack() as stack:
            given = address or os.environ.get("RAY_ADDRESS")
            _connect(stack, None if given == "local" else given, gpu, task.threads)
            count = _check_room(workers, gpu, task.threads, self._each)
            remote: Any = ray.remote(
                num_cpus=0 if gpu else task.threads,
                num_gpus=int(gpu),
                max_calls=0,  # processes are kept; Ray would end those of tasks with a GPU
                max_retries=0,  # the run's own loop tries units again
            )
            self._work, self._arguments = remote(_work), (ray.put(task), os.getcwd(), gpu)
            self._open = stack.pop_all()
        super().__init__([f"worker {number}" for number in range(1, count + 1)])
        self._warn_at: float | None = time.monotonic() + _PATIENCE

    def close(self) -> None:
        """Leave the cluster, which ends this run's tasks, or end it where it was started here."""
        self._open.close()

    def submit(self, worker: int, unit: Unit | None) -> Future[Answer]:
        future: Future[Answer] = self._work.remote(*self._arguments, unit).future()
        return future

    def bury(self, worker: int, error: BaseException) -> str:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            raise ExecutorError(f"{self.names[worker]}: {one_line(error.cause)}") from error
        if not isinstance(error, RayError):
            raise error
        return "died: its process was ended, or its machine was lost"

    def wait(self, calls: Collection[Future[Answer]], starting: int) -> set[Future[Answer]]:
        if self._warn_at is None or not starting:
            return super().wait(calls, starting)
        done = wait(calls, max(0.0, self._warn_at - time.monotonic()), FIRST_COMPLETED).done
        if time.monotonic() >= self._warn_at:
            self._warn_at = None
            warnings.warn(
                f"waiting for the cluster: {starting} of {self.workers} workers are not up; each "
                f"needs {self._each} that nobody holds, and makes its studies first",
                stacklevel=3,
            )
        return done


def _work(task: Task, folder: str, gpu: bool, unit: Unit | None) -> Answer:
    """`serial.work` as a task of Ray's."""
    from repsim_kernels.experiments.runs.executors.serial import work

    if os.path.isdir(folder):
        os.chdir(folder)
    return work(task, _lent_gpu() if gpu else "cpu", unit)


def _lent_gpu() -> str:
    """The GPU that this task may use: Ray may lend a process another one for each task."""
    import ray

    lent = ray.get_runtime_context().get_accelerator_ids()["GPU"][0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(lent) if visible else lent}"


def _connect(stack: ExitStack, address: str | None, gpu: bool, threads: int) -> None:
    """Join a cluster, or start one; the stack leaves or ends it."""
    options: dict[str, Any] = {}
    if address is None:
        options = _options_of_our_own(stack, gpu)
    else:
        _knock(address)
    import ray
    from ray.exceptions import RayError

    environment = thread_limits(threads) | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        # A process can't change the GPU that it sees, but is given tasks with another: `_lent_gpu`.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    stack.callback(ray.shutdown)
    handler = signal.getsignal(signal.SIGTERM)
    # Ctrl-C waits for a cluster of our own: the processes of one that is half begun would stay.
    held = [signal.SIGINT] if address is None else []
    try:
        with held_back(*held):
            ray.init(
                address or "local",
                runtime_env={"env_vars": environment},
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **options,
            )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        where = "one on this machine" if address is None else f"the one at {address}"
        raise ExecutorError(
            f"address: {where} can't be used ({one_line(error)}); expected a Ray cluster"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


def _knock(address: str) -> None:
    """Raise at once where nothing listens at HOST:PORT: Ray tries for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():
        return  # "auto", or a Ray client's
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()
    except (OSError, OverflowError) as error:
        raise ExecutorError(
            f"address: nothing answers at {address} ({error}); expected a Ray cluster"
        ) from error


def _options_of_our_own(stack: ExitStack, gpu: bool) -> dict[str, Any]:
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


def _check_room(wanted: int | None, gpu: bool, threads: int, each: str) -> int:
    """How many workers there are to be; what each needs must be all of one machine."""
    import ray

    name, noun, size = ("GPU", "GPU", 1) if gpu else ("CPU", "core", threads)
    found: Any = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"].get(name, 0) for node in found if node["Alive"]]
    room = sum(int(has // size) for has in nodes)
    if room == 0 or not 1 <= (room if wanted is None else wanted) <= room:
        raise ExecutorError(
            f"workers: {'one or more' if wanted is None else wanted} of {each} each for a cluster "
            f"of {_counted(len(nodes), 'machine')} with {_counted(int(sum(nodes)), noun)}, which "
            f"holds {room}; expected "
            + (f"from 1 to {room}" if room else "a larger cluster, or fewer threads")
        )
    return room if wanted is None else wanted


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
