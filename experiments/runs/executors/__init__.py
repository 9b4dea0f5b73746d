"""Who measures a run's units: this process, others on this machine, or a Ray cluster's."""

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

    what: Literal["started", "done", "failed"]
    unit: Unit
    worker: str
    seconds: float = 0.0  # from its start to its being stored
    memory: int = 0  # peak bytes of the device, or of the process on a CPU
    error: str = ""  # one line
    details: str = ""  # its traceback
    again: bool = True  # whether another try may help


class Executor(Protocol):
    """Measures units and stores each as it is finished."""

    @property
    def workers(self) -> int:
        """How many units it measures at a time."""
        ...

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """Take units off the left until none is left or being measured.

        Units may be put back or added while the events are read. Each unit that is taken starts,
        and then either is done and stored, or has failed. Closing the iterator stops all work.

        Raises
        ------
        ExecutorError
            No worker can start.
        StoreError
            What is finished can't be stored.
        """
        ...

    def close(self) -> None:
        """Stop all work and release what it holds, such as a cluster; the end of `run` does too."""
        ...


@dataclass(frozen=True)
class Task:
    """What a worker process needs to know to measure units of a run.

    Attributes
    ----------
    studies : callable
        Makes the run's studies on a device, given by name; picklable, such as a
        `functools.partial` of a function that can be imported.
    folder : str
        Absolute path of the run's folder.
    threads : int
        CPU threads of each worker.
    """

    studies: Callable[[str], Sequence[Study]]
    folder: str
    threads: int = 1
