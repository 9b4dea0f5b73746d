"""The GPU report except its rows: shares of time, GPU tests, sanitizer, verdict."""

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
from bench.gpu_report.cases import list_cases
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
def test_counting_pytest_results(last, want):
    counts = checks.count_tests(f"....F\nFAILED test_x.py - assert 3 passed\n{last}\n")
    assert counts.items() >= want.items()
    assert bool(counts) == bool(want)


def test_gpu_tests_run_despite_files_that_cannot_be_imported(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module  # mark.gpu")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert True\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    assert False\n"
    )
    result = checks.run_gpu_tests(120, tmp_path)
    assert result["counts"] == {"failed": 1, "passed": 1, "error": 1}
    assert result["exit_code"] == 1
    assert any("no_such_module" in text for text in result["tail"])


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "SIGINT ignored"])
def test_gpu_tests_that_hang_are_stopped_and_counted(tmp_path, ignored):
    """Background jobs of a shell ignore SIGINT, so the report must handle both settings."""
    (tmp_path / "test_some.py").write_text(
        "import time\n\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert True\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    time.sleep(600)\n"
    )
    code = (
        "import json, pathlib, sys; from bench.gpu_report import checks\n"
        "print(json.dumps(checks.run_gpu_tests(8, pathlib.Path(sys.argv[1]))))"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGINT, before)
    result = json.loads(done.stdout)
    assert result["why"] == "stopped after 8 s"
    assert result["exit_code"] is None
    assert result["counts"].get("passed") == 1


def test_a_command_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    script = "trap '' INT; echo hello; while :; do sleep 1; done"
    result = processes.run_command(["bash", "-c", script], 0.3)
    assert result["exit_code"] is None
    assert result["output"] == "hello\n"
    assert result["why"] == "stopped after 0 s"


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
def test_counting_sanitizer_errors(output, want):
    assert checks.count_errors(output) == want


FAKE = """#!/bin/sh
case "$*" in
  *memcheck*) echo "========= ERROR SUMMARY: {memory} errors" ;;
  *racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
esac
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1
"""


@pytest.fixture
def run_fake_sanitizer(tmp_path, monkeypatch):
    """Install a compute-sanitizer that reports a given count, and run it on a given script."""

    def install(memory=0, script="pass", limit=60.0):
        binary = tmp_path / "compute-sanitizer"
        binary.write_text(FAKE.format(memory=memory))
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(checks, "_TARGET", (sys.executable, "-c", script))
        return checks.sanitize(limit)

    return install


def test_the_sanitizer_runs_each_tool(run_fake_sanitizer):
    result = run_fake_sanitizer(memory=3)
    assert [tool["tool"] for tool in result["tools"]] == ["alone", "memcheck", "racecheck"]
    assert [tool["exit_code"] for tool in result["tools"]] == [0, 0, 0]
    assert [tool["errors"] for tool in result["tools"]] == [None, 3, 0]
    assert "why" not in result


def test_a_target_that_fails_without_a_tool_is_not_sanitized(run_fake_sanitizer):
    result = run_fake_sanitizer(script="print('WRONG'); raise SystemExit(1)")
    assert [tool["tool"] for tool in result["tools"]] == ["alone"]
    assert result["tools"][0]["tail"] == ["WRONG"]
    assert "fails even without a tool" in result["why"]


def test_a_slow_target_is_still_sanitized(run_fake_sanitizer, monkeypatch):
    check = checks._run_tool
    monkeypatch.setattr(
        checks, "_run_tool", lambda *a: check(*a[:2], 1.0 if a[0] == "alone" else 60)
    )
    result = run_fake_sanitizer(script="import time; time.sleep(60)")
    assert [tool["tool"] for tool in result["tools"]] == ["alone", "memcheck", "racecheck"]
    assert result["tools"][0]["why"] == "stopped after 1 s"
    assert [tool["errors"] for tool in result["tools"]] == [None, 0, 0]
    assert "why" not in result


def test_memcheck_runs_first_when_time_is_short(run_fake_sanitizer, monkeypatch):
    limits, run_tool = [], checks._run_tool

    def record_limit(tool, command, limit):
        limits.append((tool, limit))
        return run_tool(tool, command, limit)

    monkeypatch.setattr(checks, "_run_tool", record_limit)
    result = run_fake_sanitizer(memory=3, script="raise SystemExit(1)", limit=29.0)
    assert [tool["tool"] for tool in result["tools"]] == ["memcheck", "racecheck"]
    assert result["tools"][0]["errors"] == 3
    assert limits[0] == ("memcheck", 29.0)
    assert 20 < limits[1][1] < 29


def test_a_missing_sanitizer_is_reported(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: None)
    assert checks.sanitize(60) == {"why": "compute-sanitizer not found"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_the_sanitizer_target_reports_wrong_results(monkeypatch, capsys):
    right, wrong = (
        replace(case, kernel=case.reference) for case in sanitizer_target.list_all_cases()[:2]
    )
    cases = [right, replace(wrong, kernel=lambda x, *_: 2 * wrong.reference(x, *_))]
    monkeypatch.setattr(sanitizer_target, "list_all_cases", lambda: cases)
    assert sanitizer_target.main("cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"right 0.0e+00 {right.name}")
    assert lines[1].startswith(f"WRONG 1.0e+00 {wrong.name}")


RIGHT = [{"name": f"kernel{i}", "shape": "n=3", "status": "ok"} for i in range(3)]
CLEAN = {
    "tools": [
        {"tool": "alone", "exit_code": 0, "errors": None},
        {"tool": "memcheck", "exit_code": 0, "errors": 0},
        {"tool": "racecheck", "exit_code": 0, "errors": 0},
    ]
}


def make_record(**changes):
    record = {
        "rows": RIGHT,
        "interpreted": False,
        "tests": {"exit_code": 0, "counts": {"passed": 331, "skipped": 2}},
        "sanitizer": CLEAN,
        "study": {"preset": "hayne2024", "networks": [], "seconds": 41.23},
        "peers": {"rows": [{"status": "ok"}, {"status": "ok"}, {"status": "not run"}]},
    }
    return {**record, **changes}


def make_row(status, name="gram", **changes):
    return {"name": name, "shape": "n=9", "status": status, **changes}


def make_sanitizer(name, errors, exit_code=0, **changes):
    others = [tool for tool in CLEAN["tools"] if tool["tool"] != name]
    tool = {"tool": name, "exit_code": exit_code, "errors": errors, **changes}
    return {"tools": [*others, tool]}


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        (
            {},
            "3 of 3 kernels right; study 41.2 s extrapolated; peers 2 ok, 1 not run; "
            "331 tests passed, 0 failed, 2 skipped; sanitizer clean",
        ),
        ({"rows": [*RIGHT, make_row("WRONG")]}, "3 of 4 kernels right, 1 WRONG (gram n=9); "),
        (
            {"rows": [*RIGHT, make_row("error"), make_row("skipped", "cca")]},
            "3 of 5 kernels right, 1 error (gram n=9), 1 skipped (cca n=9); ",
        ),
        ({"rows": RIGHT, "interpreted": True}, "3 of 3 kernels right in Triton's interpreter, on "),
        ({"rows": [make_row("not run", why="no GPU")] * 2}, "kernels NOT RUN: no GPU; "),
        ({"tests": {"counts": {"passed": 3, "failed": 2, "error": 1}}}, "; 3 tests passed, 2 fail"),
        ({"tests": {"counts": {"failed": 2}, "why": "stopped"}}, "; 0 tests passed, 2 failed, st"),
        ({"tests": {"counts": {}, "why": "stopped after 9 s"}}, "; tests FAILED: stopped after 9"),
        ({"tests": {"counts": {}, "exit_code": 4}}, "; tests FAILED: no counts; "),
        ({"tests": {"why": "not run: quick"}}, "; tests not run: quick; "),
        ({"sanitizer": make_sanitizer("memcheck", 3)}, "; sanitizer memcheck 3 ERRORS"),
        (
            {"sanitizer": make_sanitizer("racecheck", None, 1)},
            "; sanitizer racecheck without a count",
        ),
        (
            {"sanitizer": make_sanitizer("racecheck", 0, 1)},
            "; sanitizer racecheck without a count",
        ),
        (
            {"sanitizer": make_sanitizer("memcheck", None, None, why="late")},
            "; sanitizer memcheck late",
        ),
        ({"sanitizer": {"why": "not there"}}, "; sanitizer not there"),
        ({"sanitizer": None}, "; sanitizer no record"),
        ({"study": {"preset": None, "seconds": 2.0}}, "; rehearsed study 2 s extrapolated"),
        (
            {"study": {"preset": "x", "seconds": 2.0, "networks": [{"failed": ["a", "b"]}]}},
            "; study 2 s extrapolated, 2 of its stages NOT TIMED",
        ),
        ({"study": {"why": "no torchvision"}}, "; study FAILED (no torchvision)"),
        ({"peers": {"why": "late", "rows": []}}, "; peers FAILED: late; "),
        ({"peers": {"why": "late", "rows": [{"status": "wrong"}]}}, "; peers 1 wrong, late; "),
        (
            {"study": {"networks": [{"name": "a", "seconds": 3.0}, {"name": "b"}], "why": "late"}},
            "; study of 1 of 2 networks (a 3 s, late)",
        ),
    ],
)
def test_the_verdict(changes, want):
    verdict = judge(make_record(**changes))
    assert want in verdict
    assert len(verdict.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--device", "tpu"], "expected cuda or cpu"),
        (["--device", "cpu", "--quick", "--out", "{}/none/report.json"], "does not exist"),
        (["--device", "cpu", "--quick", "--out", "{}"], "can't be written"),
        (["--device", "cpu", "--quick", "--cache", "{}/none"], "no such file; `make gpu-report`"),
    ],
)
def test_bad_arguments_are_refused_before_measuring(tmp_path, monkeypatch, arguments, want):
    monkeypatch.setattr(run.timing, "measure_ceilings", lambda *_: pytest.fail("measuring started"))
    options = [text.format(tmp_path) for text in arguments]
    options += [] if "--out" in options else ["--out", str(tmp_path / "report.json")]
    done = CliRunner().invoke(app, ["gpu-report", *options], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2
    assert want in done.output


def test_a_missing_gpu_or_an_interpreter_is_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device cpu --quick"):
        run.measure_gpu(tmp_path / "report.json", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="would not run on the GPU"):
        run.measure_gpu(tmp_path / "report.json", "cuda")


class Clock:
    """A clock that the parts advance."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now


@pytest.mark.parametrize("greedy", [True, False])
def test_parts_get_their_shares_of_time(tmp_path, monkeypatch, greedy):
    """The shares hold whether the other parts use all of their time or almost none."""
    clock, shares = Clock(), []

    def part(name, seconds):
        shares.append((name, clock.now - 1000, seconds))
        clock.now += seconds if greedy else min(seconds, 1)
        return {"why": "a stand-in"}

    def measure_rows(record, keep, device, quick, make, end, last=True):
        part("rows", end - clock.now)

    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(run.timing, "measure_ceilings", lambda *_: part("ceilings", 20.0))
    monkeypatch.setattr(run, "measure_rows", measure_rows)
    monkeypatch.setattr(run, "measure_peers", lambda *a: part("peers", a[-1]))
    monkeypatch.setattr(run, "run_gpu_tests", lambda limit: part("tests", limit))
    monkeypatch.setattr(run, "sanitize", lambda limit: part("sanitizer", limit))
    monkeypatch.setattr(study, "measure_study", lambda *a: part("study", a[-1] - clock.now))
    monkeypatch.setattr(run, "_check_arguments", lambda *_: None)
    monkeypatch.setattr(run, "describe_environment", lambda _: {"device": "a stand-in"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    out = tmp_path / "report.json"
    run.measure_gpu(out, "cuda", False, lambda quick: [])
    assert [name for name, _, _ in shares] == [
        *("ceilings", "rows", "study", "peers", "tests", "sanitizer", "rows")
    ]
    times = {name: seconds for name, _, seconds in reversed(shares)}
    assert times["tests"] == run.TESTS - 10
    assert times["peers"] == run.PEERS - 10
    assert times["study"] == run.STUDY - 10
    remaining = run.WHOLE - next(start for name, start, _ in shares if name == "sanitizer")
    assert times["sanitizer"] == (run.SANITIZER if greedy else remaining / 2) - 10
    assert times["rows"] >= 150
    assert shares[-1][1] + shares[-1][2] == run.WHOLE < 480
    if not greedy:
        assert shares[-1][2] > 440
    assert json.loads(out.read_text())["finished"]


def test_a_failed_part_is_recorded_and_the_others_continue(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run.timing, "measure_ceilings", fails)
    monkeypatch.setattr(study, "measure_study", fails)
    monkeypatch.setattr(run, "measure_peers", fails)
    out = tmp_path / "report.json"
    report = run.measure_gpu(out, "cpu", True, lambda quick: [])
    why = {"why": "RuntimeError: out of memory"}
    assert report["ceilings"] == report["study"] == report["peers"] == why
    assert report["finished"]


def test_rows_with_a_plain_cupy_route():
    cases = list_cases(False)
    names = {c.name for c in cases if "cupy" in c.routes}
    assert names == {
        *("centered_gram", "cell_grams", "class_means", "variate_weights"),
        *("layer_grams, all products", "ablate, ReLU", "eigh", "svd", "cell_grams, CUDA C++"),
    }
    assert all("cupy" in c.routes for c in cases if c.name in names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_sanitizer_target_is_correct_on_a_gpu():
    assert sanitizer_target.main() == 0
