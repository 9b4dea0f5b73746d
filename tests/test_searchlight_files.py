"""Searchlights that are written to a file: interruptions lose nothing, and progress is shown."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import repsim_kernels as rk
from repsim_kernels import _progress
from repsim_kernels._row_file import RowFile
from repsim_kernels.kernels.torch import searchlight as kernel

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 40), dtype=np.float32)
SPHERES = [np.sort(RNG.permutation(40)[: 3 + i % 4]) for i in range(50)]
MODELS = RNG.random((2, 15))
MEMORY = 600  # a few spheres together
RESULTS = {"rdms": {}, "one model": {"compare_to": MODELS[0]}, "models": {"compare_to": MODELS}}
EACH_RESULT = pytest.mark.parametrize("options", RESULTS.values(), ids=RESULTS)


def run(out, **options):
    return rk.searchlight(X, SPHERES, out=out, memory=MEMORY, **options)


@pytest.fixture
def calls(monkeypatch):
    """Count the groups of spheres that are computed, and raise at those whose number is a key."""
    compute = kernel._find_neurons
    count = {"n": 0}

    def find_neurons(*arguments):
        count["n"] += 1
        if error := count.get(count["n"]):
            raise error
        return compute(*arguments)

    monkeypatch.setattr(kernel, "_find_neurons", find_neurons)
    return count


@EACH_RESULT
def test_a_file_holds_the_result(tmp_path, options):
    out = tmp_path / "rdms.npy"
    out.write_text("old")
    got = run(out, **options)
    assert isinstance(got, np.memmap)
    np.testing.assert_array_equal(got, rk.searchlight(X, SPHERES, memory=MEMORY, **options))
    np.testing.assert_array_equal(np.load(out), got)
    assert list(tmp_path.iterdir()) == [out]
    assert run(str(out), **options).shape == got.shape


@EACH_RESULT
@pytest.mark.parametrize("torn_bytes", [0, 5, 20])
def test_an_interrupted_call_resumes(tmp_path, calls, options, torn_bytes):
    want = rk.searchlight(X, SPHERES, memory=MEMORY, **options)
    n_groups, calls["n"] = calls["n"], 0
    assert n_groups > 5
    calls[4] = KeyboardInterrupt()
    out = tmp_path / "rdms.npy"
    with pytest.raises(KeyboardInterrupt):
        run(out, **options)
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("rdms.npy.")
    assert partial.suffix == ".partial"
    written = partial.read_bytes()
    if torn_bytes:  # of a group that was being written, fewer than it has
        partial.write_bytes(written + b"\xff" * torn_bytes)
    calls["n"] = 10
    got = run(out, **options)
    assert calls["n"] == 10 + n_groups - 3
    np.testing.assert_array_equal(got, want)
    assert out.read_bytes().startswith(written)
    assert list(tmp_path.iterdir()) == [out]


def test_a_call_that_was_stopped_before_its_first_row_starts_again(tmp_path, calls):
    out = tmp_path / "rdms.npy"
    calls[1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(out)
    (partial,) = tmp_path.iterdir()
    for content in (b"", partial.read_bytes()[:20]):
        partial.write_bytes(content)
        np.testing.assert_array_equal(run(out), rk.searchlight(X, SPHERES, memory=MEMORY))


def test_a_complete_file_only_gets_its_name(tmp_path, monkeypatch, calls):
    out = tmp_path / "rdms.npy"
    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "finish", lambda self: None)
        patch.setattr(np, "load", lambda *_, **__: None)
        run(out)
    assert not out.exists()
    calls["n"] = 0
    got = run(out)
    assert calls["n"] == 0
    np.testing.assert_array_equal(got, rk.searchlight(X, SPHERES, memory=MEMORY))


@pytest.mark.parametrize(
    "change",
    [
        {"x": np.nextafter(X, 2)},
        {"x": X.astype(np.float64)},
        {"neighbours": [*SPHERES[:-1], [0]]},
        {"distance": "correlation"},
        {"memory": 2 * MEMORY},
        {"labels": [0, 1, 2, 3, 4, 4]},
        {"compare_to": MODELS},
        {"distance": "mahalanobis", "noise": np.eye(40)},
        {"backend": "reference"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_only_the_same_call_resumes(tmp_path, calls, change):
    out = tmp_path / "rdms.npy"
    calls[4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(out)
    (partial,) = tmp_path.iterdir()
    before = partial.read_bytes()
    arguments = {"x": X, "neighbours": SPHERES, "memory": MEMORY} | change
    want = rk.searchlight(**arguments)
    np.testing.assert_array_equal(rk.searchlight(out=out, **arguments), want)
    assert partial.read_bytes() == before  # what another call has written is kept
    np.testing.assert_array_equal(run(out), rk.searchlight(X, SPHERES, memory=MEMORY))


def test_the_layout_of_x_does_not_matter(tmp_path, calls):
    out = tmp_path / "rdms.npy"
    calls[4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(out)
    calls["n"] = 10
    rk.searchlight(np.asfortranarray(X), SPHERES, out=out, memory=MEMORY)
    resumed = calls["n"] - 10
    calls["n"] = 10
    rk.searchlight(X, SPHERES, out=out, memory=MEMORY)
    assert resumed == calls["n"] - 10 - 3


KILLED = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import test_searchlight_files as test
from repsim_kernels.kernels.torch import searchlight as kernel

compute, count = kernel._find_neurons, 0

def find_neurons(*arguments):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments)

kernel._find_neurons = find_neurons
test.run(sys.argv[2])
"""


def test_a_killed_process_loses_nothing(tmp_path, calls):
    out = tmp_path / "rdms.npy"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (partial,) = tmp_path.iterdir()
    written = partial.read_bytes()
    got = run(out)
    n_resumed, calls["n"] = calls["n"], 0
    np.testing.assert_array_equal(got, rk.searchlight(X, SPHERES, memory=MEMORY))
    assert n_resumed == calls["n"] - 5
    assert out.read_bytes().startswith(written)


def test_two_calls_do_not_write_the_same_file(tmp_path, calls):
    out = tmp_path / "rdms.npy"
    errors = []

    def call_again():
        try:
            run(out)
        except rk.OptionError as error:
            errors.append(str(error))

    class Raised(KeyboardInterrupt):
        """Starts a second call when the first one tests it."""

        def __bool__(self):
            calls.pop(4)
            thread = threading.Thread(target=call_again)
            thread.start()
            thread.join()
            return False

    calls[4] = Raised()
    np.testing.assert_array_equal(run(out), rk.searchlight(X, SPHERES, memory=MEMORY))
    assert len(errors) == 1
    assert errors[0].startswith("out: another call is writing")


def test_one_model_is_not_the_same_call_as_an_array_with_one(tmp_path, calls):
    out = tmp_path / "rdms.npy"
    calls[4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(out, compare_to=MODELS[0])
    assert run(out, compare_to=MODELS[:1]).shape == (50, 1)


def test_a_file_that_is_too_long_is_written_again(tmp_path):
    for extra in (b"", b"more than the rows"):
        partial = tmp_path / "rows.npy.0.partial"
        with RowFile(tmp_path / "rows.npy", "0", (4, 2), "<f4", 2) as rows:
            assert rows.count == 0
            rows.append(np.ones((4, 2), "<f4"))
        partial.write_bytes(partial.read_bytes() + extra)
        with RowFile(tmp_path / "rows.npy", "0", (4, 2), "<f4", 2) as rows:
            assert rows.count == (0 if extra else 4)
        partial.unlink()


def test_a_file_that_another_call_finishes_before_it_is_locked_starts_again(tmp_path, monkeypatch):
    options = tmp_path / "rows.npy", "0", (4, 2), "<f4", 2
    lock = RowFile._lock

    def finish_first(self):
        monkeypatch.setattr(RowFile, "_lock", lock)
        with RowFile(*options) as rows:
            rows.append(np.ones((4, 2), "<f4"))
            rows.finish()
        lock(self)

    monkeypatch.setattr(RowFile, "_lock", finish_first)
    with RowFile(*options) as rows:
        assert rows.count == 0
        rows.append(np.zeros((4, 2), "<f4"))
        rows.finish()
    assert not np.load(tmp_path / "rows.npy").any()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_appears_on_a_terminal_if_work_is_long(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    rk.searchlight(X, SPHERES[:2])
    assert terminal.getvalue() == ""
    monkeypatch.setattr(_progress, "_DELAY", 0)
    monkeypatch.setattr(_progress, "_INTERVAL", 0)
    rk.searchlight(X, SPHERES, memory=MEMORY)
    *lines, end = terminal.getvalue().split("\r")[1:]
    assert end == ""  # the line is removed
    assert lines[-1].strip() == ""
    assert "of 50 spheres, 0:00 left" in lines[0]
    assert lines[-2].startswith("50 of 50 spheres")


def test_progress_can_be_switched_on_and_off(monkeypatch, capsys):
    monkeypatch.setattr(_progress, "_DELAY", 0)
    rk.searchlight(X, SPHERES, memory=MEMORY)
    assert capsys.readouterr().err == ""  # not a terminal
    rk.searchlight(X, SPHERES, memory=MEMORY, progress=True)
    assert "of 50 spheres" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    rk.searchlight(X, SPHERES, memory=MEMORY, progress=False)
    assert sys.stderr.getvalue() == ""


def test_progress_counts_what_was_done_before():
    """The time that is left is that of the rows that are still missing."""
    stderr = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(_progress.time, "monotonic", iter([0.0, 30.0]).__next__)
        with _progress.show_progress("spheres", 1000, 900, None) as report:
            report(950)
    assert "950 of 1,000 spheres, 0:30 left" in stderr.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations_are_written_like_clocks(seconds, text):
    assert _progress.format_clock(seconds) == text
