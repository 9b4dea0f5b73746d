"""What of a run is done, left and failed, and who works on it: what its folder says."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import DamagedError
from .lock import Driver, drivers
from .progress import duration, pace
from .store import TABLE, Store, Unit

_SHOWN = 5  # errors


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
    working = tuple(drivers(store.folder))  # first: whoever ends meanwhile has left parts
    took, damaged = dict[Unit, float](), dict[Unit, str]()
    for unit in store.units:
        try:
            facts = store.facts(unit)
        except DamagedError as error:
            damaged[unit] = str(error)
        else:
            if facts is not None:
                took[unit] = facts.get("seconds", 0.0)
    failed = store.failed()
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


def show_status(console: Console, status: Status) -> None:
    """Print a run's status."""
    counts = f"{status.done} of {status.total} units done, {status.left} left"
    if status.failed:
        counts += f", {len(status.failed)} failed"
    _say(console, f"{status.folder}: {counts}")
    view = Table(box=SIMPLE, padding=0)
    view.add_column("model", overflow="fold")
    for head in ("units", "done", "left", "failed"):
        view.add_column(head, justify="right", no_wrap=True)
    for share in status.shares:
        numbers = share.total, share.done, share.left, share.failed
        view.add_row(Text(share.model), *map(str, numbers))
    console.print(view)
    for lines in (_faults(status), _work(status), _outcome(status)):
        for line in lines:
            _say(console, line)


def _say(console: Console, line: str) -> None:
    # Wrapped between words alone: rich would break a path that is to be copied.
    for part in textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False):
        console.print(part, markup=False, highlight=False, soft_wrap=True)


def _faults(status: Status) -> Iterator[str]:
    told = [f"failed: {unit}: {error}" for unit, error in status.failed.items()]
    yield from told[:_SHOWN]
    if len(told) > _SHOWN:
        yield f"failed: {len(told) - _SHOWN} more, see {status.folder / 'failed'}"
    for unit, reason in status.damaged.items():
        yield f"damaged: {unit} counts as left: {reason}"


def _work(status: Status) -> Iterator[str]:
    for driver in status.drivers:
        shard = "" if driver.shard == "1/1" else f", shard {driver.shard}"
        yield f"At work: {driver}, {_workers(driver.workers)}{shard}"
    if not status.drivers and status.left + len(status.failed):
        again = ", and tries again what failed" if status.failed else ""
        yield f"Nobody works on it now; the command that began it goes on from here{again}."
    if not status.left:
        return
    if status.seconds_left is None or status.per_minute is None:
        yield "Rate and time left are not known until a unit is done."
    else:
        who = _workers(status.workers) if status.drivers else "one worker"
        yield (
            f"{duration(status.seconds_left)} left for {who}, {pace(status.per_minute)}, "
            "by what finished units took"
        )


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _outcome(status: Status) -> Iterator[str]:
    if status.left or status.drivers or not status.done:
        return
    all_done = "All but the failed units are done" if status.failed else "All units are done"
    path = status.folder / TABLE
    if status.table == status.done:
        yield f"{all_done}: {path}"
    else:
        lacks = "is missing" if status.table is None else f"has only {status.table} of them"
        yield f"{all_done}, but {path} {lacks}:"
        yield f"python -m experiments compact {status.folder}"
