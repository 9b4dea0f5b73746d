"""A run from its studies to its table: who measures the units, and what is said of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer
from rich.console import Console

from repsim_kernels.experiments.runs.shard import Shard

if TYPE_CHECKING:
    from repsim_kernels.experiments.cli.request import StudyFactory, StudySet
    from repsim_kernels.experiments.runs.executors import Executor
    from repsim_kernels.experiments.runs.store import Store
    from repsim_kernels.experiments.study.study import Study
    from repsim_kernels.experiments.study.units import Unit


class ExecutorKind(StrEnum):
    pool = "pool"
    ray = "ray"


class LaunchOptions(NamedTuple):
    """Who runs the units, and how it is shown."""

    executor: ExecutorKind
    workers: int | None
    address: str | None
    shard: Shard
    shard_from: str  # the variable that names it
    threads: int
    quiet: bool
    log_json: bool

    @property
    def silent(self) -> bool:
        return self.quiet or self.log_json


def launch(recipe: StudyFactory, folder: Path, how: LaunchOptions, dry: bool) -> None:
    """Run studies into a folder; with an estimate before it, or (dry) that alone.

    Raises
    ------
    OptionsError, DataError, ModelError, StudyError, LayerError, StoreError, ExecutorError, OSError
        One line; a StoreError, an ExecutorError and a KeyboardInterrupt say what is kept.
    typer.Exit
        3, where units are missing: they failed, or can't be read again.
    """
    from repsim_kernels.experiments.cli.progress import show_progress
    from repsim_kernels.experiments.cli.tables import (
        print_elapsed,
        print_plans,
        print_studies,
        warn_if_near_chance,
    )
    from repsim_kernels.experiments.errors import ExecutorError, StoreError
    from repsim_kernels.experiments.runs.driver import execute
    from repsim_kernels.experiments.runs.executors.serial import SerialExecutor
    from repsim_kernels.experiments.runs.membership import open_run
    from repsim_kernels.experiments.runs.store import CONFIGURATION
    from repsim_kernels.experiments.study.estimate import plan

    console = Console(highlight=False, markup=False)
    apart = how.workers != 1 or how.executor is ExecutorKind.ray
    count = how.workers or 1
    job = recipe.job()
    if dry and not (folder / CONFIGURATION).exists():
        print_studies(job, recipe.sampled, {})
        units = how.shard.select([unit for study in job.studies for unit in study.units])
        print_plans(console, [plan(*both, apart) for both in _of_each(job, units)], count)
        return
    store = open_run(job.studies, folder, {"images": job.source}, _sharing(how))
    units = how.shard.select(store.units)
    if not how.silent:
        print_studies(job, recipe.sampled, store.study.get("about", {}).get("models", {}))
        print(f"Into {folder}")
        if how.shard.count > 1:
            source = f" ({how.shard_from})" if how.shard_from else ""
            print(f"Shard {how.shard}{source}: {len(units)} of {len(store.units)} units")
        warn_if_near_chance(store)
    left = store.unfinished(units)
    if not left and not how.silent:
        print(f"All {len(units)} units are done already.")
    try:
        plans = []
        if left and (dry or (recipe.preset is not None and not how.silent)):
            plans = [plan(*both, apart) for both in _of_each(job, left)]
            print_plans(console, plans, count)
        if dry:
            return
        start = time.perf_counter()
        executor = (
            _executor(recipe, job, store, how) if left else SerialExecutor(job.studies, store)
        )
        with show_progress(console, how.quiet, how.log_json) as progress:
            failed = execute(store, executor, how.shard, progress)
        whole = _end(console, store, how, failed)
    except (KeyboardInterrupt, StoreError, ExecutorError) as error:
        said = f"{error}; " if str(error) else ""
        raise type(error)(said + _kept(store, units, folder)) from error
    if plans:
        print_elapsed(time.perf_counter() - start, plans, count)
    if not whole:
        raise typer.Exit(3)


def _end(console: Console, store: Store, how: LaunchOptions, failed: dict[Unit, str]) -> bool:
    """Make the table once no unit is left but those that failed, and say what came of it.

    Returns whether nothing is missing: of the table, or of the shard's own units while other
    shards still have theirs to measure.
    """
    from repsim_kernels.experiments.cli.tables import print_results
    from repsim_kernels.experiments.report.page import write_report

    if failed:
        for unit, error in () if how.quiet else failed.items():  # quiet has said so
            print(f"failed: {unit}: {error}", file=sys.stderr)
        one = len(failed) == 1
        print(
            f"{len(failed)} {'unit' if one else 'units'} failed and {'is' if one else 'are'} left "
            f"out; more in {store.folder / 'failed'}, and the same command tries again",
            file=sys.stderr,
        )
    left = store.unfinished()
    unfinished = set(left) - set(store.failures())
    if lost := [unit for unit in how.shard.select(store.units) if unit in unfinished]:
        print(
            f"no table: {len(lost)} of {len(store.units)} units are missing though they were "
            f"measured, such as {lost[0]}; the same command measures them again",
            file=sys.stderr,
        )
        return False
    if unfinished:  # by other shards
        if not how.silent:
            done = len(store.units) - len(left)
            print(
                f"{done} of the run's {len(store.units)} units are finished; the last shard to end "
                f"makes its table, or: repsim compact {store.folder}"
            )
        return not failed
    if len(left) == len(store.units):
        print(f"no table: all {len(left)} units failed", file=sys.stderr)
        return False
    table = store.compact()
    if how.silent:
        write_report(store.folder, store.folder / "report.html")
    else:
        print_results(console, table, store)
    missing = table.attrs.get("missing")
    if missing and not failed:  # another shard's, or damaged this very moment
        print(f"{missing} units are missing from the table", file=sys.stderr)
    return not missing


def _kept(store: Store, units: Sequence[Unit], folder: Path) -> str:
    done = sum(store.part_path(unit).exists() for unit in units)
    return (
        f"{done} of {len(units)} units are finished and kept in {folder}; "
        "the same command goes on from there"
    )


def _of_each(job: StudySet, units: Sequence[Unit]) -> Iterator[tuple[Study, list[Unit]]]:
    """The studies that have some of these units, and which."""
    for study in job.studies:
        mine = [unit for unit in units if unit.model == study.name]
        if mine:
            yield study, mine


def _executor(recipe: StudyFactory, job: StudySet, store: Store, how: LaunchOptions) -> Executor:
    from repsim_kernels.experiments.runs.executors import Task
    from repsim_kernels.experiments.runs.executors.pool import PoolExecutor
    from repsim_kernels.experiments.runs.executors.serial import SerialExecutor

    task = Task(recipe, str(store.folder.resolve()), how.threads)
    device = recipe.asked.study["device"]
    if how.executor is ExecutorKind.ray:
        from repsim_kernels.experiments.runs.executors.cluster import RayExecutor

        return RayExecutor(task, device, how.address, how.workers)
    if how.workers == 1 or how.workers is None:
        return SerialExecutor(job.studies, store)
    gpus = device.startswith("cuda")
    return PoolExecutor(task, [f"cuda:{i}" if gpus else device for i in range(how.workers)])


def _sharing(how: LaunchOptions) -> int:
    """How many workers share this machine's memory."""
    if how.workers is None:
        return max(1, cores() // how.threads)
    return how.workers


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """End the command with a line and exit code 130 by Ctrl-C, 143 by SIGTERM."""

    terminated = threading.Event()  # a library may put a KeyboardInterrupt of its own in its place

    def stop(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if here else None
    try:
        yield
    except KeyboardInterrupt as stopped:
        print(f"interrupted: {str(stopped) or 'before a unit was begun'}", file=sys.stderr)
        raise typer.Exit(143 if terminated.is_set() else 130) from None
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)
