"""Runs of several executors and shards: equal rows, retries, and workers that die."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from functools import partial
from pathlib import Path

import _study_factories
import pandas as pd
import pytest
from _study_factories import BAD
from _toy import toy_study

from repsim_kernels.experiments.errors import ExecutorError, RunError
from repsim_kernels.experiments.runs.driver import MAX_ATTEMPTS, RunProgress, execute, run
from repsim_kernels.experiments.runs.executors import Event, Task
from repsim_kernels.experiments.runs.executors.pool import PoolExecutor, _select_cores
from repsim_kernels.experiments.runs.executors.serial import SerialExecutor
from repsim_kernels.experiments.runs.membership import join_run, open_run
from repsim_kernels.experiments.runs.shard import Shard
from repsim_kernels.experiments.runs.store import Store


@pytest.fixture(scope="module")
def expected() -> pd.DataFrame:
    return run(_study_factories.make_toy_studies("cpu")).table


def open_toy_run(folder: Path, fault: str = "", block: int = 1) -> tuple[Store, SerialExecutor]:
    studies = _study_factories.make_toy_studies("cpu", fault, str(folder), block)
    store = open_run(studies, folder / "run")
    return store, SerialExecutor(studies, store)


def make_pool(store: Store, make_studies: object, workers: int = 2) -> PoolExecutor:
    return PoolExecutor(Task(make_studies, str(store.folder)), ["cpu"] * workers)  # type: ignore[arg-type]


def count_attempts(folder: Path) -> int:
    return (folder / "tries").stat().st_size


@pytest.mark.parametrize("block", [1, 2, 3])
def test_blocks_and_shards_do_not_change_the_rows(
    tmp_path: Path, expected: pd.DataFrame, block: int
) -> None:
    store, serial = open_toy_run(tmp_path, block=block)
    assert len(store.units) == 2 * -(-3 // block)
    for index in (3, 1, 2):
        assert execute(store, serial, Shard(index, 3)) == {}
    pd.testing.assert_frame_equal(store.compact(), expected, check_exact=True)


def test_a_failed_unit_is_retried_after_the_others(tmp_path: Path, expected: pd.DataFrame) -> None:
    store, serial = open_toy_run(tmp_path, "twice")
    steps: list[RunProgress] = []
    assert execute(store, serial, progress=steps.append) == {}
    assert count_attempts(tmp_path) == 3
    failed = [step for step in steps if step.event.kind == "failed"]
    assert [step.event.unit for step in failed] == [BAD, BAD]
    assert failed[0].event.error == "RuntimeError: attempt 1 failed"
    assert {step.failed for step in steps} == {0}
    assert steps[-1].event.unit == BAD
    assert (steps[-1].done, steps[-1].total) == (6, 6)
    assert len({step.event.unit for step in steps[:-4]}) == 6
    assert store.failures() == {}
    pd.testing.assert_frame_equal(store.compact(), expected, check_exact=True)


@pytest.mark.parametrize(("fault", "count"), [("always", MAX_ATTEMPTS), ("study", 1)])
def test_a_unit_that_keeps_failing_is_recorded_and_left_out(
    tmp_path: Path, expected: pd.DataFrame, fault: str, count: int
) -> None:
    store, _ = open_toy_run(tmp_path, fault)
    with pytest.warns(
        UserWarning, match=r"^1 of 6 units failed and are left out; the first is toy act1"
    ):
        table = run(_study_factories.make_toy_studies("cpu", fault, str(tmp_path)), store).table
    assert count_attempts(tmp_path) == count
    (record,) = (json.loads(path.read_text()) for path in (store.folder / "failed").iterdir())
    assert record["unit"] == list(BAD)
    assert store.failures() == {BAD: record["error"]}
    assert "_fail" in record["details"]
    finished = (expected["layer"] != "act1") | (expected["class"] != "bee")
    pd.testing.assert_frame_equal(
        table, expected[finished].reset_index(drop=True), check_exact=True, check_like=False
    )
    assert table.attrs == {"missing": "1 of 6"}
    repaired = run(_study_factories.make_toy_studies("cpu"), store).table
    assert store.failures() == {}
    pd.testing.assert_frame_equal(repaired, expected, check_exact=True)


def test_studies_with_other_images_cannot_join_a_run(tmp_path: Path) -> None:
    store, _ = open_toy_run(tmp_path)
    join_run(_study_factories.make_toy_studies("cpu"), store)
    other = toy_study(metrics=["cka", "procrustes"], block=1)
    other.images = other.images + 1
    with pytest.raises(
        RunError, match=r"^studies: those made by a worker differ from the ones in "
    ):
        join_run([other], store)


def test_the_memory_budget_of_a_run_is_set_once(tmp_path: Path) -> None:
    store = open_run([toy_study()], tmp_path / "run", workers=4)
    alone = open_run([toy_study()], tmp_path / "alone")
    budget = store.study["memory"]["toy"]
    assert 0.2 < budget / alone.study["memory"]["toy"] < 0.3
    again, own = toy_study(), toy_study(memory="1GiB")
    join_run([again], store)
    join_run([own], store)
    assert (again.memory, own.memory) == (budget, 2**30)


def test_workers_have_separate_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7, 8, 9, 10, 11})
    assert [_select_cores(number, 3, 2) for number in range(3)] == [[1, 3], [5, 7], [8, 9]]
    halves = [_select_cores(number, 2, 1) for number in range(2)]
    assert halves == [[1, 3, 5, 7], [8, 9, 10, 11]]
    # With more threads than cores, workers share cores.
    assert _select_cores(3, 4, 4) == [8, 9, 10, 11]
    assert {core for number in range(9) for core in _select_cores(number, 9, 1)} <= {
        *(1, 3, 5, 7, 8, 9, 10, 11)
    }


def test_a_worker_killed_during_a_unit_is_replaced(tmp_path: Path, expected: pd.DataFrame) -> None:
    store, _ = open_toy_run(tmp_path, "killed")
    steps: list[RunProgress] = []
    make_studies = partial(_study_factories.make_toy_studies, fault="killed", folder=str(tmp_path))
    assert execute(store, make_pool(store, make_studies), progress=steps.append) == {}
    assert count_attempts(tmp_path) == 2
    (failed,) = [step.event for step in steps if step.event.kind == "failed"]
    assert (failed.unit, failed.error) == (BAD, f"{failed.worker} was ended by SIGKILL")
    pd.testing.assert_frame_equal(store.compact(), expected, check_exact=True)
    assert multiprocessing.active_children() == []
    facts = [store.read_facts(unit) or {} for unit in store.units]
    assert {each["threads"] for each in facts} == {1}


def test_a_pool_that_cannot_start_gives_the_reason_in_one_line(tmp_path: Path) -> None:
    store, _ = open_toy_run(tmp_path)
    with pytest.raises(ExecutorError) as caught:
        execute(store, make_pool(store, _study_factories.fail_to_find_images))
    assert str(caught.value) == "images: none for cpu"
    assert store.unfinished() == store.units
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_workers_that_die_at_the_same_time_are_replaced(
    tmp_path: Path, expected: pd.DataFrame
) -> None:
    store, _ = open_toy_run(tmp_path)
    make_studies = partial(
        _study_factories.make_toy_studies, fault="all killed", folder=str(tmp_path)
    )
    assert execute(store, make_pool(store, make_studies, 3)) == {}
    assert count_attempts(tmp_path) == 3 + 6
    pd.testing.assert_frame_equal(store.compact(), expected, check_exact=True)


@pytest.mark.slow
def test_workers_that_die_while_starting_end_the_run(tmp_path: Path) -> None:
    store, _ = open_toy_run(tmp_path)
    with pytest.raises(ExecutorError, match=r"^workers: 3 in a row died .* by exit code 7; exp"):
        execute(store, make_pool(store, _study_factories.exit_process))
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_closing_the_events_ends_all_processes(tmp_path: Path) -> None:
    store, _ = open_toy_run(tmp_path)
    units = deque(store.units)
    events = make_pool(store, _study_factories.make_toy_studies).run(units)
    first = next(events)
    assert first == Event("started", store.units[0], first.worker)
    assert len(multiprocessing.active_children()) >= 1
    events.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_two_studies_with_the_same_name_are_refused() -> None:
    study = toy_study()
    with pytest.raises(RunError, match="two have the same name"):
        run([study, study])


def test_several_studies_are_one_run() -> None:
    one, two = toy_study(name="one", metrics=["cka"]), toy_study(name="two", metrics=["cka"])
    both = run([two, one]).table
    assert both.equals(pd.concat([one.run().table, two.run().table], ignore_index=True))
