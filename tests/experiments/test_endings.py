"""How a run ends: with a table, or with an exit code and a line about missing units."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from _toy import Toy, write_image_folder
from torch import Tensor
from typer.testing import CliRunner

from repsim_kernels.experiments.cli import app as cli
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study import measure
from repsim_kernels.experiments.study.units import Unit

TOY = ["--model", "_toy:Toy", "--layers", "act1,act2", "--size", "8", "--metrics", "cka"]
TOY += ["--block", "1", "--images", "images", "--out", "run"]  # six units
TABLE = Path("run", "results.parquet")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_reports: None) -> None:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images")


def sweep(*options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["sweep", *TOY, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def save_with_damage(which: Callable[[Unit], bool]) -> Any:
    """`Store.save` on a disk that corrupts the parts of some units."""
    save = Store.save

    def save_damaged(store: Store, unit: Unit, rows: pd.DataFrame, **facts: Any) -> None:
        save(store, unit, rows, **facts)
        if which(unit):
            store.part_path(unit).write_bytes(b"PAR1")

    return save_damaged


def fail_on(which: Callable[[str, int], bool]) -> Any:
    target = measure._measure_target

    def measure_or_fail(study: Any, layer: str, label: int, *arguments: Any) -> pd.DataFrame:
        if which(layer, label):
            raise StudyError("it is not finite")
        return target(study, layer, label, *arguments)

    return measure_or_fail


@pytest.mark.parametrize(
    ("options", "every"),
    [((), True), ((), False), (("--quiet",), True), (("--shard", "1/2"), False)],
)
def test_a_unit_that_cannot_be_read_back_is_missing(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], every: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", save_with_damage(lambda unit: every or unit.block == 3))
        code, out, err = sweep(*options)
    sharded = "--shard" in options
    lost = (3 if sharded else 6) if every else (1 if sharded else 2)
    first = f"_toy:Toy act1 {1 if every else 3}"
    assert code == 3
    *warning_lines, last = err.splitlines()
    assert last.startswith(f"no table: {lost} of 6 units are missing although they were measured")
    assert f"the first is {first};" in last
    assert len(warning_lines) == lost
    assert all("can't be read" in line for line in warning_lines)
    assert not TABLE.exists()
    assert "report.html" not in out
    assert sweep("--quiet")[:2] == (0, "")
    assert len(pd.read_parquet(TABLE)) == 6 * 16


def test_a_shard_succeeds_and_reports_the_progress_of_the_run() -> None:
    for shard, done in (("9/9", 0), ("2/3", 2), ("1/3", 4)):
        code, out, err = sweep("--shard", shard)
        assert (code, err) == (0, "")
        last = out.splitlines()[-1]
        assert last.startswith(f"{done} of the run's 6 units are finished; the last shard writes")
        assert not TABLE.exists()
    code, out, err = sweep("--plan")
    assert (code, err) == (0, "")
    assert "Plan for _toy:Toy: " in out
    assert not TABLE.exists()
    code, out, err = sweep("--shard", "3/3", "--log-json")
    assert (code, err) == (0, "")
    TABLE.unlink()
    code, out, err = sweep("--shard", "3/3")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [str(TABLE), str(Path("run", "report.html"))]


def test_the_last_shard_reports_units_missing_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_measure_target", fail_on(lambda _layer, label: label == 0))
    code, _, err = sweep("--shard", "1/2")  # classes 1 and 3 of act1, 2 of act2
    assert code == 3
    assert "1 unit failed and is left out" in err
    assert not TABLE.exists()
    code, _, err = sweep("--shard", "2/2")
    assert code == 3
    assert "1 unit failed and is left out" in err
    assert pd.read_parquet(TABLE).attrs["missing"] == "2 of 6"
    for quiet in ((), ("--quiet",)):
        code, _, err = sweep("--shard", "9/9", *quiet)  # a shard without units
        assert (code, err) == (3, "2 of 6 units are missing from the table\n")


def test_a_run_whose_units_all_failed_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_measure_target", fail_on(lambda *_: True))
    for options, own in (((), 6), (("--shard", "9/9"), 0)):
        code, _, err = sweep(*options)
        assert code == 3
        assert err.splitlines()[-1] == "no table: all 6 units failed"
        assert err.count("failed: _toy:Toy") == own
        assert not TABLE.exists()


class Exiting(Toy):
    """Ends the program when it gets more than two images, as in a run but not in its checks."""

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(images, Tensor) and len(images) > 2:
            sys.exit(0)
        return super().forward(images)


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_a_network_that_calls_sys_exit_ends_the_run_with_an_error(options: tuple[str, ...]) -> None:
    code, _, err = sweep("--model", f"{__name__}:Exiting", *options)
    assert code == 2
    assert err.splitlines()[-1] == "error: the network's code called sys.exit(0)"
    assert not TABLE.exists()


def test_a_closed_pipe_ends_a_command_silently() -> None:
    """As in `repsim status | head -1`; rich raises SystemExit when it can't write."""
    script = (
        "import sys\n"
        "from rich.console import Console\n"
        "from repsim_kernels.experiments.cli.options import exit_on_errors\n"
        "with exit_on_errors():\n"
        "    for _ in range(10_000):\n"
        "        Console().print('x' * 70)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, error = process.communicate()
    assert (process.returncode, error) == (1, b"")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_is_not_lost_in_a_callback(name: str, code: int) -> None:
    script = f"""
import os, signal, time, typer, weakref
from repsim_kernels.experiments.cli.signals import exit_on_signals

class Owner:
    pass

def wait():
    with exit_on_signals():
        owner = Owner()
        reference = weakref.ref(owner, lambda _: (os.kill(os.getpid(), signal.{name}), None))
        del owner
        time.sleep(60)

typer.run(wait)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], timeout=120, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (code, "interrupted: before any unit was started\n")
