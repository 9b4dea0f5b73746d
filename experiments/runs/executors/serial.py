"""Measure units in the current process: the serial executor, and the entry point of workers."""

from __future__ import annotations

import gc
import platform
import resource
import socket
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from repsim_kernels import RepsimError
from repsim_kernels.experiments.errors import ExecutorError, StoreError, StudyError, one_line
from repsim_kernels.experiments.runs.executors import Event, Task
from repsim_kernels.experiments.runs.membership import join_run
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.configuration import version_of
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

_PACKAGES = ("repsim-kernels", "torch", "triton", "numpy")


class SerialExecutor:
    """Measures units in this process, one after another.

    Parameters
    ----------
    studies : sequence of Study
    store : Store
        The store of their run.
    """

    workers = 1

    def __init__(self, studies: Sequence[Study], store: Store) -> None:
        self.studies, self.store = studies, store

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """See `Executor.run`. One pass over the images serves as many layers as fit into memory."""
        while units:
            for study in self.studies:
                study_units = [unit for unit in units if unit.model == study.name]
                while study_units:
                    yield from self._measure(study, study_units, units)

    def _measure(
        self, study: Study, study_units: list[Unit], units: deque[Unit]
    ) -> Iterator[Event]:
        """Measure one study's units up to the first failure, removing each from both queues."""
        rows_of_units = measure.rows(study, study_units.copy())
        while study_units:
            unit = study_units.pop(0)
            units.remove(unit)
            started = Event("started", unit, "this process")
            yield started
            start = time.perf_counter()
            if study.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(study.device)
            try:
                rows = next(rows_of_units)
            except Exception as error:
                yield started._replace(
                    kind="failed",
                    seconds=time.perf_counter() - start,
                    memory=_read_peak_memory(study.device),
                    error=_describe_error(error),
                    details=traceback.format_exc(),
                    retryable=not isinstance(error, (StudyError, RepsimError)),
                )
                return
            elapsed, memory = time.perf_counter() - start, _read_peak_memory(study.device)
            self.store.save(
                unit, rows, seconds=elapsed, memory=memory, **_describe_environment(study)
            )
            seconds = time.perf_counter() - start
            yield started._replace(kind="done", seconds=seconds, memory=memory)


#: A worker's result: the unit's last event and the warnings it caused, or the error that ends the
#: run. The error is returned because Ray would surround a raised one with pages of output.
WorkerResult = tuple[Event | None, list[str]] | StoreError | ExecutorError
#: At most one executor, by the run's folder and the device.
_cached_executor: dict[tuple[str, str], SerialExecutor] = {}


def measure_unit(task: Task, device: str, unit: Unit | None) -> WorkerResult:
    """Measure and store a unit in a worker process; without a unit, only make the studies.

    The studies are kept for the process's next calls, until a call is for another run or device.
    """
    try:
        executor = _get_executor(task, device)
        if unit is None:
            return None, []
        with warnings.catch_warnings(record=True) as caught:
            *_, last = executor.run(deque([unit]))
    except Exception as error:
        is_expected = isinstance(error, (ValueError, OSError))
        if not is_expected:
            traceback.print_exc()  # a bug
        text = one_line(error) if is_expected else f"{type(error).__name__}: {one_line(error)}"
        # Any process can unpickle these two; an error that a network raises may not be picklable.
        return StoreError(text) if isinstance(error, StoreError) else ExecutorError(text)
    return last, [str(warning.message) for warning in caught]


def _get_executor(task: Task, device: str) -> SerialExecutor:
    key = task.folder, device
    if key not in _cached_executor:
        if _cached_executor:
            _cached_executor.clear()
            gc.collect()
            torch.cuda.empty_cache()  # Ray may assign the GPU to another process next
        torch.set_num_threads(task.threads)
        store, studies = Store(task.folder), task.make_studies(device)
        join_run(studies, store)
        _cached_executor[key] = SerialExecutor(studies, store)
    return _cached_executor[key]


def _read_peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe_error(error: Exception) -> str:
    text = one_line(error) or "no message"
    is_library_error = isinstance(error, (StudyError, RepsimError))
    return text if is_library_error else f"{type(error).__name__}: {text}"


def _describe_environment(study: Study) -> dict[str, Any]:
    """Describe the device, host, settings and versions that a part is measured with."""
    gpu = study.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(study.device) if gpu else "CPU",
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "memory_budget": study.memory,
        "versions": {"python": platform.python_version()} | {n: version_of(n) for n in _PACKAGES},
    }
