"""Carry out a run: open its folder, measure its units, write its table and report the outcome."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
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
    """The options of ``sweep`` about execution and output."""

    executor: ExecutorKind
    workers: int | None
    address: str | None
    shard: Shard
    shard_source: str  # the environment variable that set the shard; empty for --shard
    threads: int
    quiet: bool
    log_json: bool

    @property
    def silent(self) -> bool:
        return self.quiet or self.log_json


def launch(factory: StudyFactory, folder: Path, options: LaunchOptions, plan_only: bool) -> None:
    """Run studies into a folder, after printing an estimate; or only print the estimate.

    Raises
    ------
    OptionsError, DataError, ModelError, StudyError, LayerError, StoreError, ExecutorError, OSError
        With a one-line message; that of a StoreError, an ExecutorError or a KeyboardInterrupt
        during the run says how much is stored.
    typer.Exit
        3 if units are missing: they failed, or can't be read again.
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
    from repsim_kernels.experiments.runs.membership import check_run, open_run
    from repsim_kernels.experiments.runs.store import CONFIGURATION
    from repsim_kernels.experiments.study.estimate import plan

    console = Console(highlight=False, markup=False)
    separate_passes = options.workers != 1 or options.executor is ExecutorKind.ray
    workers = options.workers or 1
    study_set = factory.make()
    if not (folder / CONFIGURATION).exists():
        if plan_only:
            check_run(study_set.studies, folder)
            print_studies(study_set, factory.sampled, {})
            units = [unit for study in study_set.studies for unit in study.units]
            pairs = _group_by_study(study_set, options.shard.select(units))
            print_plans(console, [plan(*pair, separate_passes) for pair in pairs], workers)
            return
        _check_executor(options)
    store = open_run(
        study_set.studies, folder, {"images": study_set.source}, _count_local_workers(options)
    )
    units = options.shard.select(store.units)
    if not options.silent:
        about = store.study.get("about", {}).get("models", {})
        print_studies(study_set, factory.sampled, about)
        print(f"Run folder: {folder}")
        if options.shard.count > 1:
            source = f" ({options.shard_source})" if options.shard_source else ""
            print(f"Shard {options.shard}{source}: {len(units)} of {len(store.units)} units")
        warn_if_near_chance(store)
    unfinished = store.unfinished(units)
    if not unfinished and not options.silent:
        units_are = "The only unit is" if len(units) == 1 else f"All {len(units)} units are"
        print(f"{units_are} already done.")
    try:
        plans = []
        if unfinished and (plan_only or (factory.preset is not None and not options.silent)):
            pairs = _group_by_study(study_set, unfinished)
            plans = [plan(*pair, separate_passes) for pair in pairs]
            print_plans(console, plans, workers)
        if plan_only:
            return
        start = time.perf_counter()
        executor = (
            _make_executor(factory, study_set, store, options)
            if unfinished
            else SerialExecutor(study_set.studies, store)
        )
        with show_progress(console, options.quiet, options.log_json) as progress:
            failed = execute(store, executor, options.shard, progress)
        complete = _finish(console, store, options, failed)
    except (KeyboardInterrupt, StoreError, ExecutorError) as error:
        message = f"{error}; " if str(error) else ""
        raise type(error)(message + _describe_stored(store, units, folder)) from error
    if plans:
        print_elapsed(time.perf_counter() - start, plans, workers)
    if not complete:
        raise typer.Exit(3)


def _finish(
    console: Console, store: Store, options: LaunchOptions, failed: dict[Unit, str]
) -> bool:
    """Write the table if every unit has finished or failed, and report the outcome.

    Returns whether nothing is missing: from the table or, while other shards still have units to
    measure, from the shard's own units.
    """
    from repsim_kernels.experiments.cli.tables import print_results
    from repsim_kernels.experiments.report.page import write_report

    if failed:
        # With --quiet the progress display has already printed these lines.
        for unit, error in () if options.quiet else failed.items():
            print(f"failed: {unit}: {error}", file=sys.stderr)
        single = len(failed) == 1
        print(
            f"{len(failed)} {'unit' if single else 'units'} failed and "
            f"{'is' if single else 'are'} left out; see {store.folder / 'failed'}, or run the same "
            "command to retry",
            file=sys.stderr,
        )
    unfinished = store.unfinished()
    pending = set(unfinished) - set(store.failures())
    if lost := [unit for unit in options.shard.select(store.units) if unit in pending]:
        print(
            f"no table: {len(lost)} of {len(store.units)} units are missing although they were "
            f"measured; the first is {lost[0]}; run the same command to measure them again",
            file=sys.stderr,
        )
        return False
    if pending:  # in other shards
        if not options.silent:
            done = len(store.units) - len(unfinished)
            print(
                f"{done} of the run's {len(store.units)} units are finished; the last shard writes "
                f"the table, or run: repsim compact {store.folder}"
            )
        return not failed
    if len(unfinished) == len(store.units):
        print(f"no table: all {len(unfinished)} units failed", file=sys.stderr)
        return False
    table = store.compact()
    if options.silent:
        write_report(store.folder, store.folder / "report.html")
    else:
        print_results(console, table, store)
    missing = table.attrs.get("missing")
    if missing and not failed:  # they failed in another shard, or were damaged just now
        print(f"{missing} units are missing from the table", file=sys.stderr)
    return not missing


def _describe_stored(store: Store, units: Sequence[Unit], folder: Path) -> str:
    done = sum(store.part_path(unit).exists() for unit in units)
    return (
        f"{done} of {len(units)} units are finished and stored in {folder}; "
        "run the same command to resume"
    )


def _group_by_study(
    study_set: StudySet, units: Sequence[Unit]
) -> Iterator[tuple[Study, list[Unit]]]:
    """Yield each study that has some of these units, with its units."""
    for study in study_set.studies:
        study_units = [unit for unit in units if unit.model == study.name]
        if study_units:
            yield study, study_units


def _check_executor(options: LaunchOptions) -> None:
    """Raise ExecutorError if no cluster can be reached, before a run's folder is made."""
    if options.executor is ExecutorKind.ray:
        from repsim_kernels.experiments.runs.executors.cluster import check_available

        check_available(options.address)


def _make_executor(
    factory: StudyFactory, study_set: StudySet, store: Store, options: LaunchOptions
) -> Executor:
    from repsim_kernels.experiments.runs.executors import Task
    from repsim_kernels.experiments.runs.executors.pool import PoolExecutor
    from repsim_kernels.experiments.runs.executors.serial import SerialExecutor

    task = Task(factory, str(store.folder.resolve()), options.threads)
    device = factory.options.study["device"]
    if options.executor is ExecutorKind.ray:
        from repsim_kernels.experiments.runs.executors.cluster import RayExecutor

        return RayExecutor(task, device, options.address, options.workers)
    if options.workers == 1 or options.workers is None:
        return SerialExecutor(study_set.studies, store)
    gpus = device.startswith("cuda")
    return PoolExecutor(task, [f"cuda:{i}" if gpus else device for i in range(options.workers)])


def _count_local_workers(options: LaunchOptions) -> int:
    """The number of workers that share this machine's memory."""
    if options.workers is None:
        return max(1, count_cores() // options.threads)
    return options.workers


def count_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
