"""Who measures a run's units: this process, others on this machine, or a Ray cluster's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from repsim_kernels.experiments.errors import ExecutorError, StoreError, one_line
from repsim_kernels.experiments.study.units import Unit

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study


def told(error: Exception) -> StoreError | ExecutorError:
    """An error that ends a run, as one line and as what any process can unpickle."""
    plain = isinstance(error, (ValueError, OSError))
    text = one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"
    kind = StoreError if isinstance(error, StoreError) else ExecutorError
    return kind(text)


class Event(NamedTuple):
    """What happened to a unit."""

    what: Literal["started", "done", "failed"]
    unit: Unit
    worker: str
    seconds: float = 0.0  # from its start to its being stored
    memory: int = 0  # bytes at most of the device, or of the process on a CPU
    error: str = ""  # one line
    details: str = ""  # its traceback
    again: bool = True  # whether another try may help


class Executor(Protocol):
    """Measures units and stores each as it is finished."""

    workers: int

    def run(self, units: deque[Unit]) -> Iterator[Event]:
        """Take units off the left, until none is there and none is in hand.

        Units may be put back, or added, while the events are read. Each unit that is taken starts,
        and then it is done, and stored, or has failed. Closing the iterator stops all work.

        Raises
        ------
        ExecutorError
            No worker can start.
        StoreError
            What is finished can't be stored.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds, if anything: a cluster. The end of `run` does so, too."""
        ...


@dataclass(frozen=True)
class Task:
    """What a process needs to know to measure units of a run.

    Attributes
    ----------
    studies : callable
        The run's studies on a device that is named, made anew; picklable, such as a
        `functools.partial` of a function that can be imported.
    folder : str
        The run's, an absolute path.
    threads : int
        Of the CPU, for each worker.
    """

    studies: Callable[[str], Sequence[Study]]
    folder: str
    threads: int = 1
