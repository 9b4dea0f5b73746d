"""How a run ends: with its table, or with a line and an exit code that say what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from _toy import Toy, image_folder
from torch import Tensor
from typer.testing import CliRunner

from repsim_kernels.experiments import __main__ as cli
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
    image_folder(tmp_path / "images")


def sweep(*options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["sweep", *TOY, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def damaging(which: Callable[[Unit], bool]) -> Any:
    """`Store.save`, on a disk that loses some units' bytes."""
    put = Store.save

    def damaged(store: Store, unit: Unit, rows: pd.DataFrame, **facts: Any) -> None:
        put(store, unit, rows, **facts)
        if which(unit):
            store.part_path(unit).write_bytes(b"PAR1")

    return damaged


def failing(which: Callable[[str, int], bool]) -> Any:
    target = measure._target

    def measured(study: Any, layer: str, label: int, *arguments: Any) -> pd.DataFrame:
        if which(layer, label):
            raise StudyError("it is not finite")
        return target(study, layer, label, *arguments)

    return measured


@pytest.mark.parametrize(
    ("options", "every"),
    [((), True), ((), False), (("--quiet",), True), (("--shard", "1/2"), False)],
)
def test_a_unit_that_can_not_be_read_again_is_missing(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], every: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", damaging(lambda unit: every or unit.block == 3))
        code, out, err = sweep(*options)
    sharded = "--shard" in options
    lost = (3 if sharded else 6) if every else (1 if sharded else 2)
    first = f"_toy:Toy act1 {1 if every else 3}"
    assert code == 3
    *warned, last = err.splitlines()
    assert last.startswith(f"no table: {lost} of 6 units are missing though they were measured")
    assert f"such as {first};" in last
    assert len(warned) == lost
    assert all("can't be read" in line for line in warned)
    assert not TABLE.exists()
    assert "report.html" not in out
    assert sweep("--quiet")[:2] == (0, "")
    assert len(pd.read_parquet(TABLE)) == 6 * 16


def test_a_shard_ends_well_and_says_what_is_left() -> None:
    for shard, done in (("9/9", 0), ("2/3", 2), ("1/3", 4)):
        code, out, err = sweep("--shard", shard)
        assert (code, err) == (0, "")
        last = out.splitlines()[-1]
        assert last.startswith(f"{done} of the run's 6 units are finished; the last shard to end")
        assert not TABLE.exists()
    code, out, err = sweep("--plan")
    assert (code, err) == (0, "")
    assert "Plan, _toy:Toy: " in out
    assert not TABLE.exists()
    code, out, err = sweep("--shard", "3/3", "--log-json")
    assert (code, err) == (0, "")
    TABLE.unlink()
    code, out, err = sweep("--shard", "3/3")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [str(TABLE), str(Path("run", "report.html"))]


def test_the_last_shard_says_what_the_others_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_target", failing(lambda _layer, label: label == 0))
    code, _, err = sweep("--shard", "1/2")  # classes 1 and 3 of act1, 2 of act2
    assert code == 3
    assert "1 unit failed and is left out" in err
    assert not TABLE.exists()
    code, _, err = sweep("--shard", "2/2")
    assert code == 3
    assert "1 unit failed and is left out" in err
    assert pd.read_parquet(TABLE).attrs["missing"] == "2 of 6"
    for quiet in ((), ("--quiet",)):
        code, _, err = sweep("--shard", "9/9", *quiet)  # has no unit of its own
        assert (code, err) == (3, "2 of 6 units are missing from the table\n")


def test_where_all_failed_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_target", failing(lambda *_: True))
    for options, own in (((), 6), (("--shard", "9/9"), 0)):
        code, _, err = sweep(*options)
        assert code == 3
        assert err.splitlines()[-1] == "no table: all 6 units failed"
        assert err.count("failed: _toy:Toy") == own
        assert not TABLE.exists()


class Exiting(Toy):
    """Ends the program where it is shown many images: when the study is made it runs with few."""

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(images, Tensor) and len(images) > 2:
            sys.exit(0)
        return super().forward(images)


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_a_network_that_ends_the_program_does_not_end_it_well(options: tuple[str, ...]) -> None:
    code, _, err = sweep("--model", f"{__name__}:Exiting", *options)
    assert code == 2
    assert err.splitlines()[-1] == "error: something in the network called sys.exit(0)"
    assert not TABLE.exists()


def test_a_reader_that_stops_reading_ends_a_command_without_a_line() -> None:
    """As `repsim status | head -1` does; rich raises SystemExit where it can't write."""
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
