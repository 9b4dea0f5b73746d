"""What a run's folder says of it, while it is written and afterwards."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import pyarrow.parquet as parquet
import pytest
from _toy import stop_after, toy_study
from rich.console import Console

from repsim_kernels.experiments.cli.tables import print_status
from repsim_kernels.experiments.errors import StoreError
from repsim_kernels.experiments.runs.driver import run
from repsim_kernels.experiments.runs.lock import hold_lock
from repsim_kernels.experiments.runs.membership import open_run
from repsim_kernels.experiments.runs.shard import Shard
from repsim_kernels.experiments.runs.status import status
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study.units import Unit

ROOT = Path(__file__).parents[2]
ROWS = pd.DataFrame({"model": ["a"], "class": ["b"], "layer": ["c"], "cell": [0]})
HOLD = """
import sys
from pathlib import Path
from repsim_kernels.experiments.runs.lock import hold_lock
from repsim_kernels.experiments.runs.shard import Shard
with hold_lock(Path(sys.argv[1]), Shard(int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4])):
    print("held", flush=True)
    sys.stdin.read()
"""


def store_of(folder: Path, *models: str, layers: int = 3, classes: int = 2) -> Store:
    """A run of some models, each of so many layers times classes units."""
    names = [f"layer{number}" for number in range(layers)]
    study = {"layers": names, "classes": ["ant", "bee", "wasp"][:classes], "block": 1}
    return Store.create(folder, {"models": dict.fromkeys(models, study)})


def shown(folder: Path | str, width: int = 80) -> list[str]:
    file = io.StringIO()
    print_status(Console(file=file, width=width), status(folder))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def holding() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that work in a folder until they are killed."""
    started = []

    def hold(folder: Path, index: int, count: int, workers: int) -> subprocess.Popen[str]:
        arguments = map(str, (folder, index, count, workers))
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("seed", range(6))
def test_counts_rate_and_time_left(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    names = ["a", "b", "c"][: draw.randint(1, 3)]
    store = store_of(tmp_path, *names, layers=draw.randint(1, 4), classes=draw.randint(1, 3))
    took: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, int] = dict.fromkeys(names, 0)
    for unit in store.units:
        chance = draw.random() if unit.model == "a" else draw.random() * 2
        if chance < 0.4:
            took[unit.model].append(draw.uniform(0.1, 5000))
            store.save(unit, ROWS, seconds=took[unit.model][-1])
            when = draw.uniform(0, 4e9)  # a clock that was set wrong
            os.utime(store.part_path(unit), (when, when))
        elif chance < 0.6:
            failed[unit.model] += 1
            store.record_failure(unit, "no luck")
    each = len(store.units) // len(names)
    every = [seconds for mine in took.values() for seconds in mine]
    work, left = 0.0, 0
    for name in names:
        mine = took[name] or every
        rest = each - len(took[name]) - failed[name]
        left += rest
        work += rest * sum(mine) / len(mine) if mine else 0.0
    workers = draw.randint(1, 8)
    for found, by in ((status(tmp_path), 1), (None, workers)):
        if found is None:
            with hold_lock(tmp_path, Shard(), workers):
                found = status(tmp_path)
            assert found.workers == workers
        assert (found.done, found.left) == (len(every), left)
        shares = [(s.model, s.total, s.done, s.failed, s.left) for s in found.shares]
        assert shares == [
            (n, each, len(took[n]), failed[n], each - len(took[n]) - failed[n]) for n in names
        ]
        if every:
            assert found.seconds_left == pytest.approx(work / by)
            rate = 60 * left * by / work if left else None
            assert found.per_minute == (rate and pytest.approx(rate))
        else:
            assert (found.seconds_left, found.per_minute) == (None, None)


def test_a_run_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [toy_study(block=1, metrics=["cka"], name=name) for name in ("one", "two")]
    store = open_run(studies, tmp_path)
    assert shown(tmp_path)[-2:] == [
        "Nobody works on it now; the command that began it goes on from here.",
        "Rate and time left are not known until a unit is done.",
    ]
    with pytest.raises(KeyboardInterrupt):
        run(studies, store, stop_after(4))
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pd, "read_parquet", None)  # no rows are read
        found = status(tmp_path)
        lines = shown(tmp_path)
    assert contents(tmp_path) == before
    assert (found.total, found.done, found.left, found.failed) == (12, 4, 8, {})
    assert [(share.model, share.done) for share in found.shares] == [("one", 4), ("two", 0)]
    seconds = [
        json.loads(parquet.read_metadata(path).metadata[b"repsim_kernels"])["seconds"]
        for path in (tmp_path / "parts").iterdir()
    ]
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert found.seconds_left == pytest.approx(8 * sum(seconds) / 4)
    assert [line.split() for line in lines if re.match(r" (one|two) ", line)] == [
        ["one", "6", "4", "2", "0"],
        ["two", "6", "0", "6", "0"],
    ]
    assert "left for one worker" in lines[-1]


def test_who_works_is_seen_until_they_die(
    tmp_path: Path, holding: Callable[..., subprocess.Popen[str]]
) -> None:
    store = store_of(tmp_path, "toy")
    for unit in store.units[:2]:
        store.save(unit, ROWS, seconds=300.0)
    alone = holding(tmp_path, 1, 1, 2)
    lines = shown(tmp_path)
    assert f"At work: process {alone.pid} on {os.uname().nodename}, 2 workers" in lines
    # Four units of 300 s by two workers.
    assert lines[-1] == "10 min left for 2 workers, 150 s/unit, by what finished units took"
    alone.send_signal(signal.SIGKILL)
    alone.wait()
    assert status(tmp_path).drivers == ()
    assert shown(tmp_path)[-2:] == [
        "Nobody works on it now; the command that began it goes on from here.",
        "20 min left for one worker, 300 s/unit, by what finished units took",
    ]
    first, second = holding(tmp_path, 1, 3, 7), holding(tmp_path, 3, 3, 1)
    found = status(tmp_path)
    assert [(d.pid, d.shard, d.workers) for d in found.drivers] == [
        (first.pid, "1/3", 7),
        (second.pid, "3/3", 1),
    ]
    assert found.seconds_left == 4 * 300 / 8
    assert [line for line in shown(tmp_path) if line.startswith("At work")] == [
        f"At work: process {first.pid} on {os.uname().nodename}, 7 workers, shard 1/3",
        f"At work: process {second.pid} on {os.uname().nodename}, 1 worker, shard 3/3",
    ]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [driver.pid for driver in status(tmp_path).drivers] == [second.pid]


def test_failed_units_are_said_with_their_errors(tmp_path: Path) -> None:
    store = store_of(tmp_path, "toy", layers=4)
    store.save(store.units[0], ROWS, seconds=1.0)
    for number, unit in enumerate(store.units[1:]):
        store.record_failure(unit, f"[red] reason {number}")
    found, lines = status(tmp_path), shown(tmp_path)
    assert found.failed[Unit("toy", "layer0", 2)] == "[red] reason 0"
    assert (found.done, found.left, len(found.failed)) == (1, 0, 7)
    told = [line for line in lines if line.startswith("failed: toy")]
    assert told == [f"failed: {unit}: [red] reason {i}" for i, unit in enumerate(found.failed)][:5]
    assert "failed: 2 more, see" in " ".join(lines)
    assert "and tries again what failed" in " ".join(lines)
    assert "All but the failed units are done" in " ".join(lines)
    store.save(store.units[1], ROWS, seconds=1.0)
    assert store.units[1] not in status(tmp_path).failed


def test_a_damaged_part_counts_as_left(tmp_path: Path) -> None:
    store = store_of(tmp_path, "toy")
    for unit in store.units:
        store.save(unit, ROWS, seconds=60.0)
    path = store.part_path(store.units[3])
    path.write_bytes(path.read_bytes()[:50])
    store.part_path(store.units[4]).write_bytes(b"")
    found = status(tmp_path)
    assert list(found.damaged) == store.units[3:5]
    assert (found.done, found.left, found.seconds_left) == (4, 2, 120.0)
    text = " ".join(shown(tmp_path))
    assert f"damaged: toy layer1 2 counts as left: out: {path} can't be read" in text
    assert "All" not in text


def test_parts_of_others_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "ours", "toy")
    other = store_of(tmp_path / "theirs", "toy", layers=2)
    other.save(other.units[0], ROWS, seconds=1.0)
    store.save(store.units[1], ROWS, seconds=1.0)
    other.part_path(other.units[0]).rename(store.part_path(store.units[0]))
    with pytest.raises(StoreError, match=f"is of configuration {other.hash}"):
        status(tmp_path / "ours")
    with pytest.raises(StoreError, match=r"has no study\.json"):
        status(tmp_path)


def test_a_finished_run_says_where_its_table_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_of(Path("runs/toy"), "toy")
    for unit in store.units[:2]:
        store.save(unit, ROWS, seconds=1.0)
    store.compact()
    assert status("runs/toy").table == 2
    assert "results.parquet" not in "".join(shown("runs/toy"))  # there is more to say first
    for unit in store.units[2:]:
        store.save(unit, ROWS, seconds=1.0)
    compact = "repsim compact runs/toy"
    has_only = "All units are done, but runs/toy/results.parquet has only 2 of them:"
    assert shown("runs/toy")[-2:] == [has_only, compact]
    (store.folder / "results.parquet").unlink()
    missing = "All units are done, but runs/toy/results.parquet is missing:"
    assert shown("runs/toy")[-2:] == [missing, compact]
    with hold_lock(store.folder, Shard(), 1):
        assert compact not in shown("runs/toy")  # that is what they are at
    store.compact()
    assert status("runs/toy").table == 6
    assert shown("runs/toy")[-1] == "All units are done: runs/toy/results.parquet"
    (store.folder / "results.parquet").write_bytes(b"PAR1")
    assert shown("runs/toy")[-2:] == [missing, compact]


def test_a_unit_that_is_finished_while_its_failure_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, "toy")
    for unit in store.units[:2]:
        store.record_failure(unit, "no luck")
    read, racing = Path.read_text, [store.units[0]]

    def finished_meanwhile(path: Path, *args: Any, **options: Any) -> str:
        if path.parent.name == "failed" and racing:
            store.save(racing.pop(), ROWS, seconds=1.0)  # deletes the failure
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", finished_meanwhile)
    found = status(tmp_path)
    assert found.failed == {store.units[1]: "no luck"}
    assert (found.done, found.left) == (0, 5)  # as it was a moment ago
    assert status(tmp_path).done == 1


def test_a_folder_that_is_being_written_can_be_looked_at(tmp_path: Path) -> None:
    store = store_of(tmp_path, "a", "b", layers=8, classes=3)

    def write() -> None:
        for unit in store.units:
            store.record_failure(unit, "at first")
            store.save(unit, ROWS, seconds=2.0)
        store.compact()

    writer = Thread(target=write)
    writer.start()
    counts = []
    while writer.is_alive():
        found = status(tmp_path)
        assert found.done + found.left + len(found.failed) == 48
        assert len(found.failed) <= 1
        assert not found.damaged
        counts.append(found.done)
    writer.join()
    assert counts == sorted(counts)
    assert (status(tmp_path).done, status(tmp_path).table) == (48, 48)


@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_longer_than_its_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_of(Path("runs/demo"), "a_network_of_a_long_name_" * 2, "b", layers=12)
    for unit in store.units[:5]:
        store.save(unit, ROWS, seconds=12345.6)
    for unit in store.units[5:]:
        store.record_failure(unit, "RuntimeError: so many words of what was wrong, " * 4)
    with hold_lock(store.folder, Shard(99, 100), 128):
        lines = shown("runs/demo", width)
    assert max(map(len, lines)) <= width
    joined = "".join(lines).replace(" ", "")
    assert str(store.units[5]).replace(" ", "") in joined
    assert "…" not in joined
