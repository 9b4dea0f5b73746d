"""A run's folder: its configuration, a part for each finished unit, the table made of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.experiments.columns import KEYS
from repsim_kernels.experiments.errors import DamagedError, StoreError
from repsim_kernels.experiments.files import replacing
from repsim_kernels.experiments.study.configuration import differences, digest
from repsim_kernels.experiments.study.units import Unit, units_of

CONFIGURATION = "study.json"
TABLE = "results.parquet"
_FACTS_KEY = b"repsim_kernels"  # the key of a part's facts in its metadata


@contextmanager
def _write_atomically(path: Path) -> Iterator[Path]:
    """`replacing`, where a folder may have to be made and a full disk ends the run in a line."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).partition("\n")[0]
        raise StoreError(f"out: {path} can't be written ({reason})") from error


class Store:
    """The folder of one run, which `create` made.

    Parameters
    ----------
    folder : path

    Attributes
    ----------
    hash : str
        Of the configuration.
    study : dict
        What ``study.json`` holds.
    units : list of Unit
        All that the run is to measure, in the order of its table's making.

    Raises
    ------
    StoreError
        The folder is not that of a run, or its ``study.json`` is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / CONFIGURATION).exists():
            raise StoreError(
                f"run: {self.folder} has no {CONFIGURATION}; expected the folder of a run"
            )
        self.study = _read_configuration(self.folder)
        self.hash: str = self.study["hash"]
        models = self.study["configuration"].get("models", {})
        if old := [name for name, study in models.items() if "block" not in study]:
            raise StoreError(
                f"run: {self.folder} is of an earlier version, whose {old[0]} has no blocks of "
                "classes; expected a run of this one"
            )
        self.units = [
            unit
            for model, study in models.items()
            for unit in units_of(model, study["layers"], len(study["classes"]), study["block"])
        ]

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        configuration: dict[str, Any],
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> Store:
        """Make a run's folder, or open it where it is there already.

        Parameters
        ----------
        folder : path
            One that exists must be empty or of the same configuration.
        configuration : dict
            Everything that decides the rows, JSON-able: two runs of equal configuration are the
            same.
        facts : callable, optional
            Gives what else ``study.json`` is to hold, JSON-able; called for a new folder alone.

        Raises
        ------
        StoreError
            The folder holds another configuration or other files, or its ``study.json`` is damaged.
        OSError
            The folder can't be made or written.
        """
        folder = Path(folder)
        wanted = json.loads(json.dumps(configuration))
        check_compatible(folder, wanted)
        if not (folder / CONFIGURATION).exists():
            study = {"hash": digest(wanted), "configuration": wanted, **facts()}
            folder.mkdir(parents=True, exist_ok=True)
            # Of two runs that begin at once the first is right: its memory decides the last bits.
            with suppress(FileExistsError), replacing(folder / CONFIGURATION, new=True) as path:
                path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
            check_compatible(folder, wanted)
        return cls(folder)

    def part_path(self, unit: Unit) -> Path:
        """Where a unit's rows are: a name that no other unit has."""
        return self.folder / "parts" / f"{_file_stem(unit)}.parquet"

    def save(self, unit: Unit, rows: pd.DataFrame, **facts: Any) -> None:
        """Store a finished unit's rows and JSON-able facts of it, whole or not at all.

        Raises
        ------
        StoreError
            It can't be written: the disk is full, or not to be written to.
        """
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        table = pyarrow.Table.from_pandas(rows, preserve_index=False)
        facts = {"hash": self.hash, "unit": list(unit), "rows": _hash_rows(rows), **facts}
        text = json.dumps(facts)
        table = table.replace_schema_metadata({**table.schema.metadata, _FACTS_KEY: text})
        with _write_atomically(self.part_path(unit)) as path:
            parquet.write_table(table, path, write_page_checksum=True)
        self._failure_path(unit).unlink(missing_ok=True)

    def read_facts(self, unit: Unit) -> dict[str, Any] | None:
        """What is known of a finished unit; None where it is not finished.

        Raises
        ------
        DamagedError
            The part can't be read.
        StoreError
            The part is not this run's, or another unit's.
        """
        import pyarrow.parquet as parquet

        path = self.part_path(unit)
        with _detect_damage(path):
            try:
                metadata = parquet.read_metadata(path).metadata or {}
            except FileNotFoundError:
                return None
            facts = json.loads(metadata.get(_FACTS_KEY, '{"hash": "", "unit": ["", "", 0]}'))
            owner, of = facts["hash"], Unit(*facts["unit"])
        if owner != self.hash:
            whose = f"configuration {owner}" if owner else "no run"
            raise StoreError(
                f"out: {path} is of {whose}, and the run of {self.hash}; expected parts of this "
                "run alone: move it away"
            )
        if of != unit:
            raise StoreError(f"out: {path} is a part of {of}; expected its own name: move it away")
        return dict(facts)

    def read_finished(self, units: Iterable[Unit] | None = None) -> dict[Unit, pd.DataFrame]:
        """The rows of the finished ones of some units, all by default, in their order.

        A part that is damaged is warned of, and its unit counts as not finished.

        Raises
        ------
        StoreError
            A part is not this run's, or another unit's.
        """
        found = {}
        for unit in self.units if units is None else units:
            try:
                facts = self.read_facts(unit)
                if facts is not None:
                    found[unit] = _read_table(self.part_path(unit), facts.get("rows", ""))
            except DamagedError as error:
                warnings.warn(f"{error}; {unit} is to be measured again", stacklevel=2)
        return found

    def unfinished(self, units: Iterable[Unit] | None = None) -> list[Unit]:
        """The units that are not finished, in their order; raises what `finished` does."""
        units = self.units if units is None else list(units)
        done = self.read_finished(units)
        return [unit for unit in units if unit not in done]

    def record_failure(self, unit: Unit, error: str, **facts: Any) -> None:
        """Record that a unit can't be measured, and why; a damaged part of it goes."""
        self.part_path(unit).unlink(missing_ok=True)
        with _write_atomically(self._failure_path(unit)) as path:
            text = json.dumps({"unit": list(unit), "error": error, **facts}, indent=1)
            path.write_text(text + "\n", encoding="utf-8")

    def failures(self) -> dict[Unit, str]:
        """The units that failed and are not finished, each with its error."""
        found = {}
        for unit in self.units:
            with suppress(FileNotFoundError):  # another process may finish it this very moment
                text = self._failure_path(unit).read_text(encoding="utf-8")
                if not self.part_path(unit).exists():
                    found[unit] = json.loads(text)["error"]
        return found

    def compact(self) -> pd.DataFrame:
        """Write the table of all finished units, sorted by model, class, layer and cell.

        ``attrs`` has the studies' notes, by model, and how many units are missing, if any.

        Raises
        ------
        StoreError
            No unit is finished, or a part is not this run's.
        """
        done = self.read_finished()
        if not done:
            raise StoreError(f"run: {self.folder} has no finished unit; expected one or more")
        table = pd.concat(done.values(), ignore_index=True)
        table = table.sort_values(KEYS, kind="stable", ignore_index=True)
        models = self.study.get("about", {}).get("models", {})
        notes = {name: about["note"] for name, about in models.items() if about.get("note")}
        missing = len(self.units) - len(done)
        table.attrs = ({"notes": notes} if notes else {}) | (
            {"missing": f"{missing} of {len(self.units)}"} if missing else {}
        )
        with _write_atomically(self.folder / TABLE) as path:
            table.to_parquet(path, index=False)
        return table

    def remove_temporary_files(self, units: Iterable[Unit]) -> None:
        """Delete what runs that were killed had half written of these units."""
        for unit in units:
            for path in (self.part_path(unit), self._failure_path(unit)):
                for half in path.parent.glob(f".{path.name}.*.tmp"):
                    half.unlink(missing_ok=True)

    def _failure_path(self, unit: Unit) -> Path:
        return self.folder / "failed" / f"{_file_stem(unit)}.json"


def check_compatible(folder: Path, configuration: dict[str, Any]) -> None:
    """Raise StoreError where a run of this configuration can't use the folder; write nothing."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"out: {folder} is a file; expected a folder")
    found = os.listdir(folder) if folder.exists() else []  # once: another may be making it
    if CONFIGURATION in found:
        there = _read_configuration(folder)["configuration"]
        changed = differences(there, configuration)
        if changed:
            raise StoreError(
                f"out: {folder} holds a run of another configuration ({'; '.join(changed[:3])}"
                f"{'; …' if len(changed) > 3 else ''}); expected the same one or another folder"
            )
    elif any(not name.startswith(".") for name in found):
        raise StoreError(
            f"out: {folder} holds files but no {CONFIGURATION}; "
            "expected a new or empty folder, or one of an earlier run"
        )


def load_run(folder: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and the ``study.json`` of a run, with the seconds that its units took.

    Raises
    ------
    StoreError
        The folder is not that of a run with a table, or is damaged.
    """
    store = Store(folder)
    path = store.folder / TABLE
    if not path.exists():
        raise StoreError(f"run: {folder} has no {TABLE}; expected a run that came to its end")
    try:
        table = _read_table(path)
    except DamagedError as error:
        raise StoreError(f"{error}; delete it, and compact the run to make it anew") from None
    seconds = 0.0
    for unit in store.units:
        with suppress(StoreError):  # the table is whole, whatever has become of a part
            seconds += (store.read_facts(unit) or {}).get("seconds", 0.0)
    return table, store.study | {"seconds": seconds}


def _file_stem(unit: Unit) -> str:
    # "-" is escaped, so that "--" only ever stands between two names.
    safe = (re.sub(r"[^\w. +]", lambda m: f"%{ord(m[0]):02X}", str(name)) for name in unit)
    return "--".join(safe)


def _read_configuration(folder: Path) -> dict[str, Any]:
    path = folder / CONFIGURATION
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if study["hash"] != digest(study["configuration"]):
            raise ValueError("its hash is not that of its configuration")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"out: {path} is damaged ({error}); expected what a run wrote") from None
    return dict(study)


@contextmanager
def _detect_damage(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the file's fault
        reason = " ".join(str(error).splitlines()[:1]).rstrip(".")
        raise DamagedError(f"out: {path} can't be read ({reason})") from None


def _read_table(path: Path, fingerprint: str | None = None) -> pd.DataFrame:
    with _detect_damage(path):
        table = pd.read_parquet(path, page_checksum_verification=True)
        if fingerprint not in (None, _hash_rows(table)):
            raise ValueError("its rows are not those that were written")
    return table


def _hash_rows(table: pd.DataFrame) -> str:
    """Of names and values: Parquet has checksums of pages, and none of what they are called.

    All NaNs are one value: Arrow stores a missing number, and not the bits of the NaN.
    """
    found = hashlib.sha256()
    for name, column in table.items():
        values = column.to_numpy()
        numbers = values.dtype.kind in "biuf"
        if values.dtype.kind == "f":
            values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
        found.update(f"{name} {values.dtype.kind} ".encode())
        found.update(values.tobytes() if numbers else json.dumps(values.tolist()).encode())
    return found.hexdigest()[:16]
