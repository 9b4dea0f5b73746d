"""Runs of one study or several, each finished unit stored at once."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.experiments.columns import KEYS
from repsim_kernels.experiments.errors import ExecutorError
from repsim_kernels.experiments.runs.executors import Event, Executor
from repsim_kernels.experiments.runs.executors.serial import SerialExecutor
from repsim_kernels.experiments.runs.lock import hold_lock
from repsim_kernels.experiments.runs.membership import check_names, open_run
from repsim_kernels.experiments.runs.shard import Shard
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.checks import check_progress
from repsim_kernels.experiments.study.study import Study
from repsim_kernels.experiments.study.units import Unit

MAX_ATTEMPTS = 3  # of a unit, before it is recorded as failed


class RunProgress(NamedTuple):
    """Where a run is, and what has just happened."""

    event: Event
    done: int
    failed: int
    total: int


Progress = Callable[[RunProgress], object]


def run(
    studies: Study | Sequence[Study],
    out: str | os.PathLike[str] | Store | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Run a study, or several of different names as one, in this process.

    Parameters
    ----------
    studies : Study or sequence of Study
    out : path or Store, optional
        A folder, or what `open_run` returned. Each finished unit is stored there at once, units
        that are stored already are not computed again, and ``results.parquet`` is written at the
        end.
    progress : callable, optional
        Called with a `RunProgress` when a unit starts, is done, or has failed.

    Returns
    -------
    DataFrame
        One row per model, class, layer and cell, sorted by these columns; then ``size`` (neurons
        of the cell), ``nan_images`` (images for which the network, intact or ablated, gives no
        answer: logits with a NaN, or all -inf; where there are any, the cell's changes of
        performance are NaN), a column per metric (distance of the ablated from the original
        representation), and one per function change, positive where function is lost:
        ``rank_deficit``, ``log_probability``, ``probability``, ``top1``, ``top5`` (see
        `study.performance`), ``decodability_refit`` and ``decodability_frozen`` (balanced accuracy
        of the class against the rest, intact minus ablated), ``margin_refit`` and
        ``margin_frozen`` (what the probe's output loses on the right side); each of them again
        over every other image, ``_odd`` and ``_even``. ``energy`` is the share of the variance
        over stimuli that the cell's neurons have. The same run gives the same bits.
        ``attrs["notes"]`` has the studies' notes, by model, and is stored.

    Raises
    ------
    RunError
        Two studies have one name.
    StudyError
        ``progress`` can't be called, or ``out`` is no path. Or, without ``out``: a layer's
        activations are not finite, or a network's weights have changed. With it, such a unit is
        tried again where that may help, then recorded as failed, left out, and warned of.
    StoreError
        ``out`` holds another run or other files, a unit can't be stored, another process works in
        the folder, or no unit could be measured.
    """
    studies = [studies] if isinstance(studies, Study) else studies
    check_names(studies)
    check_progress(progress)
    if out is not None:
        store = out if isinstance(out, Store) else open_run(studies, out)
        failed = execute(store, SerialExecutor(studies, store), progress=progress)
        if failed:
            unit, error = next(iter(failed.items()))
            warnings.warn(
                f"{len(failed)} of {len(store.units)} units failed and are left out, such as "
                f"{unit}: {error}",
                stacklevel=2,
            )
        return store.compact()
    total, parts = sum(len(study.units) for study in studies), []
    for study in studies:
        for unit, rows in zip(study.units, measure.rows(study, study.units), strict=True):
            parts.append(rows)
            if progress is not None:
                progress(RunProgress(Event("done", unit, ""), len(parts), 0, total))
    table = pd.concat(parts, ignore_index=True)
    table = table.sort_values(KEYS, kind="stable", ignore_index=True)
    notes = {study.name: study.note for study in studies if study.note is not None}
    table.attrs = {"notes": notes} if notes else {}
    return table


def execute(
    store: Store,
    executor: Executor,
    shard: Shard = Shard(),  # noqa: B008  (it is immutable)
    progress: Progress | None = None,
) -> dict[Unit, str]:
    """Have an executor measure what is left of a run.

    A unit that fails is retried after the others, up to `MAX_ATTEMPTS` attempts in total, if a
    retry may help.

    Parameters
    ----------
    store : Store
    executor : Executor
        It is closed at the end.
    shard : Shard, optional
        The part of the run's units that is to be measured.
    progress : callable, optional
        Called with a `RunProgress` when a unit starts, is done, or has failed.

    Returns
    -------
    dict
        The units that failed, each with its error; they are also recorded in the folder.

    Raises
    ------
    StoreError
        A unit can't be stored, or another process works in the folder.
    ExecutorError
        No worker can start.
    """
    units, tries, failed = shard.select(store.units), Counter[Unit](), dict[Unit, str]()
    lock = hold_lock(store.folder, shard, executor.workers)
    with closing(executor), lock, _tidied(store, units):
        todo = deque(store.unfinished(units))
        done = len(units) - len(todo)
        if not todo:
            return {}
        with closing(executor.run(todo)) as events:  # type: ignore[type-var]
            for event in events:
                unit = event.unit
                if event.what == "done":
                    _check_stored(store, event)
                    done += 1
                elif event.what == "failed":
                    tries[unit] += 1
                    if event.again and tries[unit] < MAX_ATTEMPTS:
                        todo.append(unit)
                    else:
                        failed[unit] = event.error
                        store.record_failure(
                            unit, event.error, details=event.details, worker=event.worker
                        )
                if progress is not None:
                    progress(RunProgress(event, done, len(failed), len(units)))
    return failed


@contextmanager
def _tidied(store: Store, units: Sequence[Unit]) -> Iterator[None]:
    """Leave nothing half written behind, of this run or of one that was killed before."""
    store.remove_temporary_files(units)
    try:
        yield
    finally:
        store.remove_temporary_files(units)


def _check_stored(store: Store, event: Event) -> None:
    if not store.part_path(event.unit).exists():
        raise ExecutorError(
            f"out: {event.worker} has stored {event.unit} where this process sees no part in "
            f"{store.folder}; expected a folder that all machines share"
        )
