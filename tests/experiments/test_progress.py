"""The progress display of a run, with clocks that the tests control."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from repsim_kernels.experiments.cli import progress
from repsim_kernels.experiments.cli.progress import format_rate, show_progress
from repsim_kernels.experiments.runs.driver import RunProgress, execute
from repsim_kernels.experiments.runs.executors import Event
from repsim_kernels.experiments.runs.store import Store
from repsim_kernels.experiments.study.units import Unit

GIB = 2**30
ERASED = "\x1b[1A\x1b[2K"  # one line up, and clear it


class Clocks:
    """Replaces the module `time` with a monotonic clock and a wall clock that may jump."""

    def __init__(self) -> None:
        self.now, self.wall = 1000.0, 1_800_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    stand_in = Clocks()
    monkeypatch.setattr(progress, "time", stand_in)
    monkeypatch.setenv("TERM", "xterm")
    return stand_in


class File(io.StringIO):
    """A file that records what would be on disk if its process were killed."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


class Run:
    """Makes the consecutive steps of a run."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.failed, self.total = done, 0, total

    def start(self, unit: Unit) -> RunProgress:
        return self._step(Event("started", unit, "worker 1"))

    def end(self, unit: Unit, seconds: float, memory: int = 0) -> RunProgress:
        self.done += 1
        return self._step(Event("done", unit, "worker 1", seconds, memory))

    def fail(self, unit: Unit, error: str, recorded: bool) -> RunProgress:
        self.failed += recorded
        return self._step(Event("failed", unit, "worker 1", 0.5, error=error))

    def _step(self, event: Event) -> RunProgress:
        return RunProgress(event, self.done, self.failed, self.total)


def unit(number: int) -> Unit:
    return Unit("resnet50", f"layer{number}.0", 1)


def frames(text: str) -> list[str]:
    """The lines drawn in a terminal, without colours and cursor movements."""
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    return [line for line in lines if line]


def parse_strictly(line: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


@given(
    gaps=st.lists(st.floats(0, 1e5), min_size=1, max_size=12),
    before=st.integers(0, 1000),
    after=st.integers(0, 1000),
    jumps=st.lists(st.floats(-1e8, 1e8), min_size=12, max_size=12),
)
def test_rate_and_remaining_time_use_this_run_and_the_monotonic_clock(
    gaps: list[float], before: int, after: int, jumps: list[float]
) -> None:
    outputs = []
    for moves in (jumps, [0.0] * 12):
        file, clocks = io.StringIO(), Clocks()
        run = Run(before, before + len(gaps) + after)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(progress, "time", clocks)
            with show_progress(Console(file=file), log_json=True) as show:
                for i, (gap, move) in enumerate(zip(gaps, moves, strict=False)):
                    show(run.start(unit(i)))
                    clocks.now += gap
                    clocks.wall += move
                    show(run.end(unit(i), gap))
        outputs.append([parse_strictly(line) for line in file.getvalue().splitlines()])
    jumped, steady = outputs
    assert [{**line, "time": 0} for line in jumped] == [{**line, "time": 0} for line in steady]
    first, *others = jumped
    assert (first["units_per_minute"], first["seconds_left"]) == (None, None)
    ended = [line for line in others if line["event"] == "done"]
    assert len(ended) == len(gaps)
    for count, line in enumerate(ended, 1):
        elapsed = sum(gaps[:count])
        remaining = len(gaps) - count + after
        assert (line["done"], line["left"]) == (before + count, remaining)
        if elapsed > 1e-6:  # for less, adding to the clock's 1000 s rounds
            assert line["units_per_minute"] == pytest.approx(60 * count / elapsed, rel=1e-4)
            assert line["seconds_left"] == pytest.approx(remaining * elapsed / count, rel=1e-4)


def test_json_lines_are_flushed_for_every_event(clocks: Clocks) -> None:
    file, run = File(), Run(2, 5)
    with show_progress(Console(file=file), quiet=True, log_json=True) as show:
        show(run.start(unit(3)))
        clocks.now += 4
        clocks.wall -= 86400
        show(run.end(unit(3), 3.5, 3 * GIB))
        assert file.flushed == file.getvalue()
        show(run.fail(unit(4), "no \x1b memory: 'é\"", recorded=False))
        show(run.fail(unit(4), "none yet", recorded=True))
    lines = [parse_strictly(line) for line in file.getvalue().splitlines()]
    assert {tuple(line) for line in lines} == {tuple(lines[1])}  # whose keys are below
    assert [line["event"] for line in lines] == ["started", "done", "retry", "failed"]
    assert lines[0]["time"] == "2027-01-15T08:00:00.000+00:00"
    assert [lines[0][key] for key in ("seconds", "memory_bytes", "error")] == [None] * 3
    assert {**lines[1], "time": ""} == {
        "event": "done",
        "time": "",
        "model": "resnet50",
        "layer": "layer3.0",
        "block": 1,
        "worker": "worker 1",
        "seconds": 3.5,
        "memory_bytes": 3 * GIB,
        "error": None,
        "done": 3,
        "failed": 0,
        "left": 2,
        "total": 5,
        "units_per_minute": 15.0,
        "seconds_left": 8.0,
    }
    assert lines[1]["time"] == "2027-01-14T08:00:00.000+00:00"
    assert (lines[2]["error"], lines[2]["left"]) == ("no \x1b memory: 'é\"", 2)
    assert (lines[3]["failed"], lines[3]["left"], lines[3]["seconds_left"]) == (1, 1, 4.0)


def test_a_log_has_a_line_per_unit(clocks: Clocks) -> None:
    file, run = File(), Run(10, 155)
    with show_progress(Console(file=file, width=20)) as show:
        for number in (1, 2):
            show(run.start(unit(number)))
            assert file.flushed.endswith("started\n") == (number == 1)
            clocks.now += 45
            show(run.end(unit(number), 44.9, int(1.94 * GIB)))
            assert file.flushed == file.getvalue()
        clocks.now += 300
        show(run.fail(unit(3), "RuntimeError: out of memory", recorded=False))
        show(run.fail(unit(3), "RuntimeError: again", recorded=True))
        clocks.now += 210
        show(run.end(unit(4), 600))
    assert file.getvalue().splitlines() == [
        "10/155 resnet50 layer1.0 1 started",
        "11/155 resnet50 layer1.0 1 done in 44.9 s, 1.3 units/min, 1.8 h left, 1.9 GiB",
        "12/155 resnet50 layer2.0 1 done in 44.9 s, 1.3 units/min, 1.8 h left, 1.9 GiB",
        "retrying: resnet50 layer3.0 1: RuntimeError: out of memory",
        "failed: resnet50 layer3.0 1: RuntimeError: again",
        "13/155 resnet50 layer4.0 1 done in 10 min, 200 s/unit, 7.8 h left",
    ]


def test_the_rate_is_known_without_start_events(clocks: Clocks) -> None:
    file = io.StringIO()
    with show_progress(Console(file=file)) as show:
        show(Run(0, 3).end(unit(1), 4))
    assert file.getvalue() == ("1/3 resnet50 layer1.0 1 done in 4.0 s, 15 units/min, 8.0 s left\n")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_log_of_short_units_has_one_line_per_second_and_the_last(
    clocks: Clocks, stopped: bool
) -> None:
    file, run = io.StringIO(), Run(0, 1000)
    with suppress(KeyboardInterrupt), show_progress(Console(file=file)) as show:
        for number in range(1000):
            show(run.start(unit(number)))
            clocks.now += 0.0625
            show(run.end(unit(number), 0.0625))
            if number == 500:
                show(run.fail(unit(2000), "no luck", recorded=False))
            if stopped and run.done == 777:
                raise KeyboardInterrupt
    lines = file.getvalue().splitlines()
    end = 777 if stopped else 1000
    counts = [line.split("/")[0] for line in lines]
    seconds = [str(count) for count in range(16, end, 16)]
    at = [int(count) for count in seconds].index(512)
    failures = ["retrying: resnet50 layer2000.0 1: no luck"]
    assert counts == ["0", *seconds[:at], failures[0], *seconds[at:], str(end)]
    assert "960 units/min" in lines[-1]


def test_quiet_prints_failed_units_on_stderr(
    clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(0, 3)
    with show_progress(Console(force_terminal=True), quiet=True) as show:
        show(run.start(unit(1)))
        show(run.end(unit(1), 1))
        show(run.fail(unit(2), "once", recorded=False))
        show(run.fail(unit(2), "twice", recorded=True))
    assert capsys.readouterr() == ("", "failed: resnet50 layer2.0 1: twice\n")


def test_a_terminal_shows_one_line_below_the_failures(clocks: Clocks) -> None:
    file, run = io.StringIO(), Run(10, 155)
    with show_progress(Console(file=file, force_terminal=True, width=100)) as show:
        show(run.start(unit(1)))
        clocks.now += 30
        show(run.end(unit(1), 30, 2 * GIB))
        show(run.start(unit(2)))
        show(run.fail(unit(2), "no [bold] luck", recorded=False))
        show(run.start(unit(3)))
        show(run.start(unit(4)))
        show(run.end(unit(4), 1, GIB))
        show(run.fail(unit(4), "at all", recorded=True))
        show(run.start(unit(5)))
    assert not file.getvalue().endswith(ERASED)
    *_, last = drawn = [line.rstrip() for line in frames(file.getvalue())]
    assert "retrying: resnet50 layer2.0 1: no [bold] luck" in drawn
    assert "failed: resnet50 layer4.0 1: at all" in drawn
    assert " 12/155 " in last
    # Two units in 30 s; 155 - 12 - 1 remain; the memory is the larger of the two.
    end = "1 failed, 4.0/min, 36 min left, 2.0 GiB, layer5.0 1 +1, resnet50"
    assert last.endswith(end)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("seconds", [0.0, 1e-9, 100.0, 1e5])
def test_no_line_is_longer_than_its_terminal(clocks: Clocks, width: int, seconds: float) -> None:
    run, file = Run(9990, 99999), io.StringIO()
    with show_progress(Console(file=file, force_terminal=True, width=width)) as show:
        for number in range(20):
            one = Unit("mobilenet_v2", "features.17.conv." * (number % 4), number)
            show(run.start(one))
            clocks.now += seconds
            show(run.end(one, 1, number * 9 * GIB))
            show(run.fail(one, "a long error message, " * 9, recorded=number % 2 == 0))
            show(run.start(one))
    drawn = frames(file.getvalue())
    assert max(map(len, drawn)) <= width
    assert " 10010/99999 " in drawn[-1]


def test_the_bar_of_a_run_without_steps_is_erased(clocks: Clocks) -> None:
    file = io.StringIO()
    with show_progress(Console(file=file, force_terminal=True, width=80)):
        pass
    assert file.getvalue().endswith(ERASED)
    assert all(line.rstrip().endswith("starting") for line in frames(file.getvalue()))


def test_a_dumb_terminal_gets_plain_lines(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file, run = io.StringIO(), Run(0, 2)
    with show_progress(Console(file=file, force_terminal=True, width=80)) as show:
        show(run.start(unit(1)))
    assert file.getvalue() == "0/2 resnet50 layer1.0 1 started\n"


def test_warnings_still_go_to_stderr_if_it_is_a_file(
    clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.StringIO()
    with show_progress(Console(file=file, force_terminal=True, width=80)):
        print("warning: warm", file=sys.stderr)
        print("above the line")
    assert capsys.readouterr().err == "warning: warm\n"
    assert "above the line" in frames(file.getvalue())


def test_retries_are_logged_before_a_failure(tmp_path: Path, clocks: Clocks) -> None:
    study = {"layers": ["act1", "act2", "act3"], "classes": ["ant"], "block": 1}
    store = Store.create(tmp_path, {"models": {"toy": study}})

    class FailingExecutor:
        workers = 1

        def run(self, units: deque[Unit]) -> Iterator[Event]:
            while units:
                unit = units.popleft()
                yield Event("started", unit, "one")
                if unit.layer == "act1":
                    store.save(unit, pd.DataFrame({"cell": [1]}))
                    yield Event("done", unit, "one", 1.0)
                else:
                    retryable = unit.layer == "act2"
                    yield Event("failed", unit, "one", 1.0, error="bad luck", retryable=retryable)

        def close(self) -> None:
            pass

    file = io.StringIO()
    with show_progress(Console(file=file), log_json=True) as show:
        execute(store, FailingExecutor(), progress=show)
    lines = [parse_strictly(line) for line in file.getvalue().splitlines()]
    ends = [(line["layer"], line["event"]) for line in lines if line["event"] != "started"]
    assert ends == [
        ("act1", "done"),
        ("act2", "retry"),
        ("act3", "failed"),
        ("act2", "retry"),
        ("act2", "failed"),
    ]
    assert [lines[-1][key] for key in ("done", "failed", "left", "total")] == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("per_minute", "text"),
    [
        (1234.4, "1234 units/min"),
        (18.4, "18 units/min"),
        (3.44, "3.4 units/min"),
        (1.0, "1.0 units/min"),
        (0.8, "75 s/unit"),
        (0.01, "6000 s/unit"),
    ],
)
def test_format_rate(per_minute: float, text: str) -> None:
    assert format_rate(per_minute) == text
