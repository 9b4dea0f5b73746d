"""Measuring in this process: the serial executor, and what every other one's processes do."""

from __future__ import annotations

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
from repsim_kernels.experiments.errors import StudyError, one_line
from repsim_kernels.experiments.runs.executors import Event
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.configuration import version_of
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

_PACKAGES = ("repsim-kernels", "torch", "triton", "numpy")


class Serial:
    """Measures units in this process, one after the other.

    Parameters
    ----------
    studies : sequence of Study
    store : Store
        Of their run.
    name : str
        What events call this worker.
    """

    workers = 1

    def __init__(self, studies: Sequence[Study], store: Store, name: str = "this process") -> None:
        self.studies, self.store, self.name = studies, store, name

    def close(self) -> None:
        """It holds nothing."""

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
            yield Event("started", unit, self.name)
            start = time.perf_counter()
            if study.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(study.device)
            try:
                rows = next(measured)
            except Exception as error:
                yield Event(
                    "failed",
                    unit,
                    self.name,
                    time.perf_counter() - start,
                    _memory(study.device),
                    _line(error),
                    traceback.format_exc(),
                    not isinstance(error, (StudyError, RepsimError)),
                )
                return
            took, memory = time.perf_counter() - start, _memory(study.device)
            self.store.put(unit, rows, seconds=took, memory=memory, **_facts(study))
            yield Event("done", unit, self.name, time.perf_counter() - start, memory)


def measured(serial: Serial, unit: Unit) -> tuple[Event, list[str]]:
    """Measure a unit for another process: the last event, and what was warned of meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        *_, last = serial.run(deque([unit]))
    return last, [str(each.message) for each in caught]


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
