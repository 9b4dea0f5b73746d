"""Shards: parsing, Slurm's and torchrun's variables, and how units are divided."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsim_kernels.experiments.errors import ShardError
from repsim_kernels.experiments.runs.shard import Shard, parse_shard, read_shard_from_environment


@given(units=st.lists(st.integers(), max_size=40), count=st.integers(1, 12))
def test_shards_partition_the_units_evenly(units: list[int], count: int) -> None:
    numbered = list(enumerate(units))
    shards = [Shard(index, count).select(numbered) for index in range(1, count + 1)]
    assert sorted(unit for shard in shards for unit in shard) == numbered
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert all(shard == sorted(shard) for shard in shards)


def test_parsing_and_printing_a_shard() -> None:
    assert parse_shard("2/8") == Shard(2, 8)
    assert parse_shard(" 1 / 1 ") == Shard() == Shard(1, 1)
    assert str(Shard(2, 8)) == "2/8"


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2", "1/2/3", "", "1.0/2"])
def test_an_invalid_shard_is_refused(text: str) -> None:
    with pytest.raises(ShardError, match=r"^shard: .*; expected I/N with I from 1 to N"):
        parse_shard(text)


def slurm(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(first + (count - 1) * step),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


@pytest.mark.parametrize(
    ("environment", "shard", "name"),
    [
        ({}, Shard(), ""),
        ({"PATH": "/bin", "RANK": "1"}, Shard(), ""),
        (slurm(0, 8), Shard(1, 8), "SLURM_ARRAY_TASK_ID"),
        (slurm(7, 8), Shard(8, 8), "SLURM_ARRAY_TASK_ID"),
        (slurm(1, 8, 1), Shard(1, 8), "SLURM_ARRAY_TASK_ID"),
        (slurm(10, 4, 4, 3), Shard(3, 4), "SLURM_ARRAY_TASK_ID"),
        (slurm(3, 1, 3), Shard(1, 1), "SLURM_ARRAY_TASK_ID"),  # one task that was requeued
        ({"RANK": "3", "WORLD_SIZE": "4"}, Shard(4, 4), "RANK"),
        ({**slurm(1, 2), "RANK": "0", "WORLD_SIZE": "1"}, Shard(2, 2), "SLURM_ARRAY_TASK_ID"),
    ],
)
def test_the_shard_is_read_from_slurm_or_torchrun(
    environment: dict[str, str], shard: Shard, name: str
) -> None:
    assert read_shard_from_environment(environment) == (shard, name)


@given(count=st.integers(1, 20), first=st.integers(0, 9), step=st.integers(1, 5))
def test_the_tasks_of_an_array_cover_all_shards(count: int, first: int, step: int) -> None:
    tasks = [slurm(first + k * step, count, first, step) for k in range(count)]
    assert [read_shard_from_environment(task)[0].index for task in tasks] == list(
        range(1, count + 1)
    )


@pytest.mark.parametrize(
    "environment",
    [
        slurm(3, 2, 1),  # --array=1,3
        slurm(2, 3, 1, 2),
        {**slurm(1, 3), "SLURM_ARRAY_TASK_MAX": "5"},  # --array=0,1,5
        {**slurm(3, 2, 3), "SLURM_ARRAY_TASK_MAX": "5"},  # --array=3,5
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "one", "WORLD_SIZE": "4"},
        {**slurm(0, 2), "SLURM_ARRAY_TASK_STEP": "0"},
    ],
)
def test_an_uneven_array_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ShardError, match=r"^shard: (SLURM_ARRAY_TASK_ID|RANK)=.*or --shard I/N$"):
        read_shard_from_environment(environment)
