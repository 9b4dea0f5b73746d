"""Runs on a local Ray cluster, started as a user starts them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from _sweep import (
    SMALL,
    TOY,
    Sweep,
    is_alive,
    list_descendants,
    list_parts,
    read_command_line,
    read_results,
    wait_until,
)
from _toy import write_image_folder

from repsim_kernels.experiments.errors import ExecutorError
from repsim_kernels.experiments.runs.executors import Task
from repsim_kernels.experiments.runs.executors.cluster import RayExecutor

RAY = ("--executor", "ray", "--workers", "2")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home and a temporary folder for this test only."""
    pytest.importorskip("ray")
    (tmp_path / "home").mkdir()
    short = tempfile.mkdtemp(prefix="r", dir="/tmp")  # paths of sockets must be short
    yield {"HOME": str(tmp_path / "home"), "TMPDIR": short}
    shutil.rmtree(short)


def workers(sweep: Sweep) -> list[int]:
    """Processes that run a task; Ray names them after the task's function."""
    return [
        pid
        for pid in list_descendants(sweep.process.pid)
        if "ray::_measure_unit" in read_command_line(pid)
    ]


def drop_warning(err: str) -> str:
    """``err`` without the warning of a slow machine, on which workers take long to start."""
    return re.sub(r"^warning: waiting for the cluster: .*\n", "", err, flags=re.MULTILINE)


def assert_no_processes_or_files_remain(pids: list[int], place: dict[str, str]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), 20)
    pids_now = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    wait_until(lambda: not any(place["TMPDIR"] in read_command_line(pid) for pid in pids_now), 20)
    assert not Path(place["HOME"], ".ray").exists()
    assert [name for name in os.listdir(place["TMPDIR"]) if name.startswith("ray")] == []


@pytest.mark.slow
def test_a_worker_killed_during_a_unit_is_replaced(tmp_path: Path, place: dict[str, str]) -> None:
    one = Sweep(tmp_path, *SMALL, *RAY, "--out", "ray", **place)
    wait_until(lambda: len(list_parts(tmp_path / "ray")) >= 3)
    wait_until(lambda: workers(one))
    started_pids = list_descendants(one.process.pid)
    assert any("raylet" in read_command_line(pid) for pid in started_pids)
    os.kill(workers(one)[0], signal.SIGKILL)
    code, out, err = one.end()
    assert (code, drop_warning(err)) == (0, "")
    assert "retrying: alexnet_small " in out
    assert "died: its process was killed or its machine was lost" in out
    assert "raylet" not in out  # Ray's own messages about the death
    assert_no_processes_or_files_remain(started_pids, place)
    assert Sweep(tmp_path, *SMALL, "--out", "whole", "--quiet").end()[0] == 0
    pd.testing.assert_frame_equal(
        read_results(tmp_path / "ray"), read_results(tmp_path / "whole"), check_exact=True
    )


@pytest.mark.slow
def test_a_signal_also_ends_the_cluster(tmp_path: Path, place: dict[str, str]) -> None:
    one = Sweep(tmp_path, *SMALL, *RAY, "--out", "run", **place)
    wait_until(lambda: len(list_parts(tmp_path / "run")) >= 1)
    started_pids = list_descendants(one.process.pid)
    code, _, err = one.kill(signal.SIGTERM)
    stored = len(list_parts(tmp_path / "run"))
    assert code == 143
    assert f"interrupted: {stored} of 49 units are finished and stored in run; run" in err
    assert drop_warning(err).count("\n") == 1
    assert_no_processes_or_files_remain(started_pids, place)


@pytest.mark.slow
def test_errors_of_the_cluster_are_one_line(tmp_path: Path, place: dict[str, str]) -> None:
    write_image_folder(tmp_path / "images")
    many = Sweep(tmp_path, *TOY, *RAY[:2], "--workers", "99", "--out", "run", **place)
    wait_until(
        lambda: any(
            "raylet" in read_command_line(pid) for pid in list_descendants(many.process.pid)
        )
    )
    started_pids = list_descendants(many.process.pid)
    code, _, err = many.end()
    assert code == 2
    assert err.startswith("error: workers: 99 with 1 core each, but the cluster of 1 machine with ")
    assert err.count("\n") == 1
    assert_no_processes_or_files_remain(started_pids, place)

    one = Sweep(tmp_path, *TOY, *RAY, "--out", "run", **place)
    wait_until(
        lambda: any("raylet" in read_command_line(pid) for pid in list_descendants(one.process.pid))
    )
    (tmp_path / "images" / "bee" / "2.png").unlink()  # before the workers make their studies
    started_pids = list_descendants(one.process.pid)
    code, _, err = one.end()
    assert (code, drop_warning(err).count("\n")) == (2, 1)
    assert "error: studies: those made by a worker differ " in err
    assert_no_processes_or_files_remain(started_pids, place)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_listens_is_refused_immediately(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ExecutorError, match=r"^address: nothing answers at .*; expected a Ray cl"):
        RayExecutor(Task(lambda _device: [], "nowhere"), address=address)


def test_a_missing_ray_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ExecutorError, match=r"^executor: ray is not installed; .* run: pip install"
    ):
        RayExecutor(Task(lambda _device: [], "nowhere"))


def make_waiting_executor() -> RayExecutor:
    """Make an executor without a cluster, for which a warning is due."""
    executor = RayExecutor.__new__(RayExecutor)
    vars(executor).update(workers=2, _needs="1 core", _warn_at=time.monotonic(), _has_warned=False)
    return executor


def test_a_warning_about_waiting_workers_is_given_once() -> None:
    executor = make_waiting_executor()
    call: Future[Any] = Future()
    with pytest.warns(
        UserWarning, match=r"^waiting for the cluster: 1 of 2 workers have not started"
    ):
        assert executor.wait([call], starting=1) == set()
    threading.Timer(0.1, call.set_result, [None]).start()
    assert executor.wait([call], starting=1) == {call}


def test_a_replaced_worker_has_its_own_time_to_start() -> None:
    executor = make_waiting_executor()
    done: Future[Any] = Future()
    done.set_result(None)
    assert executor.wait([done], starting=0) == {done}
    call: Future[Any] = Future()
    threading.Timer(0.1, call.set_result, [None]).start()
    assert executor.wait([call], starting=1) == {call}  # warnings are errors
