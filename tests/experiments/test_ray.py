"""A Ray cluster of this machine, as a user starts it."""

from __future__ import annotations

import os
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
from _sweep import SMALL, TOY, Sweep, alive, command, descendants, parts, table, until
from _toy import write_image_folder

from repsim_kernels.experiments.errors import ExecutorError
from repsim_kernels.experiments.runs.executors import Task
from repsim_kernels.experiments.runs.executors.cluster import RayExecutor

RAY = ("--executor", "ray", "--workers", "2")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home and a folder for temporary files that are this test's alone."""
    pytest.importorskip("ray")
    (tmp_path / "home").mkdir()
    short = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets' paths are to be short
    yield {"HOME": str(tmp_path / "home"), "TMPDIR": short}
    shutil.rmtree(short)


def workers(sweep: Sweep) -> list[int]:
    """Processes that run a task; Ray names them after its function."""
    return [pid for pid in descendants(sweep.process.pid) if "ray::_work" in command(pid)]


def assert_nothing_is_left(pids: list[int], place: dict[str, str]) -> None:
    until(lambda: not any(map(alive, pids)), 20)
    everybody = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    until(lambda: not any(place["TMPDIR"] in command(pid) for pid in everybody), 20)
    assert not Path(place["HOME"], ".ray").exists()
    assert [name for name in os.listdir(place["TMPDIR"]) if name.startswith("ray")] == []


@pytest.mark.slow
def test_a_worker_that_is_killed_in_mid_unit(tmp_path: Path, place: dict[str, str]) -> None:
    one = Sweep(tmp_path, *SMALL, *RAY, "--out", "ray", **place)
    until(lambda: len(parts(tmp_path / "ray")) >= 3)
    until(lambda: workers(one))
    everything = descendants(one.process.pid)
    assert any("raylet" in command(pid) for pid in everything)
    os.kill(workers(one)[0], signal.SIGKILL)
    code, out, err = one.end()
    assert (code, err) == (0, "")
    assert "again: alexnet_small " in out
    assert "died: its process was ended, or its machine was lost" in out
    assert "raylet" not in out  # Ray's own page about it
    assert_nothing_is_left(everything, place)
    assert Sweep(tmp_path, *SMALL, "--out", "whole", "--quiet").end()[0] == 0
    pd.testing.assert_frame_equal(
        table(tmp_path / "ray"), table(tmp_path / "whole"), check_exact=True
    )


@pytest.mark.slow
def test_a_signal_ends_the_cluster_too(tmp_path: Path, place: dict[str, str]) -> None:
    one = Sweep(tmp_path, *SMALL, *RAY, "--out", "run", **place)
    until(lambda: len(parts(tmp_path / "run")) >= 1)
    everything = descendants(one.process.pid)
    code, _, err = one.kill(signal.SIGTERM)
    kept = len(parts(tmp_path / "run"))
    assert code == 143
    assert f"interrupted: {kept} of 49 units are finished and kept in run; the same" in err
    assert err.count("\n") == 1
    assert_nothing_is_left(everything, place)


@pytest.mark.slow
def test_what_the_cluster_can_not_do_is_said_in_a_line(
    tmp_path: Path, place: dict[str, str]
) -> None:
    write_image_folder(tmp_path / "images")
    many = Sweep(tmp_path, *TOY, *RAY[:2], "--workers", "99", "--out", "run", **place)
    until(lambda: any("raylet" in command(pid) for pid in descendants(many.process.pid)))
    everything = descendants(many.process.pid)
    code, _, err = many.end()
    assert code == 2
    assert err.startswith("error: workers: 99 of 1 core each for a cluster of 1 machine with ")
    assert err.count("\n") == 1
    assert_nothing_is_left(everything, place)

    one = Sweep(tmp_path, *TOY, *RAY, "--out", "run", **place)
    until(lambda: any("raylet" in command(pid) for pid in descendants(one.process.pid)))
    (tmp_path / "images" / "bee" / "2.png").unlink()  # the workers' studies are not made yet
    everything = descendants(one.process.pid)
    code, _, err = one.end()
    assert (code, err.count("\n")) == (2, 1)
    assert "error: studies: those made anew for " in err
    assert_nothing_is_left(everything, place)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_said_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ExecutorError, match=r"^address: nothing answers at .*; expected a Ray cl"):
        RayExecutor(Task(lambda _device: [], "nowhere"), address=address)


def test_without_ray_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match=r"^executor: ray is not installed; expected `pip"):
        RayExecutor(Task(lambda _device: [], "nowhere"))


def test_it_is_said_once_that_the_cluster_lets_workers_wait() -> None:
    executor = RayExecutor.__new__(RayExecutor)  # without a cluster
    vars(executor).update(workers=2, _each="1 core", _warn_at=time.monotonic())
    call: Future[Any] = Future()
    with pytest.warns(UserWarning, match=r"^waiting for the cluster: 1 of 2 workers are not up"):
        assert executor.wait([call], starting=1) == set()
    threading.Timer(0.1, call.set_result, [None]).start()
    assert executor.wait([call], starting=1) == {call}
