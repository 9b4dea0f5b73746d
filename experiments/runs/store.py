"""A run's folder: its configuration, one part file per finished unit, and the table of results."""

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

from repsim_kernels._files import replace_file
from repsim_kernels.experiments.columns import KEYS
from repsim_kernels.experiments.errors import DamagedError, StoreError
from repsim_kernels.experiments.study.configuration import describe_ablations, differences, digest
from repsim_kernels.experiments.study.units import Unit, units_of

CONFIGURATION = "study.json"
TABLE = "results.parquet"
_FACTS_KEY = b"repsim_kernels"  # in the Parquet metadata of a part


@contextmanager
def _write_atomically(path: Path) -> Iterator[Path]:
    """Write a file as `replace_file` does; make its folder, and raise StoreError if that fails."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as temporary:
            yield temporary
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).partition("\n")[0]
        raise StoreError(f"out: {path} can't be written ({reason})") from error


class Store:
    """The folder of one run, made by `create`.

    Parameters
    ----------
    folder : path

    Attributes
    ----------
    hash : str
        Hash of the configuration.
    study : dict
        The contents of ``study.json``.
    units : list of Unit
        All units of the run, in the order in which the table is assembled.

    Raises
    ------
    StoreError
        The folder does not hold a run, or its ``study.json`` is damaged.
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
                f"run: {self.folder} was written by an earlier version, which did not divide the "
                f"classes of {old[0]} into blocks; expected a run of this version"
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
        """Make a run's folder, or open an existing one.

        Parameters
        ----------
        folder : path
            An existing folder must be empty or hold a run with the same configuration.
        configuration : dict
            Everything that determines the rows, serializable as JSON. Two runs with equal
            configurations are the same run.
        facts : callable, optional
            Returns further entries of ``study.json``, serializable as JSON. It is called only for a
            new folder.

        Raises
        ------
        StoreError
            The folder holds another configuration or other files, or its ``study.json`` is damaged.
        OSError
            The folder can't be made or written.
        """
        folder = Path(folder)
        configuration = json.loads(json.dumps(configuration))
        check_compatible(folder, configuration)
        if not (folder / CONFIGURATION).exists():
            study = {"hash": digest(configuration), "configuration": configuration, **facts()}
            folder.mkdir(parents=True, exist_ok=True)
            # If two runs start at once, the first to write wins and the other adopts its memory
            # budget, because the budget can change the last bits of the results.
            with suppress(FileExistsError), replace_file(folder / CONFIGURATION, new=True) as path:
                path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
            check_compatible(folder, configuration)
        return cls(folder)

    def part_path(self, unit: Unit) -> Path:
        """The file of a unit's rows; no two units share one."""
        return self.folder / "parts" / f"{_file_stem(unit)}.parquet"

    def save(self, unit: Unit, rows: pd.DataFrame, **facts: Any) -> None:
        """Store a finished unit's rows and facts (serializable as JSON) atomically.

        Raises
        ------
        StoreError
            The part can't be written: the disk is full or read-only, for example.
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
        """Read the facts stored with a finished unit; None if it is not finished.

        Raises
        ------
        DamagedError
            The part can't be read.
        StoreError
            The part belongs to another run or another unit.
        """
        import pyarrow.parquet as parquet

        path = self.part_path(unit)
        with _detect_damage(path):
            try:
                metadata = parquet.read_metadata(path).metadata or {}
            except FileNotFoundError:
                return None
            facts = json.loads(metadata.get(_FACTS_KEY, '{"hash": "", "unit": ["", "", 0]}'))
            owner, stored_unit = facts["hash"], Unit(*facts["unit"])
        if owner != self.hash:
            origin = f"a run with configuration {owner}" if owner else "no run"
            raise StoreError(
                f"out: {path} belongs to {origin}; expected only parts of this run, with "
                f"configuration {self.hash}: move the file away"
            )
        if stored_unit != unit:
            raise StoreError(
                f"out: {path} holds unit {stored_unit}; expected {unit}: move the file away"
            )
        return dict(facts)

    def read_finished(self, units: Iterable[Unit] | None = None) -> dict[Unit, pd.DataFrame]:
        """Read the rows of those units (default: all) that are finished, in the given order.

        A damaged part causes a warning, and its unit counts as unfinished.

        Raises
        ------
        StoreError
            A part belongs to another run or another unit.
        """
        rows = {}
        for unit in self.units if units is None else units:
            try:
                facts = self.read_facts(unit)
                if facts is not None:
                    rows[unit] = _read_table(self.part_path(unit), facts.get("rows", ""))
            except DamagedError as error:
                warnings.warn(f"{error}; {unit} will be measured again", stacklevel=2)
        return rows

    def unfinished(self, units: Iterable[Unit] | None = None) -> list[Unit]:
        """List the units that are not finished, in order; raises the errors of `read_finished`."""
        units = self.units if units is None else list(units)
        finished = self.read_finished(units)
        return [unit for unit in units if unit not in finished]

    def record_failure(self, unit: Unit, error: str, **facts: Any) -> None:
        """Record that a unit failed, and why; delete its part, which can only be a damaged one."""
        self.part_path(unit).unlink(missing_ok=True)
        with _write_atomically(self._failure_path(unit)) as path:
            text = json.dumps({"unit": list(unit), "error": error, **facts}, indent=1)
            path.write_text(text + "\n", encoding="utf-8")

    def failures(self) -> dict[Unit, str]:
        """The error of each unit that failed and has not been finished since."""
        errors = {}
        for unit in self.units:
            with suppress(FileNotFoundError):  # another process may have just finished the unit
                text = self._failure_path(unit).read_text(encoding="utf-8")
                if not self.part_path(unit).exists():
                    errors[unit] = json.loads(text)["error"]
        return errors

    def compact(self) -> pd.DataFrame:
        """Write the table of all finished units, sorted by model, class, layer and cell.

        The table's ``attrs`` hold the studies' notes and ablations, by model, and the number of
        missing units, as far as there are any.

        Raises
        ------
        StoreError
            No unit is finished, or a part belongs to another run.
        """
        finished = self.read_finished()
        if not finished:
            raise StoreError(f"run: {self.folder} has no finished unit; expected one or more")
        table = pd.concat(finished.values(), ignore_index=True)
        table = table.sort_values(KEYS, kind="stable", ignore_index=True)
        models = self.study.get("about", {}).get("models", {})
        configured: dict[str, Any] = self.study["configuration"].get("models", {})
        missing = len(self.units) - len(finished)
        table.attrs = make_attributes(
            {name: about["note"] for name, about in models.items() if about.get("note")},
            {
                name: describe_ablations(study.get("cells", "selectivity"), study.get("fill"))
                for name, study in configured.items()
            },
        ) | ({"missing": f"{missing} of {len(self.units)}"} if missing else {})
        with _write_atomically(self.folder / TABLE) as path:
            table.to_parquet(path, index=False)
        return table

    def remove_temporary_files(self, units: Iterable[Unit]) -> None:
        """Delete temporary files of these units that killed processes left behind."""
        for unit in units:
            for path in (self.part_path(unit), self._failure_path(unit)):
                for temporary in path.parent.glob(f".{path.name}.*.tmp"):
                    temporary.unlink(missing_ok=True)

    def _failure_path(self, unit: Unit) -> Path:
        return self.folder / "failed" / f"{_file_stem(unit)}.json"


def make_attributes(notes: dict[str, str], ablations: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return a table's ``attrs``: by model, notes and unusual ablations, if there are any."""
    unusual = {name: kinds for name, kinds in ablations.items() if kinds}
    entries = {"notes": notes, "ablations": unusual}
    return {key: entry for key, entry in entries.items() if entry}


def check_compatible(folder: Path, configuration: dict[str, Any]) -> None:
    """Raise StoreError if a run with this configuration can't use the folder; write nothing."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise StoreError(f"out: {path} is a file; expected a folder")
    names = os.listdir(folder) if folder.exists() else []  # once: another process may be writing
    if CONFIGURATION in names:
        changes = differences(_read_configuration(folder)["configuration"], configuration)
        if changes:
            raise StoreError(
                f"out: {folder} holds a run with another configuration ({'; '.join(changes[:3])}"
                f"{'; …' if len(changes) > 3 else ''}); expected the same options or another folder"
            )
    elif any(not name.startswith(".") for name in names):
        raise StoreError(
            f"out: {folder} holds files but no {CONFIGURATION}; "
            "expected a new or empty folder, or one of an earlier run"
        )


def load_run(folder: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Load a run's table and its ``study.json``, to which the units' total seconds are added.

    Raises
    ------
    StoreError
        The folder does not hold a run with a table, or a file in it is damaged.
    """
    store = Store(folder)
    path = store.folder / TABLE
    if not path.exists():
        raise StoreError(f"run: {folder} has no {TABLE}; expected a finished run")
    try:
        table = _read_table(path)
    except DamagedError as error:
        raise StoreError(f"{error}; delete it, then run: repsim compact {folder}") from None
    seconds = 0.0
    for unit in store.units:
        with suppress(StoreError):  # the table is complete, even if a part has been damaged since
            seconds += (store.read_facts(unit) or {}).get("seconds", 0.0)
    return table, store.study | {"seconds": seconds}


def _file_stem(unit: Unit) -> str:
    # "-" is escaped, so that "--" occurs only between two names.
    safe = (re.sub(r"[^\w. +]", lambda m: f"%{ord(m[0]):02X}", str(name)) for name in unit)
    return "--".join(safe)


def _read_configuration(folder: Path) -> dict[str, Any]:
    path = folder / CONFIGURATION
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if study["hash"] != digest(study["configuration"]):
            raise ValueError("its hash does not match its configuration")
    except IsADirectoryError:
        raise StoreError(f"out: {path} is a folder; expected the file that a run wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"out: {path} is damaged ({error}); expected the file that a run wrote"
        ) from None
    return dict(study)


@contextmanager
def _detect_damage(path: Path) -> Iterator[None]:
    """Turn errors about a file's contents into DamagedError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system refused access; the file may be fine
        reason = " ".join(str(error).splitlines()[:1]).rstrip(".")
        raise DamagedError(f"out: {path} can't be read ({reason})") from None


def _read_table(path: Path, expected_hash: str | None = None) -> pd.DataFrame:
    with _detect_damage(path):
        table = pd.read_parquet(path, page_checksum_verification=True)
        if expected_hash not in (None, _hash_rows(table)):
            raise ValueError("its rows differ from those that were written")
    return table


def _hash_rows(table: pd.DataFrame) -> str:
    """Hash a table's column names and values; Parquet's page checksums do not cover the names.

    All NaNs hash alike: Arrow stores a missing value, not the bits of the NaN.
    """
    sha256 = hashlib.sha256()
    for name, column in table.items():
        values = column.to_numpy()
        is_numeric = values.dtype.kind in "biuf"
        if values.dtype.kind == "f":
            values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
        sha256.update(f"{name} {values.dtype.kind} ".encode())
        sha256.update(values.tobytes() if is_numeric else json.dumps(values.tolist()).encode())
    return sha256.hexdigest()[:16]
