"""A Ray cluster: one task per unit, on a GPU or on a group of CPU cores."""

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
    block_signals,
    make_thread_environment,
)
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.runs.executors.serial import WorkerResult

_PATIENCE = 30.0  # seconds in which workers may start before a warning says that some have not
_CONNECT_TIMEOUT = 10.0  # seconds for a cluster's port to answer
# Longest temporary folder, in bytes, that leaves room for the paths of Ray's sockets: AF_UNIX
# allows 107 bytes.
_MAX_FOLDER_LENGTH = 28


class RayExecutor(WorkerExecutor):
    """Measures and stores each unit in a task of a Ray cluster.

    Ray reuses its processes for later tasks of the run. Each process keeps its own studies, so the
    number of copies is the number of parallel tasks, plus any processes that Ray leaves idle.

    Parameters
    ----------
    task : Task
        All machines must see its folder and the files from which its studies are made.
    device : str
        "cuda": one worker per GPU. "cpu": one worker per ``task.threads`` cores.
    address : str, optional
        Address of a cluster; by default that in RAY_ADDRESS. Without either, a private cluster is
        started on this machine, and `close` ends it.
    workers : int, optional
        Number of parallel tasks; by default as many as the cluster can run.

    Raises
    ------
    ExecutorError
        Ray is not installed, the cluster can't be reached, or it is too small for ``workers``.
    """

    def __init__(
        self,
        task: Task,
        device: str = "cpu",
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        check_available(address)
        import ray

        gpu = device.startswith("cuda")
        self._needs = "1 GPU" if gpu else _format_count(task.threads, "core")
        with ExitStack() as stack:
            _connect(stack, _resolve_address(address), gpu, task.threads)
            count = _count_workers(workers, gpu, task.threads, self._needs)
            remote: Any = ray.remote(
                num_cpus=0 if gpu else task.threads,
                num_gpus=int(gpu),
                max_calls=0,  # keep processes; by default Ray ends those of tasks with a GPU
                max_retries=0,  # the run's own loop retries units
            )
            self._task, self._arguments = remote(_measure_unit), (ray.put(task), os.getcwd(), gpu)
            self._connection = stack.pop_all()
        super().__init__([f"worker {number}" for number in range(1, count + 1)])
        self._warn_at = time.monotonic() + _PATIENCE
        self._has_warned = False

    def close(self) -> None:
        """Disconnect, which ends this run's tasks; a cluster that was started here is shut down."""
        self._connection.close()

    def submit(self, worker: int, unit: Unit | None) -> Future[WorkerResult]:
        future: Future[WorkerResult] = self._task.remote(*self._arguments, unit).future()
        return future

    def describe_death(self, worker: int, error: BaseException) -> str:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            raise ExecutorError(f"{self.names[worker]}: {one_line(error.cause)}") from error
        if not isinstance(error, RayError):
            raise error
        return "died: its process was killed or its machine was lost"

    def wait(
        self, calls: Collection[Future[WorkerResult]], starting: int
    ) -> set[Future[WorkerResult]]:
        if self._has_warned or not starting:
            done = super().wait(calls, starting)
            self._warn_at = time.monotonic() + _PATIENCE  # a worker that died starts again
            return done
        done = wait(calls, max(0.0, self._warn_at - time.monotonic()), FIRST_COMPLETED).done
        if time.monotonic() >= self._warn_at:
            self._has_warned = True
            warnings.warn(
                f"waiting for the cluster: {starting} of {self.workers} workers have not started; "
                f"each needs {self._needs} free, and first makes its studies",
                stacklevel=3,
            )
        return done


def _measure_unit(task: Task, folder: str, gpu: bool, unit: Unit | None) -> WorkerResult:
    """Call `serial.measure_unit` as a Ray task."""
    from repsim_kernels.experiments.runs.executors.serial import measure_unit

    if os.path.isdir(folder):
        os.chdir(folder)
    return measure_unit(task, _find_assigned_gpu() if gpu else "cpu", unit)


def _find_assigned_gpu() -> str:
    """Find the GPU of this task; Ray may assign each task of a process a different one."""
    import ray

    gpu = ray.get_runtime_context().get_accelerator_ids()["GPU"][0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(gpu) if visible else gpu}"


def _connect(stack: ExitStack, address: str | None, gpu: bool, threads: int) -> None:
    """Connect to a cluster, or start one; the stack disconnects or shuts it down."""
    options: dict[str, Any] = {}
    if address is None:
        options = _make_private_cluster_options(stack, gpu)
    import ray
    from ray.exceptions import RayError

    environment = make_thread_environment(threads) | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        # A process can't change which GPUs it sees, but may get tasks on another GPU, which
        # `_find_assigned_gpu` looks up.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    stack.callback(ray.shutdown)
    handler = signal.getsignal(signal.SIGTERM)
    # Ctrl-C waits until a private cluster has started: a partly started one would leave processes.
    blocked = [signal.SIGINT] if address is None else []
    try:
        with block_signals(*blocked):
            ray.init(
                address or "local",
                runtime_env={"env_vars": environment},
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **options,
            )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        place = "on this machine" if address is None else f"at {address}"
        raise ExecutorError(
            f"address: no connection to the cluster {place} ({one_line(error)}); "
            "expected a Ray cluster"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray installs its own


def check_available(address: str | None) -> None:
    """Raise ExecutorError if Ray is not installed or nothing listens at a cluster's HOST:PORT.

    Without this check Ray would retry a connection for a quarter of an hour.
    """
    # Ray reads this at import; by default it prints a page about each process that dies.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ExecutorError(
            "executor: ray is not installed; in a checkout of repsim_kernels run: "
            "pip install '.[experiments,ray]'"
        ) from None
    address = _resolve_address(address) or ""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():
        return  # a private cluster, "auto", or a Ray client's address
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExecutorError(
            f"address: nothing answers at {address} ({reason}); expected a Ray cluster"
        ) from error


def _resolve_address(address: str | None) -> str | None:
    """Return the address of the cluster to join; None to start a private one."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def _make_private_cluster_options(stack: ExitStack, gpu: bool) -> dict[str, Any]:
    """Make options of a cluster that only this process uses and that leaves no files behind."""
    import torch

    # By default Ray writes a new cluster's token to the home directory and leaves it there. The
    # environment of our processes keeps it just as secret. Without a token, any user of this
    # machine could run code through the cluster's ports.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    parent = tempfile.gettempdir()
    if len(parent) > _MAX_FOLDER_LENGTH:
        parent = "/tmp"
    folder = stack.enter_context(
        tempfile.TemporaryDirectory(prefix="ray-", dir=parent, ignore_cleanup_errors=True)
    )
    return {
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "num_gpus": torch.cuda.device_count() if gpu else 0,
        "include_dashboard": False,
        "_temp_dir": os.path.join(folder, "t"),  # Ray's default folder is open to all users
    }


def _count_workers(workers: int | None, gpu: bool, threads: int, each: str) -> int:
    """Return the number of workers, each of which must fit onto a single machine."""
    import ray

    name, noun, size = ("GPU", "GPU", 1) if gpu else ("CPU", "core", threads)
    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    resources = [node["Resources"].get(name, 0) for node in nodes if node["Alive"]]
    capacity = sum(int(amount // size) for amount in resources)
    if capacity == 0 or not 1 <= (capacity if workers is None else workers) <= capacity:
        raise ExecutorError(
            f"workers: {'1 or more' if workers is None else workers} with {each} each, but the "
            f"cluster of {_format_count(len(resources), 'machine')} with "
            f"{_format_count(int(sum(resources)), noun)} has capacity for {capacity}; expected "
            + (f"from 1 to {capacity}" if capacity else "a larger cluster, or fewer threads")
        )
    return capacity if workers is None else workers


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
