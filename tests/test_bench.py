"""The benchmarks: every operation has one, and wrong results are not timed."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from bench import bench_compare, conftest
from bench.bench_metrics import METRICS
from bench.common import inputs, machine, timing
from bench.conftest import Timer, check_values, compute_rates

ROOT = Path(__file__).parent.parent
TINY = """
import pytest
import torch
from functools import partial
from bench.common.tolerances import SAME, assert_close

@pytest.fixture(scope="session")
def ceilings():
    return {"copy": 1e9, "float64": 2e9}

def product(x):
    return x @ x.mT

@pytest.mark.parametrize("factor", FACTORS)
def test_product(timed, factor):
    timed(
        "product",
        lambda g: (torch.randn(8, 4, generator=g, dtype=torch.float64),),
        call=lambda x: factor * product(x),
        oracle=lambda x: torch.from_numpy(x.numpy() @ x.numpy().T),
        check=partial(assert_close, tol=SAME),
        shape={"n": 8, "p": 4000},
        dtype=torch.float64,
        name=f"times {factor}",
        bytes=768,
        operations={"float64": 512},
        device="cpu",
    )
"""


def find_timed_operations() -> Iterator[str]:
    """Yield the operations that ``timed`` names and calls; by default it calls the named one."""
    yield from (operation for operation, *_ in METRICS)
    for path in (ROOT / "bench").glob("bench_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "timed"):
                continue
            calls = [k.value for k in node.keywords if k.arg == "call"]
            if isinstance(node.args[0], ast.Constant) and (
                not calls or f"rk.{node.args[0].value}(" in ast.unparse(calls[0])
            ):
                yield str(node.args[0].value)


def test_every_operation_is_timed() -> None:
    """Every public function except show_config has a benchmark of its name that calls it.

    Those that run networks are timed in processes of their own.
    """
    public = {name for name in rk.__all__ if not isinstance(getattr(rk, name), type)}
    in_processes = set(re.findall(r"\brk\.(\w+)\(", inspect.getsource(bench_compare)))
    assert public - {"show_config"} == public & ({*find_timed_operations()} | in_processes)


# The interpreter is refused, and an xdist worker times nothing.
_REMOVED = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"}


def run_benchmark(tmp_path: Path, factors: list[int], **environment: str) -> tuple[str, int, Path]:
    """Run the benchmark above in a separate process; return its output, exit code and results."""
    tiny = tmp_path / "bench_tiny.py"
    out = tmp_path / f"bench-{machine.slugify_device(inputs.DEVICE)}.json"
    tiny.write_text(TINY.replace("FACTORS", repr(factors)))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {k: v for k, v in os.environ.items() if k not in _REMOVED} | {"PYTHONPATH": path}
    command = (sys.executable, "-m", "pytest", "-p", "bench.conftest", "-p", "no:cacheprovider")
    options = ("-c", ROOT / "pyproject.toml", "--benchmark-only", "--results", tmp_path, tiny)
    done = subprocess.run(
        [*command, *options],
        env=env | environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    return done.stdout + done.stderr, done.returncode, out


def test_results(tmp_path: Path) -> None:
    output, code, out = run_benchmark(tmp_path, [1])
    assert code == 0, output
    record = json.loads(out.read_text())
    assert set(record) == {"environment", "ceilings", "benchmarks"}
    assert record["ceilings"] == {"copy": 1e9, "float64": 2e9}
    assert {"device", "threads", "torch", "numpy", "repsim-kernels"} <= set(record["environment"])
    (row,) = record["benchmarks"]
    assert row["group"] == "product, n=8 p=4,000, float64"
    assert row["name"] == "times 1"
    assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    assert 0 <= row["iqr_s"] <= row["max_s"] - row["min_s"]
    assert row["rounds"] >= 3
    info, median = row["extra_info"], row["median_s"]
    assert info["gb_s"] == pytest.approx(768e-9 / median)
    assert info["tflop_s"] == pytest.approx(512e-12 / median)
    assert info["bound"] == "copy"  # 768 ns, and 256 ns of products
    assert info["of_ceiling"] == pytest.approx(768e-9 / median)


def test_nothing_is_written_if_any_result_is_wrong(tmp_path: Path) -> None:
    output, code, out = run_benchmark(tmp_path, [1, 2])
    assert code == 1
    assert "1 failed, 1 passed" in output
    assert "times the tolerance" in output
    assert f"{out}: not written; some benchmarks failed" in output
    assert not out.exists()


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    output, code, out = run_benchmark(tmp_path, [1], TRITON_INTERPRET="1")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET=1" in output
    assert not out.exists()


def test_rates() -> None:
    rates = {"copy": 100.0, "ieee": 50.0, "float64": 10.0}
    assert compute_rates(2.0, rates, 0, {}) == {}
    assert compute_rates(2.0, rates, 40, {}) == {
        "bytes": 40,
        "gb_s": 20e-9,
        "bound": "copy",
        "of_ceiling": 0.2,
    }
    # 50 / 50 and 10 / 10 seconds of products, one after the other.
    both = compute_rates(4.0, rates, 100, {"ieee": 50, "float64": 10})
    assert both["bound"] == "products"
    assert both["of_ceiling"] == 0.5
    assert both["tflop_s"] == pytest.approx(15e-12)


class Clock:
    """A clock that calls advance."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Benchmark:
    """A fake of pytest-benchmark's fixture that uses the clock."""

    enabled = True

    def __init__(self, clock: Clock) -> None:
        self.clock, self.extra_info = clock, dict[str, object]()

    def pedantic(self, run, *, setup, rounds) -> None:
        data = []
        for _ in range(rounds):
            start = self.clock.now
            run(*setup()[0])
            data.append(self.clock.now - start)
        self.rounds = rounds
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=statistics.median(data)))


@pytest.mark.parametrize(("device", "rounds"), [("cuda", 10), ("cpu", 3)])
def test_the_number_of_rounds_ignores_compilation(monkeypatch, device, rounds) -> None:
    """On a GPU the first call takes 4 s and the others 0.1 s: ten rounds in a second.

    A call ends with a synchronisation. On a CPU, where nothing is compiled, the first call counts.
    """
    clock, waiting = Clock(), [4.0]

    def call(x: torch.Tensor) -> torch.Tensor:
        clock.now += waiting[0] if device == "cpu" else 0
        return x

    def synchronize() -> None:
        clock.now += waiting[0]
        waiting[0] = 0.1

    monkeypatch.setattr(conftest, "time", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(timing, "make_inputs", lambda make, device: [(torch.ones(3),)] * 2)
    monkeypatch.setattr(timing, "measure", lambda *_: {"ms": 100.0})
    monkeypatch.setattr(timing, "measure_on_device", lambda *_: {"ms": 90.0})
    benchmark = Benchmark(clock)
    config = SimpleNamespace(stash=pytest.Stash())
    request = SimpleNamespace(getfixturevalue=lambda _: {"copy": 1e9}, config=config)
    Timer(benchmark, request)(
        "double",
        lambda g: (torch.ones(3),),
        call=call,
        oracle=lambda x: x,
        check=lambda got, want: None,
        shape={"n": 3},
        device=device,
    )
    assert benchmark.rounds == rounds
    assert benchmark.stats.stats.median == pytest.approx(waiting[0])


@pytest.mark.parametrize(
    ("operation", "dtype", "want"),
    [
        ("cell_grams", torch.float32, "tf32x3"),
        ("ablation_distances", torch.bfloat16, "tf32x3"),
        ("cell_grams", torch.float64, "float64"),
        ("cka", torch.float32, "float64"),
        ("pairwise", torch.float32, "float64"),
    ],
)
def test_operations_without_a_kernel_are_float64_on_a_gpu(
    monkeypatch, operation, dtype, want
) -> None:
    monkeypatch.setattr(inputs, "DEVICE", "cuda")
    assert inputs.get_precision(operation, dtype) == want
    near, far = torch.tensor(1.0 + 1e-7), torch.tensor(1.0 + 1e-5)
    check = inputs.check_distances(operation, dtype)
    check(near, 1.0)
    if want == "float64":
        with pytest.raises(AssertionError):
            check(far, 1.0)
    else:
        check(far, 1.0)


def test_every_value_is_checked() -> None:
    seen = []

    def check(got: float, want: float) -> None:
        seen.append(want)
        assert got == want

    check_values({"a": 1.0, "b": {"c": 2.0}}, {"a": 1.0, "b": {"c": 2.0}}, check)
    assert seen == [1.0, 2.0]
    with pytest.raises(AssertionError):
        check_values({"a": 1.0, "b": {"c": 2.0}}, {"b": {"c": 3.0}}, check)
    with pytest.raises(KeyError):
        check_values({"a": 1.0}, {"b": 1.0}, check)
    for nan in (np.nan, np.array([0, np.nan]), torch.tensor(torch.nan), (1.0, np.nan)):
        with pytest.raises(AssertionError, match="NaN"):
            check_values({"a": 1.0, "b": nan}, {"a": 1.0}, check)
