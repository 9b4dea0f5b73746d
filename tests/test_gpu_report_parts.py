"""The GPU report's parts but its rows: shares of time, the GPU's tests, sanitizer, verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.common.machine import ROOT
from bench.gpu_report import checks, processes, run, sanitizer_target, study
from bench.gpu_report.report import judge


@pytest.mark.parametrize(
    ("last", "want"),
    [
        ("3 passed, 1 skipped, 90 deselected in 1.20s", {"passed": 3, "skipped": 1}),
        ("= 1 failed, 2 passed, 2 errors in 61.02s (0:01:01) =", {"failed": 1, "error": 2}),
        ("no tests ran in 0.01s", {}),
        ("Killed", {}),
    ],
)
def test_counts_of_pytest(last, want):
    found = checks.count_tests(f"....F\nFAILED test_x.py - assert 3 passed\n{last}\n")
    assert found.items() >= want.items()
    assert bool(found) == bool(want)


def test_gpu_tests_run_beside_files_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert True\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    assert False\n"
    )
    found = checks.run_gpu_tests(120)
    assert found["counts"] == {"failed": 1, "passed": 1, "error": 1}
    assert found["exit_code"] == 1
    assert any("no_such_module" in text for text in found["tail"])


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "SIGINT ignored"])
def test_gpu_tests_that_hang_are_stopped_and_counted(tmp_path, ignored):
    """Also where the report is made in a shell's background, whose jobs ignore SIGINT."""
    (tmp_path / "test_some.py").write_text(
        "import time\n\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert True\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    time.sleep(600)\n"
    )
    code = (
        "import json, pathlib, sys; from bench.gpu_report import checks, processes\n"
        "processes.ROOT = pathlib.Path(sys.argv[1])\n"
        "print(json.dumps(checks.run_gpu_tests(8)))"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGINT, before)
    found = json.loads(done.stdout)
    assert found["why"] == "stopped after 8 s"
    assert found["exit_code"] is None
    assert found["counts"].get("passed") == 1


def test_a_command_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    script = "trap '' INT; echo said; while :; do sleep 1; done"
    ended = processes.run_command(["bash", "-c", script], 0.3)
    assert ended["exit_code"] is None
    assert ended["output"] == "said\n"
    assert ended["why"] == "stopped after 0 s"


@pytest.mark.parametrize(
    ("output", "want"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        (
            "========= ERROR SUMMARY: 384 errors\n========= ERROR SUMMARY: 284 errors were not "
            "printed. Use --print-limit option to adjust the number of printed errors\n",
            384,
        ),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 12 hazards displayed (2 errors, 10 warnings)\n", 12),
        ("========= Error: Device not supported.\n", None),
        ("", None),
    ],
)
def test_the_sanitizers_count(output, want):
    assert checks.count_errors(output) == want


FAKE = """#!/bin/sh
case "$*" in
  *memcheck*) echo "========= ERROR SUMMARY: {memory} errors" ;;
  *racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
esac
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compute-sanitizer that counts what it is told to, over a script that does nothing."""

    def install(memory=0, script="pass", limit=60.0):
        binary = tmp_path / "compute-sanitizer"
        binary.write_text(FAKE.format(memory=memory))
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(checks, "_TARGET", (sys.executable, "-c", script))
        return checks.sanitize(limit)

    return install


def test_the_sanitizer_runs_each_tool(fake):
    found = fake(memory=3)
    assert [tool["tool"] for tool in found["tools"]] == ["alone", "memcheck", "racecheck"]
    assert [tool["exit_code"] for tool in found["tools"]] == [0, 0, 0]
    assert [tool["errors"] for tool in found["tools"]] == [None, 3, 0]
    assert "why" not in found


def test_a_script_that_fails_alone_is_not_sanitized(fake):
    found = fake(script="print('WRONG'); raise SystemExit(1)")
    assert [tool["tool"] for tool in found["tools"]] == ["alone"]
    assert found["tools"][0]["tail"] == ["WRONG"]
    assert "fails even alone" in found["why"]


def test_a_script_that_takes_long_alone_does_not_fail(fake, monkeypatch):
    checked = checks._check
    monkeypatch.setattr(
        checks, "_check", lambda *a: checked(*a[:2], 1.0 if a[0] == "alone" else 60)
    )
    found = fake(script="import time; time.sleep(60)")
    assert [tool["tool"] for tool in found["tools"]] == ["alone", "memcheck", "racecheck"]
    assert found["tools"][0]["why"] == "stopped after 1 s"
    assert [tool["errors"] for tool in found["tools"]] == [None, 0, 0]
    assert "why" not in found


def test_short_of_time_memcheck_is_first_and_has_all_of_it(fake, monkeypatch):
    given, checked = [], checks._check
    monkeypatch.setattr(checks, "_check", lambda *a: given.append(a[::2]) or checked(*a))
    found = fake(memory=3, script="raise SystemExit(1)", limit=29.0)
    assert [tool["tool"] for tool in found["tools"]] == ["memcheck", "racecheck"]
    assert found["tools"][0]["errors"] == 3
    assert given[0] == ("memcheck", 29.0)
    assert 20 < given[1][1] < 29


def test_no_sanitizer_is_said(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: None)
    assert checks.sanitize(60) == {"why": "not there: no compute-sanitizer"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_what_is_sanitized_says_what_is_wrong(monkeypatch, capsys):
    right, wrong = (
        replace(case, kernel=case.reference) for case in sanitizer_target.all_cases()[:2]
    )
    routed = [right, replace(wrong, kernel=lambda x, *_: 2 * wrong.reference(x, *_))]
    monkeypatch.setattr(sanitizer_target, "all_cases", lambda: routed)
    assert sanitizer_target.main("cpu") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"right 0.0e+00 {right.name}")
    assert said[1].startswith(f"WRONG 1.0e+00 {wrong.name}")


RIGHT = [{"name": f"kernel{i}", "shape": "n=3", "status": "ok"} for i in range(3)]
CLEAN = {
    "tools": [
        {"tool": "alone", "exit_code": 0, "errors": None},
        {"tool": "memcheck", "exit_code": 0, "errors": 0},
        {"tool": "racecheck", "exit_code": 0, "errors": 0},
    ]
}


def record(**changes):
    whole = {
        "rows": RIGHT,
        "interpreted": False,
        "tests": {"exit_code": 0, "counts": {"passed": 331, "skipped": 2}},
        "sanitizer": CLEAN,
        "study": {"preset": "hayne2024", "networks": [], "seconds": 41.23},
    }
    return {**whole, **changes}


def row(status, name="gram", **more):
    return {"name": name, "shape": "n=9", "status": status, **more}


def tool(name, errors, exit_code=0, **more):
    found = [t for t in CLEAN["tools"] if t["tool"] != name]
    return {"tools": [*found, {"tool": name, "exit_code": exit_code, "errors": errors, **more}]}


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        (
            {},
            "3 of 3 kernels right; 331 tests passed, 0 failed, 2 skipped; sanitizer clean; "
            "study 41.2 s extrapolated",
        ),
        ({"rows": [*RIGHT, row("WRONG")]}, "3 of 4 kernels right, 1 WRONG (gram n=9); "),
        (
            {"rows": [*RIGHT, row("error"), row("skipped", "cca")]},
            "3 of 5 kernels right, 1 error (gram n=9), 1 skipped (cca n=9); ",
        ),
        ({"rows": RIGHT, "interpreted": True}, "3 of 3 kernels right in Triton's interpreter, on "),
        ({"rows": [row("not run", why="no GPU")] * 2}, "kernels NOT RUN: no GPU; "),
        ({"tests": {"counts": {"passed": 3, "failed": 2, "error": 1}}}, "; 3 tests passed, 2 fail"),
        ({"tests": {"counts": {"failed": 2}, "why": "stopped"}}, "; 0 tests passed, 2 failed, st"),
        ({"tests": {"counts": {}, "why": "stopped after 9 s"}}, "; tests FAILED: stopped after 9"),
        ({"tests": {"counts": {}, "exit_code": 4}}, "; tests FAILED: no counts; "),
        ({"tests": {"why": "not run: quick"}}, "; tests not run: quick; "),
        ({"sanitizer": tool("memcheck", 3)}, "; sanitizer memcheck 3 ERRORS; "),
        ({"sanitizer": tool("racecheck", None, 1)}, "; sanitizer racecheck without a count; "),
        ({"sanitizer": tool("racecheck", 0, 1)}, "; sanitizer racecheck without a count; "),
        ({"sanitizer": tool("memcheck", None, None, why="late")}, "; sanitizer memcheck late; "),
        ({"sanitizer": {"why": "not there"}}, "; sanitizer not there; "),
        ({"sanitizer": None}, "; sanitizer no record; "),
        ({"study": {"preset": None, "seconds": 2.0}}, "; rehearsed study 2 s extrapolated"),
        (
            {"study": {"preset": "x", "seconds": 2.0, "networks": [{"failed": ["a", "b"]}]}},
            "; study 2 s extrapolated, 2 of its stages NOT TIMED",
        ),
        ({"study": {"why": "no torchvision"}}, "; study FAILED (no torchvision)"),
        (
            {"study": {"networks": [{"name": "a", "seconds": 3.0}, {"name": "b"}], "why": "late"}},
            "; study of 1 of 2 networks (a 3 s, late)",
        ),
    ],
)
def test_the_verdict(changes, want):
    said = judge(record(**changes))
    assert want in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--device", "tpu"], "expected cuda or cpu"),
        (["--device", "cpu", "--quick", "--out", "{}/none/report.json"], "there is no folder"),
        (["--device", "cpu", "--quick", "--out", "{}"], "can't be written"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path, monkeypatch, arguments, want):
    monkeypatch.setattr(run.timing, "ceilings", lambda *_: pytest.fail("it has begun"))
    given = [text.format(tmp_path) for text in arguments]
    given += [] if "--out" in given else ["--out", str(tmp_path / "report.json")]
    done = CliRunner().invoke(app, ["gpu-report", *given], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2
    assert want in done.output


def test_no_gpu_or_an_interpreter_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device cpu --quick"):
        run.gpu_report(tmp_path / "report.json", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="would not run on the GPU"):
        run.gpu_report(tmp_path / "report.json", "cuda")


class Clock:
    """A clock that parts move on."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now


@pytest.mark.parametrize("greedy", [True, False])
def test_parts_keep_to_their_shares(tmp_path, monkeypatch, greedy):
    """Each part is given its share, whether the others take all of theirs or nearly nothing."""
    clock, given = Clock(), []

    def part(name, seconds):
        given.append((name, clock.now - 1000, seconds))
        clock.now += seconds if greedy else min(seconds, 1)
        return {"why": "a stand-in"}

    def turn(record, keep, device, quick, make, end, last=True):
        part("rows", end - clock.now)

    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(run.timing, "ceilings", lambda *_: part("ceilings", 20.0))
    monkeypatch.setattr(run, "measure_rows", turn)
    monkeypatch.setattr(run, "run_gpu_tests", lambda limit: part("tests", limit))
    monkeypatch.setattr(run, "sanitize", lambda limit: part("sanitizer", limit))
    monkeypatch.setattr(study, "measure_study", lambda *a: part("study", a[-1] - clock.now))
    monkeypatch.setattr(run, "_check", lambda *_: None)
    monkeypatch.setattr(run, "environment", lambda _: {"device": "a stand-in"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    out = tmp_path / "report.json"
    run.gpu_report(out, "cuda", False, lambda quick: [])
    assert [name for name, _, _ in given] == [
        *("ceilings", "rows", "tests", "study", "sanitizer", "rows")
    ]
    times = {name: seconds for name, _, seconds in reversed(given)}
    assert times["tests"] == run.TESTS - 10
    assert times["study"] == run.STUDY - 10
    left = run.WHOLE - next(start for name, start, _ in given if name == "sanitizer")
    assert times["sanitizer"] == (run.SANITIZER if greedy else left / 2) - 10
    assert times["rows"] >= 150
    assert given[-1][1] + given[-1][2] == run.WHOLE < 480
    if not greedy:
        assert given[-1][2] > 440
    assert json.loads(out.read_text())["finished"]


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run.timing, "ceilings", fails)
    monkeypatch.setattr(study, "measure_study", fails)
    out = tmp_path / "report.json"
    found = run.gpu_report(out, "cpu", True, lambda quick: [])
    assert found["ceilings"] == found["study"] == {"why": "RuntimeError: out of memory"}
    assert found["finished"]
