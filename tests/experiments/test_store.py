"""A run's folder: resuming, damage, parts of other runs, full disks and failures."""

from __future__ import annotations

import errno
import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from _run_data import create_stores, make_configuration, make_rows
from _toy import Toy, stop_after, toy_study

from repsim_kernels.experiments.errors import DamagedError, StoreError
from repsim_kernels.experiments.runs.membership import open_run
from repsim_kernels.experiments.runs.store import Store, load_run
from repsim_kernels.experiments.study.configuration import digest
from repsim_kernels.experiments.study.units import Unit


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def done_counts(steps: list[Any]) -> list[int]:
    return [step.done for step in steps if step.event.kind == "done"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "run", make_configuration())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"metric_images": 3, "block": 1}
    uninterrupted = toy_study(**options).run(tmp_path / "a").table
    with pytest.raises(KeyboardInterrupt):
        toy_study(**options).run(tmp_path / "b", stop_after(2))
    assert names(tmp_path / "b") == {
        ".lock",
        "study.json",
        "parts/toy--act1--1.parquet",
        "parts/toy--act1--2.parquet",
    }
    steps: list[Any] = []
    resumed = toy_study(**options).run(tmp_path / "b", steps.append).table
    assert [(step.event.kind, step.done) for step in steps] == [
        (what, n + (what == "done")) for n in (2, 3, 4, 5) for what in ("started", "done")
    ]
    assert [step.event.unit for step in steps[::2]] == toy_study(**options).units[2:]
    assert {(step.failed, step.total) for step in steps} == {(0, 6)}
    pd.testing.assert_frame_equal(resumed, uninterrupted, check_exact=True)
    pd.testing.assert_frame_equal(resumed, toy_study(**options).run().table, check_exact=True)
    stored, study = load_run(tmp_path / "b")
    pd.testing.assert_frame_equal(stored, resumed, check_exact=True)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    about = study["about"]["models"]["toy"]
    assert about["images"] == 15
    assert about["stimuli"] == 9


def test_resuming_a_finished_run_computes_nothing(tmp_path: Path) -> None:
    first = toy_study(metrics=["cka"]).run(tmp_path).table
    steps: list[Any] = []
    again = toy_study(metrics=["cka"]).run(tmp_path, steps.append).table
    assert steps == []
    assert again.equals(first)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"grid": (2, 2)}, r"models.toy.grid: \[4, 4\] before, \[2, 2\] now"),
        ({"ridge": 0.5}, "models.toy.ridge: 0.1 before, 0.5 now"),
        ({"name": "other"}, "models.toy only before; models.other only now"),
        ({"layers": ["act1"]}, "models.toy.layers"),
        ({"block": 2}, "models.toy.block: 1 before, 2 now"),
        ({"model": "other weights"}, "models.toy.weights"),
        ({"images": torch.zeros(15, 3, 8, 8)}, "models.toy.images"),
    ],
)
def test_a_folder_with_another_configuration_is_refused(
    tmp_path: Path, changes: dict[str, object], difference: str
) -> None:
    options = {"metrics": ["cka"], "block": 1}
    with pytest.raises(KeyboardInterrupt):
        toy_study(**options).run(tmp_path, stop_after(1))
    before = names(tmp_path)
    if "model" in changes:
        changes = {"model": Toy()}
        with torch.no_grad():
            changes["model"].fc.bias += 1  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=difference) as caught:
        toy_study(**{**options, **changes}).run(tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_folders_with_other_files_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(StoreError, match=r"holds files but no study\.json"):
        toy_study().run(tmp_path)
    with pytest.raises(StoreError, match="is a file; expected a folder"):
        toy_study().run(tmp_path / "thesis.tex")
    assert names(tmp_path) == {"thesis.tex"}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    study = toy_study(metrics=["cka"], block=1)
    first = study.run(tmp_path).table
    part = tmp_path / "parts" / "toy--act1--2.parquet"
    part.write_bytes(part.read_bytes()[:100])
    steps: list[Any] = []
    with pytest.warns(UserWarning, match=r"toy--act1--2\.parquet can't be read.*measured again$"):
        again = study.run(tmp_path, steps.append).table
    assert done_counts(steps) == [6]
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    text = json.loads((tmp_path / "study.json").read_text())
    text["configuration"]["models"]["toy"]["ridge"] = 7
    (tmp_path / "study.json").write_text(json.dumps(text))
    with pytest.raises(StoreError, match=r"study\.json is damaged"):
        study.run(tmp_path)
    with pytest.raises(StoreError, match=r"has no study\.json"):
        load_run(tmp_path / "parts")


def test_units_never_share_a_file(store: Store) -> None:
    units = [
        Unit("a", "b", 1),
        Unit("a", "b", 11),
        Unit("a", "b--1", 1),
        Unit("a--b", "1", 1),
        Unit("a", "b/1", 1),
        Unit("a", "b%2F1", 1),
        Unit("a-", "-b", 1),
        Unit("a--", "b", 1),
        Unit("a", "--b", 1),
        Unit("a", "../b", 1),
        Unit("a", "é", 1),
    ]
    assert len({store.part_path(unit) for unit in units}) == len(units)
    assert {store.part_path(unit).parent for unit in units} == {store.folder / "parts"}


def test_a_file_is_synced_before_it_is_renamed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, calls = store.units[0], []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(old: Path, new: Path) -> None:
        assert pq.read_table(old).num_rows == 4  # the file is complete
        calls.append(("replace", Path(old)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    store.save(unit, make_rows(unit))
    temporary = calls[0][1]
    assert temporary != store.part_path(unit)
    assert calls == [
        ("fsync", temporary),
        ("replace", temporary),
        ("fsync", store.part_path(unit).parent),
    ]


def test_a_part_records_its_origin(tmp_path: Path) -> None:
    store = open_run([toy_study(metrics=["cka"], block=2)], tmp_path)
    toy_study(metrics=["cka"], block=2).run(tmp_path)
    part = pq.read_table(tmp_path / "parts" / "toy--act2--2.parquet")
    facts = json.loads(part.schema.metadata[b"repsim_kernels"])
    configured = json.loads((tmp_path / "study.json").read_text())["configuration"]
    assert facts["hash"] == digest(configured) == store.hash
    assert facts["unit"] == ["toy", "act2", 2]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(facts["versions"]) >= {"python", "repsim-kernels", "numpy"}
    assert (facts["device"], facts["memory_budget"]) == ("CPU", store.study["memory"]["toy"])
    assert facts["seconds"] > 0
    assert facts == store.read_facts(Unit("toy", "act2", 2))
    assert set(part["class"].to_pylist()) == {"wasp"}
    assert load_run(tmp_path)[1]["seconds"] == sum(
        (store.read_facts(unit) or {})["seconds"] for unit in store.units
    )


def test_a_part_of_another_run_or_unit_is_refused_and_kept(store: Store, tmp_path: Path) -> None:
    first, second = store.units[:2]
    other = Store.create(tmp_path / "other", make_configuration(versions={"torch": "2.12"}))
    other.save(first, make_rows(first))
    store.save(second, make_rows(second))
    path = store.part_path(first)
    for source, message in (
        (
            other.part_path(first),
            f"belongs to a run with configuration {other.hash}; expected only .* {store.hash}: ",
        ),
        (store.part_path(second), f"holds unit {second}; expected {first}: move"),
    ):
        path.write_bytes(source.read_bytes())
        for read in (
            store.read_finished,
            store.unfinished,
            store.compact,
            lambda: store.read_facts(first),
        ):
            with pytest.raises(StoreError, match=message) as caught:
                read()
            assert str(caught.value).startswith(f"out: {path} ")
            assert "\n" not in str(caught.value)
            assert not isinstance(caught.value, DamagedError)
        assert path.read_bytes() == source.read_bytes()
    make_rows(first).to_parquet(path, index=False)
    with pytest.raises(
        StoreError, match=f"belongs to no run; expected only .* configuration {store.hash}"
    ):
        store.unfinished()


def test_a_flipped_byte_is_detected(store: Store) -> None:
    unit = store.units[0]
    store.save(unit, make_rows(unit), seconds=1.5)
    path = store.part_path(unit)
    good = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(5)  # of floats
    middle = (column.dictionary_page_offset or column.data_page_offset) + 40
    assert good.count(make_rows(unit)["cka"].dropna().iloc[0].tobytes(), 0, middle + 8) == 1
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    outcomes: dict[str, list[int]] = {"damaged": [], "foreign": [], "unchanged": []}
    for position in (middle, *range(footer, len(good), 9)):  # the footer has no checksum
        path.write_bytes(
            good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :]
        )
        kind = "unchanged"
        try:
            rows = store.read_finished([unit])
        except (UserWarning, StoreError) as error:
            kind, message = "foreign" if isinstance(error, StoreError) else "damaged", str(error)
        if kind == "damaged":
            assert message.startswith(f"out: {path} can't be read (")
            assert message.endswith(f"); {unit} will be measured again")
        elif kind == "foreign":
            assert message.endswith(": move the file away")
        else:
            pd.testing.assert_frame_equal(rows[unit], make_rows(unit), check_exact=True)
        outcomes[kind].append(position)
    assert outcomes["damaged"][0] == middle
    assert all(outcomes.values()), {kind: len(positions) for kind, positions in outcomes.items()}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "Error writing bytes"), "No space left on device"),
        (PermissionError(errno.EACCES, "no"), "Permission denied"),
        (OSError("a line\nand another"), "a line"),
    ],
)
def test_a_full_disk_gives_a_one_line_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    unit = store.units[0]
    before = names(store.folder)

    def fail(_table: Any, where: Path, **_: Any) -> None:
        where.write_bytes(b"PAR1 half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", fail)
        with pytest.raises(StoreError) as caught:
            store.save(unit, make_rows(unit))
    assert str(caught.value) == f"out: {store.part_path(unit)} can't be written ({reason})"
    assert names(store.folder) == before
    assert store.unfinished() == store.units
    store.save(unit, make_rows(unit))
    assert store.unfinished() == store.units[1:]


def test_recording_a_failure_on_a_full_disk_gives_a_one_line_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(StoreError, match=r"failed/.* can't be written \(No space left on dev"):
            store.record_failure(store.units[0], "no")
    assert store.failures() == {}


def test_a_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    configured = make_configuration()
    del configured["models"]["net"]["block"]
    text = {"hash": digest(configured), "configuration": configured}
    (tmp_path / "study.json").write_text(json.dumps(text))
    with pytest.raises(
        StoreError, match=r"was written by an earlier version, .* classes of net into bl"
    ):
        Store(tmp_path)


def test_the_table_is_readable_despite_a_damaged_part(store: Store) -> None:
    for unit in store.units:
        store.save(unit, make_rows(unit), seconds=1.0)
    table = store.compact()
    store.part_path(store.units[0]).write_bytes(b"PAR1")
    stored, study = load_run(store.folder)
    pd.testing.assert_frame_equal(stored, table, check_exact=True)
    assert study["seconds"] == len(store.units) - 1


def test_a_permission_error_is_not_reported_as_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = store.units[0]
    store.save(unit, make_rows(unit))

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("read_metadata", "read_table"):
        with monkeypatch.context() as patch:
            patch.setattr(pq, name, deny)
            patch.setattr(pd, "read_parquet", deny)
            with pytest.raises(PermissionError):
                store.read_finished()
    assert store.unfinished() == store.units[1:]


def test_a_failure_is_deleted_once_its_unit_is_finished(store: Store) -> None:
    first, second = store.units[:2]
    for unit in (first, second):
        store.record_failure(unit, f"no {unit}", details="Traceback …")
    assert store.failures() == {first: f"no {first}", second: f"no {second}"}
    store.save(first, make_rows(first))
    assert store.failures() == {second: f"no {second}"}
    assert [name for name in names(store.folder) if name.startswith("failed")] == [
        "failed/net--a%2D%2Db--2.json"
    ]
    # A unit whose part is damaged, and which then fails, counts as failed.
    store.part_path(first).write_bytes(b"")
    store.record_failure(first, "again")
    assert store.failures() == {first: "again", second: f"no {second}"}


def test_temporary_files_of_dead_processes_are_deleted(store: Store) -> None:
    store.save(store.units[0], make_rows(store.units[0]))
    store.record_failure(store.units[1], "no")
    before = names(store.folder)
    for path in [store.part_path(unit) for unit in store.units]:
        path.with_name(f".{path.name}.elsewhere-7.tmp").write_text("PAR1")
    store.remove_temporary_files(store.units[1:])
    own_part = store.part_path(store.units[0])
    assert names(store.folder) == before | {f"parts/.{own_part.name}.elsewhere-7.tmp"}
    store.remove_temporary_files(store.units)
    assert names(store.folder) == before


def test_processes_that_create_a_folder_simultaneously_agree(tmp_path: Path) -> None:
    context = get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    folders = [tmp_path / str(attempt) for attempt in range(8)]
    workers = [
        context.Process(target=create_stores, args=(folders, memory, start, results))
        for memory in range(3)
    ]
    for worker in workers:
        worker.start()
    studies = [results.get(timeout=100) for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    # They also agree on the memory budget, which can change the last bits of the results.
    assert studies == [[Store(folder).study for folder in folders]] * 3
    assert all(names(folder) == {"study.json"} for folder in folders)


def test_resuming_does_not_rewrite_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy_study(metrics=["cka"], block=1).run(tmp_path, stop_after(2))
    path = tmp_path / "study.json"
    os.utime(path, (1, 1))
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    toy_study(metrics=["cka"], block=1).run(tmp_path)
    open_run([toy_study(metrics=["cka"], block=1)], tmp_path, {"images": "other"})
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
