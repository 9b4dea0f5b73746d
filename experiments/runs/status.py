"""What of a run is done, left and failed, and who works on it: what its folder says."""

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
class Share:
    """One model's part of a run.

    Attributes
    ----------
    model : str
    total, done, failed : int
        Units: all, finished, and recorded as failed.
    seconds : float or None
        What its finished units took on average, or those of all models where it has none; None
        where nobody has.
    """

    model: str
    total: int
    done: int
    failed: int
    seconds: float | None

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed


@dataclass(frozen=True)
class Status:
    """A run at a moment, as its folder has it.

    Attributes
    ----------
    folder : Path
    shares : tuple of Share
        One for each model, in the run's order.
    failed : dict of Unit to str
        The units that were given up, each with its error. The next run tries them again.
    damaged : dict of Unit to str
        The units whose parts can't be read, each with the reason; they count as left.
    drivers : tuple of Driver
        The processes that work in the folder now.
    table : int or None
        How many units ``results.parquet`` has; None where there is none that can be read.
    """

    folder: Path
    shares: tuple[Share, ...]
    failed: dict[Unit, str]
    damaged: dict[Unit, str]
    drivers: tuple[Driver, ...]
    table: int | None

    @property
    def total(self) -> int:
        """Units of the run."""
        return sum(share.total for share in self.shares)

    @property
    def done(self) -> int:
        """Units that are finished."""
        return sum(share.done for share in self.shares)

    @property
    def left(self) -> int:
        """Units that are neither finished nor given up."""
        return sum(share.left for share in self.shares)

    @property
    def workers(self) -> int:
        """At work now, all drivers' together."""
        return sum(driver.workers for driver in self.drivers)

    @property
    def seconds_left(self) -> float | None:
        """For those at work, or for one worker where nobody is; None until a unit is finished."""
        if any(share.seconds is None for share in self.shares):
            return None
        work = sum(share.left * (share.seconds or 0.0) for share in self.shares)
        return work / max(1, self.workers)

    @property
    def per_minute(self) -> float | None:
        """Units a minute of what is left, by the same workers; None where it isn't known."""
        return 60 * self.left / self.seconds_left if self.seconds_left else None


def status(folder: str | os.PathLike[str]) -> Status:
    """Look at a run, whether anybody works on it or not; write nothing, read no rows.

    Parameters
    ----------
    folder : path

    Returns
    -------
    Status

    Raises
    ------
    StoreError
        The folder is not that of a run, its ``study.json`` is damaged, or a part is not this
        run's, or another unit's.

    Notes
    -----
    Times are those that were recorded with each finished unit: no clock is looked at.
    """
    store = Store(folder)
    working = tuple(list_drivers(store.folder))  # first: whoever ends meanwhile has left parts
    took, damaged = dict[Unit, float](), dict[Unit, str]()
    for unit in store.units:
        try:
            facts = store.read_facts(unit)
        except DamagedError as error:
            damaged[unit] = str(error)
        else:
            if facts is not None:
                took[unit] = facts.get("seconds", 0.0)
    failed = store.failures()
    return Status(
        store.folder,
        tuple(_shares(store.units, took, failed)),
        failed,
        damaged,
        working,
        _units_in_table(store),
    )


def _shares(units: list[Unit], took: dict[Unit, float], failed: dict[Unit, str]) -> Iterator[Share]:
    for model in dict.fromkeys(unit.model for unit in units):
        mine = [unit for unit in units if unit.model == model]
        seconds = [took[unit] for unit in mine if unit in took]
        known = seconds or list(took.values())
        yield Share(
            model,
            len(mine),
            len(seconds),
            sum(unit in failed for unit in mine),
            sum(known) / len(known) if known else None,
        )


def _units_in_table(store: Store) -> int | None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        pandas = parquet.read_schema(store.folder / TABLE).pandas_metadata or {}
    except (FileNotFoundError, pyarrow.ArrowInvalid):
        return None
    missing = pandas.get("attributes", {}).get("missing", "0 of all")
    return len(store.units) - int(missing.split()[0])
