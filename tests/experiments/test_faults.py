"""Runs in their own processes that meet signals, full disks, damaged files and missing files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from _sweep import SMALL, TOY, Sweep, is_alive, list_parts, read_results, wait_until
from _toy import write_image_folder

from repsim_kernels.experiments.runs.lock import hold_lock
from repsim_kernels.experiments.runs.shard import Shard


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    started: list[Sweep] = []

    def start(*options: str | Path) -> Sweep:
        started.append(Sweep(tmp_path, *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert Sweep(folder, *SMALL, "--out", "run", "--quiet").end()[0] == 0
    return read_results(folder / "run")


def test_a_run_stopped_by_a_signal_is_resumed(tmp_path: Path, sweep: Callable[..., Sweep]) -> None:
    run, options = tmp_path / "run", (*SMALL, "--layers", "features.4,features.7", "--out", "run")
    first = sweep(*options)
    wait_until(lambda: len(list_parts(run)) >= 1)
    code, _, err = first.kill(signal.SIGTERM)
    stored = list_parts(run)
    assert code == 143
    assert err == (
        f"interrupted: {len(stored)} of 14 units are finished and stored in run; "
        "run the same command to resume\n"
    )
    assert not (run / "results.parquet").exists()
    before = {name: (run / "parts" / name).read_bytes() for name in stored}
    code, _, err = sweep(*options, "--workers", "2").end()
    assert (code, err) == (0, "")
    assert {name: (run / "parts" / name).read_bytes() for name in stored} == before
    assert len(list_parts(run)) == 14
    assert len(read_results(run)) == 14 * 16


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_times_gives_the_same_table(
    tmp_path: Path, sweep: Callable[..., Sweep], whole: pd.DataFrame, seed: int
) -> None:
    rng = random.Random(seed)
    run, kills, runs = tmp_path / "run", 0, 0
    while kills < 10:
        stored = list_parts(run)
        one = sweep(*SMALL, "--out", "run", "--workers", "2")
        runs += 1
        wait_until(
            lambda old=stored, now=one: list_parts(run) > old or now.process.poll() is not None
        )
        for _ in range(2):
            time.sleep(rng.uniform(0, 1.5))
            victims = [one.process.pid] if rng.random() < 0.5 else one.workers()
            if victims and one.process.poll() is None:
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills += 1
        workers = one.workers()
        if one.process.poll() is None:
            one.process.kill()
            kills += 1
        one.end()
        wait_until(lambda pids=workers: not any(map(is_alive, pids)), 10)
        if (run / "results.parquet").exists():  # it finished before the kills: repeat
            shutil.rmtree(run)
        else:
            assert stored <= list_parts(run)
    assert runs >= 4
    code, _, err = sweep(*SMALL, "--out", "run", "--workers", "2").end()
    assert (code, err) == (0, "")
    pd.testing.assert_frame_equal(read_results(run), whole, check_exact=True)
    remaining = {
        path.name for path in run.rglob("*") if path.is_file() and path.parent.name == "parts"
    }
    assert remaining == list_parts(run)


@pytest.mark.slow
def test_a_full_disk_loses_no_finished_unit(tmp_path: Path, sweep: Callable[..., Sweep]) -> None:
    write_image_folder(tmp_path / "images")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        options = (*TOY, "--out", disk / "run")
        for more in ((), ("--workers", "2")):
            code, _, err = sweep(*options, *more).end()
            stored = list_parts(disk / "run")
            assert code == 2
            assert 1 <= len(stored) < 6
            assert err.count("\n") == 1
            assert "can't be written (No space left on device)" in err
            assert f"{len(stored)} of 6 units are finished and stored in {disk / 'run'}" in err
            assert all(not path.name.endswith(".tmp") for path in (disk / "run").rglob("*"))
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert sweep(*options).end()[0] == 0
        assert stored <= list_parts(disk / "run")
        assert sweep(*TOY, "--out", "whole").end()[0] == 0
        pd.testing.assert_frame_equal(
            read_results(disk / "run"), read_results(tmp_path / "whole"), check_exact=True
        )
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_damaged_parts_are_measured_again_and_foreign_parts_refused(
    tmp_path: Path, sweep: Callable[..., Sweep]
) -> None:
    write_image_folder(tmp_path / "images")
    run, options = tmp_path / "run", (*TOY, "--out", "run")
    assert sweep(*options).end()[0] == 0
    whole = read_results(run)
    part = run / "parts" / "_toy%3AToy--act1--2.parquet"
    part.write_bytes(part.read_bytes()[:1000])
    code, out, err = sweep(*options).end()
    assert code == 0
    assert err.count("\n") == 1
    assert f"run/parts/{part.name} can't be read" in err
    assert "_toy:Toy act1 2 will be measured again" in err
    assert "1/6" not in out
    pd.testing.assert_frame_equal(read_results(run), whole, check_exact=True)

    assert sweep(*TOY, "--out", "other", "--ridge", "0.5").end()[0] == 0
    shutil.copy(tmp_path / "other" / "parts" / part.name, part)
    code, _, err = sweep(*options).end()
    theirs, ours = (json.loads((f / "study.json").read_text()) for f in (tmp_path / "other", run))
    assert (code, err.count("\n")) == (2, 1)
    assert f"run/parts/{part.name} belongs to a run with configuration {theirs['hash']}" in err
    assert ours["hash"] in err
    part.unlink()

    with hold_lock(run, Shard(), 1):
        code, _, err = sweep(*options).end()
    assert (code, err.count("\n")) == (2, 1)
    assert f"out: process {os.getpid()} on " in err


@pytest.mark.slow
def test_an_image_that_disappears_during_a_run_ends_it(
    tmp_path: Path, sweep: Callable[..., Sweep]
) -> None:
    write_image_folder(tmp_path / "images")
    run, options = tmp_path / "run", (*TOY, "--out", "run", "--workers", "1")
    assert sweep(*options).end()[0] == 0
    whole = read_results(run)
    shutil.rmtree(run / "parts")
    (run / "results.parquet").unlink()
    image, hidden = tmp_path / "images" / "bee" / "2.png", tmp_path / "2.png"
    one = sweep(*TOY, "--out", "run", "--workers", "2")
    wait_until(lambda: one.workers())
    image.rename(hidden)  # before the workers make their studies
    code, _, err = one.end()
    assert code == 2
    assert err.count("\n") == 1
    assert "those made by a worker differ from the ones in" in err
    assert "expected the same images, network and versions" in err
    hidden.rename(image)
    assert sweep(*options).end()[0] == 0
    pd.testing.assert_frame_equal(read_results(run), whole, check_exact=True)


@pytest.mark.slow
def test_shards_in_any_order_give_the_same_table_as_one_run(
    tmp_path: Path, sweep: Callable[..., Sweep]
) -> None:
    write_image_folder(tmp_path / "images")
    assert sweep(*TOY, "--out", "whole").end()[0] == 0
    both = [sweep(*TOY, "--out", "run", "--shard", f"{i}/3") for i in (3, 1)]
    for one in both:
        code, out, err = one.end()
        assert (code, err) == (0, "")
        assert "2 of 6 units" in out
    assert not (tmp_path / "run" / "results.parquet").exists()
    code, out, _ = sweep(*TOY, "--out", "run", "--shard", "2/3").end()
    assert code == 0
    assert "run/report.html" in out
    pd.testing.assert_frame_equal(
        read_results(tmp_path / "run"), read_results(tmp_path / "whole"), check_exact=True
    )
