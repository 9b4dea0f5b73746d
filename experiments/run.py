"""Runs of one study or several, each finished unit stored at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]

from .store import Store, Unit

if TYPE_CHECKING:
    from .study import Study

KEYS = ["model", "class", "layer", "cell"]


class RunError(ValueError):
    """Studies can't be run together."""


class Step(NamedTuple):
    """Where a run is: the unit that starts now (the last one, once ``done == total``)."""

    unit: Unit
    done: int
    total: int


def run(
    studies: Sequence[Study],
    store: Store | None = None,
    progress: Callable[[Step], object] | None = None,
) -> pd.DataFrame:
    """Run some studies of different names as one.

    Parameters
    ----------
    studies : sequence of Study
    store : Store, optional
        What `run_folder` gives. Each finished unit is stored there at once, those that are there
        already are not computed, and ``results.parquet`` is written at the end.
    progress : callable, optional
        Called with a `Step` before each unit that is computed, and at the end.

    Returns
    -------
    DataFrame
        One row per model, class, layer and cell, sorted by these columns; then ``size`` (neurons
        of the cell), a column per metric (distance of the ablated from the original
        representation), and one per function change, positive where function is lost:
        ``rank_deficit``, ``log_probability``, ``probability``, ``top1``, ``top5`` (see
        `experiments.performance`), ``decodability_refit`` and ``decodability_frozen`` (balanced
        accuracy of the class against the rest, intact minus ablated), ``margin_refit`` and
        ``margin_frozen`` (what the probe's output loses on the right side); each of them again
        over every other image, ``_odd`` and ``_even``. ``energy`` is the share of the variance
        over stimuli that the cell's neurons have. The same run gives the same bits.
        ``attrs["notes"]`` has the studies' notes, by model, and is stored.

    Raises
    ------
    RunError
        Two studies have one name.
    StudyError
        A layer's activations are not finite.
    StoreError
        A stored unit can't be read.
    """
    _check_names(studies)
    units = [unit for study in studies for unit in study.units]
    left = set(units if store is None else store.left(units))
    parts, done, start = [], len(units) - len(left), time.perf_counter()
    try:
        for study in studies:
            todo = [unit for unit in study.units if unit in left]
            measured = study.measure(todo)
            for unit in todo:
                if progress is not None:
                    progress(Step(unit, done, len(units)))
                part = next(measured)
                parts.append(part)
                if store is not None:
                    store.put(unit, part)
                done += 1
    finally:
        if store is not None and parts:
            store.took(time.perf_counter() - start)
    if progress is not None and units:
        progress(Step(units[-1], done, len(units)))
    table = pd.concat(parts, ignore_index=True) if store is None else store.read(units)
    table = table.sort_values(KEYS, kind="stable", ignore_index=True)
    notes = {study.name: study.note for study in studies if study.note is not None}
    table.attrs = {"notes": notes} if notes else {}
    if store is not None:
        store.finish(table)
    return table


def run_folder(
    studies: Sequence[Study], out: str | os.PathLike[str], about: dict[str, Any] | None = None
) -> Store:
    """Make a run's folder, or open one to go on with.

    Parameters
    ----------
    studies : sequence of Study
        Of different names.
    out : path
        A new or empty folder, or one of an earlier run of the same studies.
    about : dict, optional
        JSON-able things that the report is to say about the run.

    Raises
    ------
    RunError
        Two studies have one name.
    StoreError
        ``out`` holds another run or other files.
    OSError
        ``out`` can't be written.
    """
    _check_names(studies)
    configuration = {
        "models": {study.name: study.configuration() for study in studies},
        "versions": {name: _version(name) for name in ("repsim-kernels", "torch")},
    }

    def all_about() -> dict[str, Any]:
        return {**(about or {}), "models": {study.name: study.about() for study in studies}}

    return Store(out, configuration, all_about)


def _check_names(studies: Sequence[Study]) -> None:
    if len({study.name for study in studies}) < len(studies):
        raise RunError("studies: two have the same name; expected distinct names")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
