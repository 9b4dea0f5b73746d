"""A run's folder: its configuration, one part for each finished unit, the table at the end."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]

CONFIGURATION = "study.json"
TABLE = "results.parquet"


class StoreError(ValueError):
    """A run folder can't be used: another configuration's, somebody else's, or damaged."""


class Unit(NamedTuple):
    """The smallest piece of work that is stored by itself."""

    model: str
    layer: str
    target: str


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` that takes its place only when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """The folder of one run, new or to be gone on with.

    Parameters
    ----------
    folder : path
        Made when it does not exist. One that exists must be empty or of the same configuration.
    configuration : dict
        Everything that decides the rows, JSON-able: two runs of equal configuration are the same.
    about : callable, optional
        Gives what else a reader wants to know, JSON-able; called once, for a new folder.

    Raises
    ------
    StoreError
        The folder holds another configuration or other files, or its ``study.json`` is damaged.
    OSError
        The folder can't be made or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        configuration: dict[str, Any],
        about: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.folder = Path(folder)
        wanted = json.loads(json.dumps(configuration))
        check(self.folder, wanted)
        if not (self.folder / CONFIGURATION).exists():
            text = {"hash": digest(wanted), "configuration": wanted, "about": about()}
            self._parts.mkdir(parents=True, exist_ok=True)
            self._write(text)

    def _write(self, study: dict[str, Any]) -> None:
        with replacing(self.folder / CONFIGURATION) as path:
            path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")

    @property
    def _parts(self) -> Path:
        return self.folder / "parts"

    def path(self, unit: Unit) -> Path:
        """Where a unit's rows are: a name that no other unit has."""
        # "-" is escaped, so that "--" only ever stands between two names.
        safe = (re.sub(r"[^\w. +]", lambda m: f"%{ord(m[0]):02X}", name) for name in unit)
        return self._parts / ("--".join(safe) + ".parquet")

    def left(self, units: Iterable[Unit]) -> list[Unit]:
        """The units that are not finished, in their order."""
        return [unit for unit in units if not self.path(unit).exists()]

    def put(self, unit: Unit, rows: pd.DataFrame) -> None:
        """Store a finished unit's rows, whole or not at all."""
        self._parts.mkdir(exist_ok=True)
        with replacing(self.path(unit)) as path:
            rows.to_parquet(path, index=False)

    def read(self, units: Iterable[Unit]) -> pd.DataFrame:
        """The rows of these units, one part after the other."""
        return pd.concat([_read(self.path(unit)) for unit in units], ignore_index=True)

    def took(self, seconds: float) -> None:
        """Add to the time that the run is said to have taken."""
        study = _study(self.folder)
        study["about"]["seconds"] = study["about"].get("seconds", 0.0) + seconds
        self._write(study)

    def finish(self, table: pd.DataFrame) -> Path:
        """Write the whole table and return its path."""
        with replacing(self.folder / TABLE) as path:
            table.to_parquet(path, index=False)
        return self.folder / TABLE


def check(folder: Path, configuration: dict[str, Any]) -> None:
    """Raise StoreError where a run of this configuration can't use the folder; write nothing."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"out: {folder} is a file; expected a folder")
    if (folder / CONFIGURATION).exists():
        there = _study(folder)["configuration"]
        changed = _differences(there, configuration)
        if changed:
            raise StoreError(
                f"out: {folder} holds a run of another configuration ({'; '.join(changed[:3])}"
                f"{'; …' if len(changed) > 3 else ''}); expected the same one or another folder"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise StoreError(
            f"out: {folder} holds files but no {CONFIGURATION}; "
            "expected a new or empty folder, or one of an earlier run"
        )


def load(folder: str | os.PathLike[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and the ``study.json`` of a finished run.

    Raises
    ------
    StoreError
        The folder is not that of a finished run, or is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIGURATION).exists():
        raise StoreError(f"run: {folder} has no {CONFIGURATION}; expected the folder of a run")
    if not (folder / TABLE).exists():
        raise StoreError(f"run: {folder} has no {TABLE}; expected a run that came to its end")
    return _read(folder / TABLE), _study(folder)


def digest(configuration: dict[str, Any]) -> str:
    """A short name of a configuration: the same whatever the order of its keys."""
    text = json.dumps(configuration, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _study(folder: Path) -> dict[str, Any]:
    path = folder / CONFIGURATION
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if study["hash"] != digest(study["configuration"]):
            raise ValueError("its hash is not that of its configuration")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"out: {path} is damaged ({error}); expected what a run wrote") from None
    return dict(study)


def _read(path: Path) -> pd.DataFrame:
    import pyarrow  # type: ignore[import-untyped]

    try:
        return pd.read_parquet(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"out: {path} can't be read ({reason}); delete it and run again to make it anew"
        ) from None


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Name what differs between two configurations, deepest keys first met first."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in (*there, *(key for key in here if key not in there)):
            path = f"{name}.{key}" if name else key
            if key not in there or key not in here:
                found.append(f"{path} only {'here' if key in here else 'there'}")
            else:
                found += _differences(there[key], here[key], path)
        return found
    if there == here:
        return []
    return [f"{name}: {_brief(there)} there, {_brief(here)} here"]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"
