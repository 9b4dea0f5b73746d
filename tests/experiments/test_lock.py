"""Locks on a run's folder, held by other processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repsim_kernels.experiments.errors import StoreError
from repsim_kernels.experiments.runs.lock import Driver, hold_lock, list_drivers
from repsim_kernels.experiments.runs.shard import Shard

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from repsim_kernels.experiments.runs.lock import hold_lock
from repsim_kernels.experiments.runs.shard import parse_shard
with hold_lock(Path(sys.argv[1]), parse_shard(sys.argv[2]), int(sys.argv[3])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that holds the folder's lock until its input ends."""
    started = []

    def start(shard: str = "1/1", workers: int = 1) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), shard, str(workers)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def refusal_of(folder: Path, shard: Shard) -> str:
    with pytest.raises(StoreError) as caught, hold_lock(folder, shard, 1):
        pass
    return str(caught.value)


def test_a_run_locks_its_folder_until_its_process_ends(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    other = hold(workers=3)
    (driver,) = list_drivers(tmp_path)
    assert (driver.pid, driver.workers, driver.shard) == (other.pid, 3, "1/1")
    for shard in (Shard(), Shard(1, 2)):
        assert refusal_of(tmp_path, shard) == (
            f"out: process {other.pid} on {driver.host} is running in {tmp_path}; "
            "expected no other run in the folder, or only other shards of the same run"
        )
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert list_drivers(tmp_path) == []
    with hold_lock(tmp_path, Shard(), 1):
        assert [driver.pid for driver in list_drivers(tmp_path)] == [os.getpid()]
    assert list_drivers(tmp_path) == []


def test_shards_run_side_by_side(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    first = hold("1/2", 2)
    with hold_lock(tmp_path, Shard(2, 2), 1):
        assert {driver.shard: driver.pid for driver in list_drivers(tmp_path)} == {
            "1/2": first.pid,
            "2/2": os.getpid(),
        }
        assert f"process {first.pid} on " in refusal_of(tmp_path, Shard(1, 2))
        assert " is running shard 1/2 in " in refusal_of(tmp_path, Shard(1, 2))
        assert " is running shard " in refusal_of(tmp_path, Shard())
        # Its units would overlap with theirs.
        assert refusal_of(tmp_path, Shard(2, 3)).endswith(
            f" is running shard 1/2 in {tmp_path}; expected only shards of 3 alongside 2/3"
        )
    assert [driver.shard for driver in list_drivers(tmp_path)] == ["1/2"]


def test_listing_drivers_does_not_block_a_run(tmp_path: Path) -> None:
    stopped = threading.Event()

    def list_repeatedly() -> None:
        while not stopped.is_set():
            list_drivers(tmp_path)

    with hold_lock(tmp_path, Shard(), 1):
        pass
    threads = [threading.Thread(target=list_repeatedly) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        locked = 0
        for _ in range(30):
            with hold_lock(tmp_path, Shard(), 1):
                locked += 1
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert locked == 30


def test_a_lock_whose_holder_is_not_written_yet_lists_no_driver(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert list_drivers(tmp_path) == []
        assert "another process is running in" in refusal_of(tmp_path, Shard())
        file.write('{"half')
        file.flush()
        assert list_drivers(tmp_path) == []


def test_a_file_system_without_locks_causes_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        pytest.warns(UserWarning, match=r"\.lock can't be locked \(No locks available\)"),
        hold_lock(tmp_path, Shard(), 2),
    ):
        assert (tmp_path / ".lock").read_text().startswith("{")


def test_a_driver_is_printed_as_process_and_host() -> None:
    assert str(Driver("cluster-1", 17, 4, "1/1")) == "process 17 on cluster-1"
