"""Any order of writes, crashes, damage, resuming and compacting keeps exactly the planned rows."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import pandas as pd
import pyarrow.parquet as pq
import pytest
from _run_data import make_configuration, make_rows
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from repsim_kernels.experiments.columns import KEYS
from repsim_kernels.experiments.errors import StoreError
from repsim_kernels.experiments.runs.store import TABLE, Store
from repsim_kernels.experiments.study.units import Unit

UNITS = st.integers(0, 6)
SEEDS = st.integers(0, 3)


class Crash(BaseException):
    """The process has died: none of its later code runs."""


class Folder(RuleBasedStateMachine):
    """A run's folder, alongside a dictionary of its expected contents."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.rows: dict[Unit, pd.DataFrame] = {}
        self.damaged: set[Unit] = set()
        self.foreign: set[Unit] = set()
        self.failed: dict[Unit, str] = {}
        self.crashes = 0

    def teardown(self) -> None:
        self.place.cleanup()

    @initialize()
    def create(self) -> None:
        root = Path(self.place.name)
        self.store = Store.create(root / "run", make_configuration())
        self.other = Store.create(root / "other", make_configuration(versions={"torch": "2.12"}))
        self.planned = self.store.units
        assert len(self.planned) == 7

    def expect_rows(self, unit: Unit, rows: pd.DataFrame) -> None:
        self.rows[unit] = rows
        self.damaged.discard(unit)
        self.foreign.discard(unit)

    @rule(number=UNITS, seed=SEEDS)
    def write(self, number: int, seed: int) -> None:
        unit = self.planned[number]
        self.store.save(unit, make_rows(unit, seed), seconds=1.0)
        self.expect_rows(unit, make_rows(unit, seed))
        self.failed.pop(unit, None)

    @rule(number=UNITS, seed=SEEDS, when=st.sampled_from(["write", "fsync", "replace", "after"]))
    def crash(self, number: int, seed: int, when: str) -> None:
        """Die in the middle of a write, so that the process can't clean up."""
        unit = self.planned[number]
        replace, write = os.replace, pq.write_table

        def die(*arguments: object, **options: object) -> None:
            if when == "write":
                write(*arguments, **options)
                path = Path(str(arguments[1]))
                path.write_bytes(path.read_bytes()[:99])
            elif when == "after":
                replace(*arguments)  # type: ignore[arg-type]
            raise Crash

        # Each dying process gets a new pid, because its partial file keeps a name with the pid.
        self.crashes += 1
        target = {"write": (pq, "write_table"), "fsync": (os, "fsync")}.get(when, (os, "replace"))
        with (
            mock.patch.object(*target, die),
            mock.patch.object(Path, "unlink"),
            mock.patch.object(os, "getpid", return_value=self.crashes),
            pytest.raises(Crash),
        ):
            self.store.save(unit, make_rows(unit, seed), seconds=1.0)
        if when == "after":
            self.expect_rows(unit, make_rows(unit, seed))
        self.resume()

    @rule()
    def resume(self) -> None:
        self.store = Store.create(self.store.folder, make_configuration())
        assert self.store.units == self.planned

    @rule(number=UNITS)
    def fail(self, number: int) -> None:
        unit = self.planned[number]
        if unit not in self.rows and unit not in self.foreign:
            self.store.record_failure(unit, f"no {number}")
            self.failed[unit] = f"no {number}"
            self.damaged.discard(unit)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), how=st.sampled_from(["cut", "flip", "empty", "delete"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        unit = data.draw(st.sampled_from(sorted(self.rows)))
        path = self.store.part_path(unit)
        good = path.read_bytes()
        if how == "delete":
            path.unlink()
        elif how == "flip":  # a byte somewhere within the distances
            column = pq.read_metadata(path).row_group(0).column(5)
            start = column.dictionary_page_offset or column.data_page_offset
            at = start + 40 + data.draw(st.integers(0, 7))
            path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        else:
            path.write_bytes(good[: 0 if how == "empty" else len(good) * 2 // 3])
        del self.rows[unit]
        if how != "delete":
            self.damaged.add(unit)

    @rule(number=UNITS, same_run=st.booleans())
    def add_a_foreign_part(self, number: int, same_run: bool) -> None:
        unit = self.planned[number]
        if same_run:  # but of another unit
            source = self.store.part_path(self.planned[number - 1])
            if self.planned[number - 1] not in self.rows:
                return
        else:
            self.other.save(unit, make_rows(unit))
            source = self.other.part_path(unit)
        self.store.part_path(unit).parent.mkdir(exist_ok=True)
        self.store.part_path(unit).write_bytes(source.read_bytes())
        self.rows.pop(unit, None)
        self.damaged.discard(unit)
        self.foreign.add(unit)

    @precondition(lambda self: self.foreign)
    @rule()
    def move_foreign_parts_away(self) -> None:
        for unit in self.foreign:
            self.store.part_path(unit).unlink()
        self.foreign.clear()

    @rule()
    def remove_temporary_files(self) -> None:
        self.store.remove_temporary_files(self.planned)
        files = [path.name for path in self.store.folder.rglob("*") if path.is_file()]
        assert not [name for name in files if name.endswith(".tmp") and "parquet" in name]

    @precondition(lambda self: self.rows and not self.foreign)
    @rule()
    def compact(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.store.compact()
        assert len(caught) == len(self.damaged)
        expected = pd.concat([self.rows[u] for u in self.planned if u in self.rows])
        table = pd.read_parquet(self.store.folder / TABLE)
        assert not table.duplicated(KEYS).any()
        pd.testing.assert_frame_equal(
            table, expected.sort_values(KEYS, ignore_index=True), check_exact=True
        )
        missing = len(self.planned) - len(self.rows)
        assert table.attrs.get("missing") == (f"{missing} of 7" if missing else None)

    @invariant()
    def planned_units_are_finished_or_unfinished(self) -> None:
        if self.foreign:
            before = {unit: self.store.part_path(unit).read_bytes() for unit in self.foreign}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(StoreError, match=r"move the file away$") as caught:
                    self.store.unfinished()
            assert any(
                str(self.store.part_path(unit)) in str(caught.value) for unit in self.foreign
            )
            assert before == {
                unit: self.store.part_path(unit).read_bytes() for unit in self.foreign
            }
            return
        with warnings.catch_warnings(record=True) as caught_warnings:
            warnings.simplefilter("always")
            finished = self.store.read_finished()
            unfinished = self.store.unfinished()
        messages = {str(warning.message) for warning in caught_warnings}
        assert len(messages) == len(self.damaged)
        assert all(
            any(str(self.store.part_path(u)) in text for text in messages) for u in self.damaged
        )
        assert unfinished == [unit for unit in self.planned if unit not in self.rows]
        assert list(finished) == [unit for unit in self.planned if unit in self.rows]
        for unit, rows in finished.items():
            pd.testing.assert_frame_equal(rows, self.rows[unit], check_exact=True)

    @invariant()
    def failures_are_those_of_unfinished_units(self) -> None:
        present = {unit for unit in self.planned if self.store.part_path(unit).exists()}
        assert self.store.failures() == {
            unit: error for unit, error in self.failed.items() if unit not in present
        }


TestFolder = Folder.TestCase
TestFolder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
