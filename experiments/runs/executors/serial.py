"""Measuring in this process: the serial executor, and what every worker process runs."""

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
    """Measures units in this process, one after the other.

    Parameters
    ----------
    studies : sequence of Study
    store : Store
        Of their run.
    """

    workers = 1

    def __init__(self, studies: Sequence[Study], store: Store) -> None:
        self.studies, self.store = studies, store

    def close(self) -> None:
        """Do nothing: it holds nothing."""

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """See `Executor.run`. One pass of the images serves as many layers as memory holds."""
        while units:
            for study in self.studies:
                mine = [unit for unit in units if unit.model == study.name]
                while mine:
                    yield from self._measure(study, mine, units)

    def _measure(self, study: Study, mine: list[Unit], units: deque[Unit]) -> Iterator[Event]:
        """Measure one study's units up to the first that fails, and take them off both lists."""
        measured = measure.rows(study, mine.copy())
        while mine:
            unit = mine.pop(0)
            units.remove(unit)
            started = Event("started", unit, "this process")
            yield started
            start = time.perf_counter()
            if study.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(study.device)
            try:
                rows = next(measured)
            except Exception as error:
                yield started._replace(
                    what="failed",
                    seconds=time.perf_counter() - start,
                    memory=_memory(study.device),
                    error=_line(error),
                    details=traceback.format_exc(),
                    again=not isinstance(error, (StudyError, RepsimError)),
                )
                return
            took, memory = time.perf_counter() - start, _memory(study.device)
            self.store.save(unit, rows, seconds=took, memory=memory, **_facts(study))
            seconds = time.perf_counter() - start
            yield started._replace(what="done", seconds=seconds, memory=memory)


#: What a worker process returns: a unit's last event and the warnings meanwhile, or the error
#: that ends the run. Errors are returned: raised, Ray would wrap them in pages of its own.
Answer = tuple[Event | None, list[str]] | StoreError | ExecutorError
_made: dict[tuple[str, str], SerialExecutor] = {}  # at most one, by the run's folder and the device


def work(task: Task, device: str, unit: Unit | None) -> Answer:
    """Measure and store a unit in a worker process; without a unit, only make the studies.

    The studies are kept for the process's next call, until one is for another run or device.
    """
    try:
        serial = _serial(task, device)
        if unit is None:
            return None, []
        with warnings.catch_warnings(record=True) as caught:
            *_, last = serial.run(deque([unit]))
    except Exception as error:
        plain = isinstance(error, (ValueError, OSError))
        if not plain:
            traceback.print_exc()  # a bug
        text = one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"
        # Any process can unpickle these two, which can't be said of what a network raises.
        return StoreError(text) if isinstance(error, StoreError) else ExecutorError(text)
    return last, [str(each.message) for each in caught]


def _serial(task: Task, device: str) -> SerialExecutor:
    key = task.folder, device
    if key not in _made:
        if _made:
            _made.clear()
            gc.collect()
            torch.cuda.empty_cache()  # Ray may lend the GPU to another process now
        torch.set_num_threads(task.threads)
        store, studies = Store(task.folder), task.studies(device)
        join_run(studies, store)
        _made[key] = SerialExecutor(studies, store)
    return _made[key]


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line(error: Exception) -> str:
    text = one_line(error) or "no message"
    ours = isinstance(error, (StudyError, RepsimError))
    return text if ours else f"{type(error).__name__}: {text}"


def _facts(study: Study) -> dict[str, Any]:
    """Where and by what a part was made."""
    gpu = study.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(study.device) if gpu else "CPU",
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "memory_budget": study.memory,
        "versions": {"python": platform.python_version()} | {n: version_of(n) for n in _PACKAGES},
    }
