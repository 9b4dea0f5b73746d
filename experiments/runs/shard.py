"""Shards: several runs that share a folder and divide its units between them."""

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
    """The ``index``-th of ``count`` runs, counted from 1; by default the only one."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def select(self, units: Sequence[T]) -> list[T]:
        """Select every ``count``-th unit, so that shards are disjoint and cost about the same."""
        return list(units[self.index - 1 :: self.count])


def parse_shard(text: str) -> Shard:
    """Parse a shard such as "2/8".

    Raises
    ------
    ShardError
        The text isn't I/N with 1 <= I <= N.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    shard = Shard(0, 0) if match is None else Shard(int(match[1]), int(match[2]))
    if not 1 <= shard.index <= shard.count:
        raise ShardError(f"shard: {text!r}; expected I/N with I from 1 to N, such as 2/8")
    return shard


def read_shard_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[Shard, str]:
    """Read the shard from a Slurm job array or torchrun, with the name of the variable used.

    Slurm numbers array tasks from SLURM_ARRAY_TASK_MIN in steps of SLURM_ARRAY_TASK_STEP; RANK
    counts from 0.

    Raises
    ------
    ShardError
        The variables are not numbers, or don't belong to an evenly numbered array.
    """
    for name, count_name in (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("RANK", "WORLD_SIZE"),
    ):
        if name not in environment or count_name not in environment:
            continue
        try:
            count = int(environment[count_name])
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
            last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
            tasks = range(first, last + 1, step)
            index = tasks.index(int(environment[name]))
            if len(tasks) != count:  # an uneven list such as 0,1,5 has no index to derive
                raise ValueError
        except ValueError:
            raise ShardError(
                f"shard: {name}={environment[name]} with {count_name}={environment[count_name]} is "
                "not a task of an evenly numbered array; expected one such as 0-7, or --shard I/N"
            ) from None
        return Shard(index + 1, count), name
    return Shard(), ""
