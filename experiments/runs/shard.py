"""One of several runs that share a folder and its units between them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from repsim_kernels.experiments.errors import ShardError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """The ``index``-th of ``count`` runs, counted from 1; all of it by default."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def select(self, units: Sequence[T]) -> list[T]:
        """Every count-th: the shards' parts are disjoint, and alike in what they cost."""
        return list(units[self.index - 1 :: self.count])


def parse_shard(text: str) -> Shard:
    """Read "2/8".

    Raises
    ------
    ShardError
        It isn't I/N with 1 <= I <= N.
    """
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    shard = Shard(0, 0) if found is None else Shard(int(found[1]), int(found[2]))
    if not 1 <= shard.index <= shard.count:
        raise ShardError(f"shard: {text!r}; expected I/N with I from 1 to N, such as 2/8")
    return shard


def shard_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[Shard, str]:
    """What Slurm's job arrays or torchrun say, and the name of the variable that says it.

    Array tasks are numbered as Slurm was asked to, from SLURM_ARRAY_TASK_MIN and by steps of
    SLURM_ARRAY_TASK_STEP; a RANK counts from 0.

    Raises
    ------
    ShardError
        The variables are no numbers, or the task is not one of so many.
    """
    for name, counted in (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("RANK", "WORLD_SIZE"),
    ):
        if name not in environment or counted not in environment:
            continue
        try:
            count = int(environment[counted])
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
            last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
            tasks = range(first, last + 1, step)
            index = tasks.index(int(environment[name]))
            if len(tasks) != count:  # a list, such as 0,1,5: no task is of a shard
                raise ValueError
        except ValueError:
            raise ShardError(
                f"shard: {name}={environment[name]} of {counted}={environment[counted]} is no "
                "task of an evenly numbered array; expected one such as 0-7, or --shard I/N"
            ) from None
        return Shard(index + 1, count), name
    return Shard(), ""
