"""The status of a run, from its folder: finished, remaining and failed units, and processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repsim_kernels.experiments.errors import DamagedError
from repsim_kernels.experiments.runs.lock import Driver, list_drivers
from repsim_kernels.experiments.runs.store import TABLE, Store
from repsim_kernels.experiments.study.units import Unit


@dataclass(frozen=True)
class ModelStatus:
    """The units of one model in a run.

    Attributes
    ----------
    model : str
    total, done, failed : int
        Number of units: all, finished, and recorded as failed.
    seconds : float or None
        Mean time of the model's finished units; if it has none, of all finished units; None if
        there are none.
    """

    model: str
    total: int
    done: int
    failed: int
    seconds: float | None

    @property
    def remaining(self) -> int:
        return self.total - self.done - self.failed


@dataclass(frozen=True)
class Status:
    """The state of a run's folder at one moment.

    Attributes
    ----------
    folder : Path
    models : tuple of ModelStatus
        One per model, in the run's order.
    failed : dict of Unit to str
        The error of each failed unit. The next run retries them.
    damaged : dict of Unit to str
        For each unit whose part can't be read, the reason; these units count as remaining.
    drivers : tuple of Driver
        The processes that are running in the folder now.
    table : int or None
        Number of units in ``results.parquet``; None if there is no readable table.
    """

    folder: Path
    models: tuple[ModelStatus, ...]
    failed: dict[Unit, str]
    damaged: dict[Unit, str]
    drivers: tuple[Driver, ...]
    table: int | None

    @property
    def total(self) -> int:
        """All units of the run."""
        return sum(model.total for model in self.models)

    @property
    def done(self) -> int:
        """Finished units."""
        return sum(model.done for model in self.models)

    @property
    def remaining(self) -> int:
        """Units that are neither finished nor recorded as failed."""
        return sum(model.remaining for model in self.models)

    @property
    def workers(self) -> int:
        """The workers of all running processes together."""
        return sum(driver.workers for driver in self.drivers)

    @property
    def seconds_left(self) -> float | None:
        """Estimated for the current workers, or for one if none runs; None if unknown."""
        if any(model.seconds is None for model in self.models):
            return None
        work = sum(model.remaining * (model.seconds or 0.0) for model in self.models)
        return work / max(1, self.workers)

    @property
    def per_minute(self) -> float | None:
        """Expected units per minute of the same workers; None if unknown or nothing remains."""
        return 60 * self.remaining / self.seconds_left if self.seconds_left else None


def read_status(folder: str | os.PathLike[str]) -> Status:
    """Read the status of a run, whether or not it is running; write nothing, and read no rows.

    Parameters
    ----------
    folder : path

    Returns
    -------
    Status

    Raises
    ------
    StoreError
        The folder does not hold a run, its ``study.json`` is damaged, or a part belongs to another
        run or another unit.

    Notes
    -----
    Times come from the records of the finished units, not from a clock.
    """
    store = Store(folder)
    # Before the parts, so that those of a process that ends in between are counted.
    active = tuple(list_drivers(store.folder))
    seconds, damaged = dict[Unit, float](), dict[Unit, str]()
    for unit in store.units:
        try:
            facts = store.read_facts(unit)
        except DamagedError as error:
            damaged[unit] = str(error)
        else:
            if facts is not None:
                seconds[unit] = facts.get("seconds", 0.0)
    failed = store.failures()
    return Status(
        store.folder,
        tuple(_iter_model_statuses(store.units, seconds, failed)),
        failed,
        damaged,
        active,
        _count_units_in_table(store),
    )


def _iter_model_statuses(
    units: list[Unit], seconds: dict[Unit, float], failed: dict[Unit, str]
) -> Iterator[ModelStatus]:
    for model in dict.fromkeys(unit.model for unit in units):
        model_units = [unit for unit in units if unit.model == model]
        own_seconds = [seconds[unit] for unit in model_units if unit in seconds]
        known = own_seconds or list(seconds.values())
        yield ModelStatus(
            model,
            len(model_units),
            len(own_seconds),
            sum(unit in failed for unit in model_units),
            sum(known) / len(known) if known else None,
        )


def _count_units_in_table(store: Store) -> int | None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        pandas = parquet.read_schema(store.folder / TABLE).pandas_metadata or {}
    except (FileNotFoundError, pyarrow.ArrowInvalid):
        return None
    missing = pandas.get("attributes", {}).get("missing", "0 of all")
    return len(store.units) - int(missing.split()[0])
