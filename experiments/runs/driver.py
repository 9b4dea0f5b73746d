"""Run one or more studies and store each unit as soon as it is finished."""

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
from repsim_kernels.experiments.runs.results import Results
from repsim_kernels.experiments.runs.shard import Shard
from repsim_kernels.experiments.runs.store import Store, make_attributes
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.checks import check_progress
from repsim_kernels.experiments.study.configuration import describe_ablations
from repsim_kernels.experiments.study.study import Study
from repsim_kernels.experiments.study.units import Unit

MAX_ATTEMPTS = 3  # per unit, before it is recorded as failed


class RunProgress(NamedTuple):
    """The latest event of a run, and its counts of units."""

    event: Event
    done: int
    failed: int
    total: int


ProgressCallback = Callable[[RunProgress], object]


def run(
    studies: Study | Sequence[Study],
    out: str | os.PathLike[str] | Store | None = None,
    progress: ProgressCallback | None = None,
) -> Results:
    """Run one study, or several with different names as one run, in this process.

    Parameters
    ----------
    studies : Study or sequence of Study
    out : path or Store, optional
        A folder, or the result of `open_run`. Each finished unit is stored there immediately, units
        that are already stored are not computed again, and ``results.parquet`` is written at the
        end.
    progress : callable, optional
        Called with a `RunProgress` when a unit starts, is done, or has failed.

    Returns
    -------
    Results
        ``table`` is a DataFrame; ``summary()`` returns the mean correlations, and ``report()``
        writes the HTML report. The table has one row per model, class, layer and cell, sorted by
        these columns, with

        * ``size``: neurons of the cell;
        * ``energy``: the cell's share of the representation's variance over the metrics' images;
        * ``nan_images``: images for which the network, intact or ablated, gives no answer (logits
          with a NaN, or all -inf); if there are any, the cell's performance changes are NaN;
        * one column per metric: the distance between the ablated and the intact representation;
        * one column per function change, positive where function is lost: ``rank_deficit``,
          ``log_probability``, ``probability``, ``top1``, ``top5`` (see `study.performance`),
          ``decodability_refit`` and ``decodability_frozen`` (balanced accuracy of the class against
          the others, intact minus ablated), ``margin_refit`` and ``margin_frozen`` (decrease of the
          probe's output towards the correct side);
        * each function change again over every other image: ``_odd`` and ``_even``.

        Equal runs return bit-identical tables. ``table.attrs`` holds, by model, the studies'
        ``notes`` and their ``ablations``: the kind of cells and the fill, if not the default ones.
        They are stored with the table.

    Raises
    ------
    RunError
        Two studies have the same name.
    StudyError
        ``progress`` is not callable, or ``out`` is not a path. Without ``out``, also: a layer's
        activations are not finite, or a network's weights have changed. With ``out``, such a unit
        is retried if that may help, then recorded as failed and left out, with a warning.
    StoreError
        ``out`` holds another run or other files, a unit can't be stored, another process is
        running in the folder, or no unit could be measured.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from repsim_kernels.experiments import Study, run
    >>> images, labels = torch.randn(20, 3, 2, 2), torch.arange(2).repeat(10)
    >>> layers = [nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2)]
    >>> studies = [
    ...     Study(nn.Sequential(*layers), ["2"], images, labels, metrics=["cka"], name=name)
    ...     for name in ("a", "b")
    ... ]
    >>> run(studies).table.groupby("model").size().to_dict()  # 2 classes x 1 layer x 16 cells each
    {'a': 32, 'b': 32}
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
                f"{len(failed)} of {len(store.units)} units failed and are left out; the first is "
                f"{unit}: {error}",
                stacklevel=2,
            )
        return Results(store.compact(), store.folder)
    total, parts = sum(len(study.units) for study in studies), []
    for study in studies:
        for unit, rows in zip(study.units, measure.rows(study, study.units), strict=True):
            parts.append(rows)
            if progress is not None:
                progress(RunProgress(Event("done", unit, ""), len(parts), 0, total))
    table = pd.concat(parts, ignore_index=True)
    table = table.sort_values(KEYS, kind="stable", ignore_index=True)
    notes = {study.name: study.note for study in studies if study.note is not None}
    kinds = {study.name: describe_ablations(study.cells, study.fill) for study in studies}
    table.attrs = make_attributes(notes, kinds)
    return Results(table)


def execute(
    store: Store,
    executor: Executor,
    shard: Shard = Shard(),  # noqa: B008  (it is immutable)
    progress: ProgressCallback | None = None,
) -> dict[Unit, str]:
    """Measure the remaining units of a run with an executor.

    If another attempt may help, a failed unit is retried after the others, up to `MAX_ATTEMPTS`
    attempts in total.

    Parameters
    ----------
    store : Store
    executor : Executor
        Closed before returning.
    shard : Shard, optional
        Which of the run's units to measure; all by default.
    progress : callable, optional
        Called with a `RunProgress` when a unit starts, is done, or has failed.

    Returns
    -------
    dict
        The error of each failed unit; also recorded in the folder.

    Raises
    ------
    StoreError
        A unit can't be stored, or another process is running in the folder.
    ExecutorError
        No worker can start, or a worker stores its units in another folder.
    """
    units, attempts, failed = shard.select(store.units), Counter[Unit](), dict[Unit, str]()
    lock = hold_lock(store.folder, shard, executor.workers)
    with closing(executor), lock, _remove_temporary_files(store, units):
        pending = deque(store.unfinished(units))
        done = len(units) - len(pending)
        if not pending:
            return {}
        with closing(executor.run(pending)) as events:  # type: ignore[type-var]
            for event in events:
                unit = event.unit
                if event.kind == "done":
                    _check_stored(store, event)
                    done += 1
                elif event.kind == "failed":
                    attempts[unit] += 1
                    if event.retryable and attempts[unit] < MAX_ATTEMPTS:
                        pending.append(unit)
                    else:
                        failed[unit] = event.error
                        store.record_failure(
                            unit, event.error, details=event.details, worker=event.worker
                        )
                if progress is not None:
                    progress(RunProgress(event, done, len(failed), len(units)))
    return failed


@contextmanager
def _remove_temporary_files(store: Store, units: Sequence[Unit]) -> Iterator[None]:
    """Delete partially written files before and after, including those of earlier killed runs."""
    store.remove_temporary_files(units)
    try:
        yield
    finally:
        store.remove_temporary_files(units)


def _check_stored(store: Store, event: Event) -> None:
    if not store.part_path(event.unit).exists():
        raise ExecutorError(
            f"out: {event.worker} stored {event.unit}, but this process can't see its part in "
            f"{store.folder}; expected a folder that all machines share"
        )
