"""The status that is read from a run's folder, during a run and afterwards."""

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
from repsim_kernels.experiments.runs.status import read_status
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


def make_store(folder: Path, *models: str, layers: int = 3, classes: int = 2) -> Store:
    """A run of the given models, each with ``layers`` x ``classes`` units."""
    names = [f"layer{number}" for number in range(layers)]
    study = {"layers": names, "classes": ["ant", "bee", "wasp"][:classes], "block": 1}
    return Store.create(folder, {"models": dict.fromkeys(models, study)})


def printed_lines(folder: Path | str, width: int = 80) -> list[str]:
    file = io.StringIO()
    print_status(Console(file=file, width=width), read_status(folder))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def hold_in_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold the lock of a folder until they are killed."""
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
    store = make_store(tmp_path, *names, layers=draw.randint(1, 4), classes=draw.randint(1, 3))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, int] = dict.fromkeys(names, 0)
    for unit in store.units:
        chance = draw.random() if unit.model == "a" else draw.random() * 2
        if chance < 0.4:
            seconds[unit.model].append(draw.uniform(0.1, 5000))
            store.save(unit, ROWS, seconds=seconds[unit.model][-1])
            when = draw.uniform(0, 4e9)  # as if a clock were wrong
            os.utime(store.part_path(unit), (when, when))
        elif chance < 0.6:
            failed[unit.model] += 1
            store.record_failure(unit, "no luck")
    units_per_model = len(store.units) // len(names)
    all_seconds = [each for own in seconds.values() for each in own]
    work, remaining = 0.0, 0
    for name in names:
        own = seconds[name] or all_seconds
        rest = units_per_model - len(seconds[name]) - failed[name]
        remaining += rest
        work += rest * sum(own) / len(own) if own else 0.0
    workers = draw.randint(1, 8)
    for current, by in ((read_status(tmp_path), 1), (None, workers)):
        if current is None:
            with hold_lock(tmp_path, Shard(), workers):
                current = read_status(tmp_path)
            assert current.workers == workers
        assert (current.done, current.remaining) == (len(all_seconds), remaining)
        models = [(s.model, s.total, s.done, s.failed, s.remaining) for s in current.models]
        assert models == [
            (
                n,
                units_per_model,
                len(seconds[n]),
                failed[n],
                units_per_model - len(seconds[n]) - failed[n],
            )
            for n in names
        ]
        if all_seconds:
            assert current.seconds_left == pytest.approx(work / by)
            rate = 60 * remaining * by / work if remaining else None
            assert current.per_minute == (rate and pytest.approx(rate))
        else:
            assert (current.seconds_left, current.per_minute) == (None, None)


def test_the_status_of_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [toy_study(block=1, metrics=["cka"], name=name) for name in ("one", "two")]
    store = open_run(studies, tmp_path)
    assert printed_lines(tmp_path)[-2:] == [
        "Not running now; run the original command again to resume.",
        "Rate and remaining time are unknown until a unit is finished.",
    ]
    with pytest.raises(KeyboardInterrupt):
        run(studies, store, stop_after(4))
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pd, "read_parquet", None)  # no rows are read
        current = read_status(tmp_path)
        lines = printed_lines(tmp_path)
    assert contents(tmp_path) == before
    assert (current.total, current.done, current.remaining, current.failed) == (12, 4, 8, {})
    assert [(model.model, model.done) for model in current.models] == [("one", 4), ("two", 0)]
    seconds = [
        json.loads(parquet.read_metadata(path).metadata[b"repsim_kernels"])["seconds"]
        for path in (tmp_path / "parts").iterdir()
    ]
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert current.seconds_left == pytest.approx(8 * sum(seconds) / 4)
    assert [line.split() for line in lines if re.match(r" (one|two) ", line)] == [
        ["one", "6", "4", "2", "0"],
        ["two", "6", "0", "6", "0"],
    ]
    assert "left with 1 worker" in lines[-1]


def test_running_processes_are_listed_until_they_die(
    tmp_path: Path, hold_in_process: Callable[..., subprocess.Popen[str]]
) -> None:
    store = make_store(tmp_path, "toy")
    for unit in store.units[:2]:
        store.save(unit, ROWS, seconds=300.0)
    alone = hold_in_process(tmp_path, 1, 1, 2)
    lines = printed_lines(tmp_path)
    assert f"Running: process {alone.pid} on {os.uname().nodename}, 2 workers" in lines
    # Four units of 300 s with two workers.
    assert (
        lines[-1] == "About 10 min left with 2 workers (150 s/unit), estimated from finished units"
    )
    alone.send_signal(signal.SIGKILL)
    alone.wait()
    assert read_status(tmp_path).drivers == ()
    assert printed_lines(tmp_path)[-2:] == [
        "Not running now; run the original command again to resume.",
        "About 20 min left with 1 worker (300 s/unit), estimated from finished units",
    ]
    first, second = hold_in_process(tmp_path, 1, 3, 7), hold_in_process(tmp_path, 3, 3, 1)
    current = read_status(tmp_path)
    assert [(d.pid, d.shard, d.workers) for d in current.drivers] == [
        (first.pid, "1/3", 7),
        (second.pid, "3/3", 1),
    ]
    assert current.seconds_left == 4 * 300 / 8
    assert [line for line in printed_lines(tmp_path) if line.startswith("Running")] == [
        f"Running: process {first.pid} on {os.uname().nodename}, 7 workers, shard 1/3",
        f"Running: process {second.pid} on {os.uname().nodename}, 1 worker, shard 3/3",
    ]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [driver.pid for driver in read_status(tmp_path).drivers] == [second.pid]


def test_failed_units_are_listed_with_their_errors(tmp_path: Path) -> None:
    store = make_store(tmp_path, "toy", layers=4)
    store.save(store.units[0], ROWS, seconds=1.0)
    for number, unit in enumerate(store.units[1:]):
        store.record_failure(unit, f"[red] reason {number}")
    current, lines = read_status(tmp_path), printed_lines(tmp_path)
    assert current.failed[Unit("toy", "layer0", 2)] == "[red] reason 0"
    assert (current.done, current.remaining, len(current.failed)) == (1, 0, 7)
    failures = [line for line in lines if line.startswith("failed: toy")]
    assert (
        failures
        == [f"failed: {unit}: [red] reason {i}" for i, unit in enumerate(current.failed)][:5]
    )
    assert "failed: 2 more; see" in " ".join(lines)
    assert "to resume and to retry failed units" in " ".join(lines)
    assert "All but the failed units are done" in " ".join(lines)
    store.save(store.units[1], ROWS, seconds=1.0)
    assert store.units[1] not in read_status(tmp_path).failed


def test_a_unit_with_a_damaged_part_counts_as_remaining(tmp_path: Path) -> None:
    store = make_store(tmp_path, "toy")
    for unit in store.units:
        store.save(unit, ROWS, seconds=60.0)
    path = store.part_path(store.units[3])
    path.write_bytes(path.read_bytes()[:50])
    store.part_path(store.units[4]).write_bytes(b"")
    current = read_status(tmp_path)
    assert list(current.damaged) == store.units[3:5]
    assert (current.done, current.remaining, current.seconds_left) == (4, 2, 120.0)
    text = " ".join(printed_lines(tmp_path))
    assert f"damaged: toy layer1 2 will be measured again: out: {path} can't be read" in text
    assert "All" not in text


def test_parts_of_other_runs_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "ours", "toy")
    other = make_store(tmp_path / "theirs", "toy", layers=2)
    other.save(other.units[0], ROWS, seconds=1.0)
    store.save(store.units[1], ROWS, seconds=1.0)
    other.part_path(other.units[0]).rename(store.part_path(store.units[0]))
    with pytest.raises(StoreError, match=f"belongs to a run with configuration {other.hash}"):
        read_status(tmp_path / "ours")
    with pytest.raises(StoreError, match=r"has no study\.json"):
        read_status(tmp_path)


def test_the_status_of_a_finished_run_names_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(Path("runs/toy"), "toy")
    for unit in store.units[:2]:
        store.save(unit, ROWS, seconds=1.0)
    store.compact()
    assert read_status("runs/toy").table == 2
    assert "results.parquet" not in "".join(printed_lines("runs/toy"))  # the run is not finished
    for unit in store.units[2:]:
        store.save(unit, ROWS, seconds=1.0)
    compact = "repsim compact runs/toy"
    has_only = "All units are done, but runs/toy/results.parquet has only 2 of them; run:"
    assert printed_lines("runs/toy")[-2:] == [has_only, compact]
    (store.folder / "results.parquet").unlink()
    missing = "All units are done, but runs/toy/results.parquet is missing; run:"
    assert printed_lines("runs/toy")[-2:] == [missing, compact]
    with hold_lock(store.folder, Shard(), 1):
        assert compact not in printed_lines("runs/toy")  # the running process does this
    store.compact()
    assert read_status("runs/toy").table == 6
    assert printed_lines("runs/toy")[-1] == "All units are done: runs/toy/results.parquet"
    (store.folder / "results.parquet").write_bytes(b"PAR1")
    assert printed_lines("runs/toy")[-2:] == [missing, compact]


def test_a_unit_may_finish_while_its_failure_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, "toy")
    for unit in store.units[:2]:
        store.record_failure(unit, "no luck")
    read, racing = Path.read_text, [store.units[0]]

    def read_after_finishing(path: Path, *args: Any, **options: Any) -> str:
        if path.parent.name == "failed" and racing:
            store.save(racing.pop(), ROWS, seconds=1.0)  # deletes the failure
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_after_finishing)
    current = read_status(tmp_path)
    assert current.failed == {store.units[1]: "no luck"}
    assert (current.done, current.remaining) == (0, 5)  # as of a moment ago
    assert read_status(tmp_path).done == 1


def test_the_status_can_be_read_during_a_run(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", "b", layers=8, classes=3)

    def write() -> None:
        for unit in store.units:
            store.record_failure(unit, "at first")
            store.save(unit, ROWS, seconds=2.0)
        store.compact()

    writer = Thread(target=write)
    writer.start()
    counts = []
    while writer.is_alive():
        current = read_status(tmp_path)
        assert current.done + current.remaining + len(current.failed) == 48
        assert len(current.failed) <= 1
        assert not current.damaged
        counts.append(current.done)
    writer.join()
    assert counts == sorted(counts)
    assert (read_status(tmp_path).done, read_status(tmp_path).table) == (48, 48)


@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_longer_than_its_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(Path("runs/demo"), "a_network_of_a_long_name_" * 2, "b", layers=12)
    for unit in store.units[:5]:
        store.save(unit, ROWS, seconds=12345.6)
    for unit in store.units[5:]:
        store.record_failure(unit, "RuntimeError: a long explanation of the failure, " * 4)
    with hold_lock(store.folder, Shard(99, 100), 128):
        lines = printed_lines("runs/demo", width)
    assert max(map(len, lines)) <= width
    joined = "".join(lines).replace(" ", "")
    assert str(store.units[5]).replace(" ", "") in joined
    assert "…" not in joined
