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
    """Start a process that works in the folder until its input ends."""
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


def refused(folder: Path, shard: Shard) -> str:
    with pytest.raises(StoreError) as caught, hold_lock(folder, shard, 1):
        pass
    return str(caught.value)


def test_a_folder_is_one_runs_until_its_process_is_gone(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    other = hold(workers=3)
    (driver,) = list_drivers(tmp_path)
    assert (driver.pid, driver.workers, driver.shard) == (other.pid, 3, "1/1")
    for shard in (Shard(), Shard(1, 2)):
        said = refused(tmp_path, shard)
        assert said == (
            f"out: process {other.pid} on {driver.host} works in {tmp_path}; "
            "expected one run at a time, or shards of one"
        )
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert list_drivers(tmp_path) == []
    with hold_lock(tmp_path, Shard(), 1):
        assert [driver.pid for driver in list_drivers(tmp_path)] == [os.getpid()]
    assert list_drivers(tmp_path) == []


def test_shards_work_side_by_side(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    first = hold("1/2", 2)
    with hold_lock(tmp_path, Shard(2, 2), 1):
        found = {driver.shard: driver for driver in list_drivers(tmp_path)}
        assert {shard: driver.pid for shard, driver in found.items()} == {
            "1/2": first.pid,
            "2/2": os.getpid(),
        }
        assert f"process {first.pid} on " in refused(tmp_path, Shard(1, 2))
        assert ", shard 1/2, works in" in refused(tmp_path, Shard(1, 2))
        assert ", shard " in refused(tmp_path, Shard())
        # Its units would be some of theirs.
        assert refused(tmp_path, Shard(2, 3)).endswith(
            f", shard 1/2, works in {tmp_path}; expected shards of 3 beside 2/3"
        )
    assert [driver.shard for driver in list_drivers(tmp_path)] == ["1/2"]


def test_who_only_looks_keeps_nobody_out(tmp_path: Path) -> None:
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            list_drivers(tmp_path)

    with hold_lock(tmp_path, Shard(), 1):
        pass
    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        taken = 0
        for _ in range(30):
            with hold_lock(tmp_path, Shard(), 1):
                taken += 1
    finally:
        over.set()
        for looker in lookers:
            looker.join()
    assert taken == 30


def test_a_lock_that_is_being_signed_is_nobodys_yet(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert list_drivers(tmp_path) == []
        assert "another process works in" in refused(tmp_path, Shard())
        file.write('{"half')
        file.flush()
        assert list_drivers(tmp_path) == []


def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match=r"\.lock can't be locked here \(No locks available\)"),
        hold_lock(tmp_path, Shard(), 2),
    ):
        assert (tmp_path / ".lock").read_text().startswith("{")


def test_a_driver_as_it_is_said() -> None:
    assert str(Driver("cluster-1", 17, 4, "1/1")) == "process 17 on cluster-1"
