"""Executors measure a run's units: in this process, in a local pool, or on a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study


class Event(NamedTuple):
    """What happened to a unit."""

    kind: Literal["started", "done", "failed"]
    unit: Unit
    worker: str
    seconds: float = 0.0  # from its start until it is stored
    memory: int = 0  # peak bytes on the GPU, or of the process on a CPU
    error: str = ""  # one line
    details: str = ""  # the traceback
    retryable: bool = True  # whether another attempt may help


class Executor(Protocol):
    """Measures units and stores each one as soon as it is finished."""

    @property
    def workers(self) -> int:
        """How many units it measures in parallel."""
        ...

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """Measure units, taken from the left of the queue, until none is queued or running.

        The caller may add units to the queue, or put failed ones back, while it reads the events.
        Each unit yields "started" and then "done", once it is stored, or "failed". Closing the
        iterator stops all work.

        Raises
        ------
        ExecutorError
            No worker can start.
        StoreError
            A finished unit can't be stored.
        """
        ...

    def close(self) -> None:
        """Stop all work and release resources such as a cluster; the end of `run` does so too."""
        ...


@dataclass(frozen=True)
class Task:
    """What a worker process needs in order to measure units of a run.

    Attributes
    ----------
    make_studies : callable
        Makes the run's studies on the device with a given name. It must be picklable: an
        importable function or a `functools.partial` of one, for example.
    folder : str
        Absolute path of the run's folder.
    threads : int
        CPU threads of each worker.
    """

    make_studies: Callable[[str], Sequence[Study]]
    folder: str
    threads: int = 1
