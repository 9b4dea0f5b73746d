"""The fixture that checks a result before timing it, and the file of results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.common import machine, timing
from bench.common.inputs import DEVICE, Make, check_distances, make_reference
from bench.common.machine import Json
from bench.common.tolerances import as_numpy

_SECONDS = 1.0  # for all rounds of a benchmark, unless fewer than _MIN_ROUNDS would fit
_MIN_ROUNDS, _MAX_ROUNDS = 3, 50  # rounds
_LONG_CALL = 5.0  # seconds; longer calls are timed only twice
_CEILINGS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for bench-<device>.json")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: interpreter times are meaningless; unset it")
    folder = config.getoption("results")
    if folder is not None and not folder.is_dir():
        raise pytest.UsageError(f"--results {folder}: folder does not exist")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the results only if all benchmarks passed: a partial file would look complete."""
    folder = session.config.getoption("results")
    if folder is None:
        return
    out = folder / f"bench-{machine.slugify_device(DEVICE)}.json"
    plugin: Any = session.config
    rows = [make_row(benchmark) for benchmark in plugin._benchmarksession.benchmarks]
    if exitstatus or not rows:
        reason = "some benchmarks failed" if exitstatus else "nothing was timed"
        outcome = f"{out}: not written; {reason}"
    else:
        packages = ("scikit-learn", "torchvision", "pytest-benchmark")
        environment = machine.describe_environment(DEVICE, packages)
        rates = session.config.stash[_CEILINGS]
        machine.save(out, {"environment": environment, "ceilings": rates, "benchmarks": rows})
        outcome = str(out)
    session.config.get_terminal_writer().line(f"\n{outcome}")


def make_row(benchmark: Any) -> Json:
    """Return one entry of the results from pytest-benchmark's statistics."""
    stats = benchmark.stats
    times = {f"{name}_s": getattr(stats, name) for name in ("min", "median", "iqr", "max")}
    info = {"rounds": stats.rounds, "extra_info": benchmark.extra_info}
    return {"group": benchmark.group, "name": benchmark.name, **times, **info}


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """Measure the ceilings of this device once per run."""
    return timing.measure_ceilings(DEVICE, quick=False, limit=1.0)


@dataclass
class Timer:
    """Checks a call, times it, and adds its rates to the results."""

    benchmark: Any
    request: pytest.FixtureRequest

    def __call__(
        self,
        operation: str,
        make: Make,
        *,
        shape: Mapping[str, int],
        options: Mapping[str, Any] | None = None,
        call: Callable[..., Any] | None = None,
        oracle: Callable[..., Any] | None = None,
        check: Callable[[Any, Any], None] | None = None,
        dtype: torch.dtype = torch.float32,
        label: str = "",
        name: str = "repsim_kernels",
        bytes: int = 0,
        operations: Mapping[str, int] | None = None,
        device: str = DEVICE,
    ) -> Any:
        """Check and time a call; return the checked result.

        ``make`` returns the arguments of ``call`` and ``oracle``; ``check`` compares their results,
        or each value of the oracle's dict. By default the operation is called with ``options`` and
        compared with its definition as a distance. ``bytes`` is the minimum memory traffic,
        ``operations`` the minimum number of operations by the name of their ceiling; leave it out
        if the algorithm has no fixed number.
        """
        sizes = " ".join(f"{key}={value:,}" for key, value in shape.items())
        dtype_name = str(dtype).removeprefix("torch.")
        self.benchmark.group = ", ".join(filter(None, (operation, label, sizes, dtype_name)))
        self.benchmark.name = name
        options = options or {}
        call = call or partial(getattr(rk, operation), **options)
        oracle = oracle or make_reference(operation, **options)
        check = check or check_distances(operation, dtype)
        inputs = timing.make_inputs(make, device)

        def run(*arguments: Tensor) -> Any:
            result = call(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        def run_timed(arguments: tuple[Tensor, ...]) -> tuple[float, Any]:
            start = time.perf_counter()
            result = run(*arguments)
            return time.perf_counter() - start, result

        seconds, got = run_timed(inputs[0])
        check_values(got, oracle(*inputs[0]), check)
        if not self.benchmark.enabled:
            self.benchmark.pedantic(lambda: None)
            return got
        rates = self.request.getfixturevalue("ceilings")
        self.request.config.stash[_CEILINGS] = rates
        if seconds < _SECONDS or device == "cuda":  # the first call also loads and compiles
            seconds, _ = run_timed(inputs[1])
        turns = cycle(inputs)
        min_rounds = _MIN_ROUNDS if seconds < _LONG_CALL else 2
        rounds = max(min_rounds, min(_MAX_ROUNDS, int(_SECONDS / seconds)))
        self.benchmark.pedantic(run, setup=lambda: (next(turns), {}), rounds=rounds)
        seconds = self.benchmark.stats.stats.median
        info: Json = {"operation": operation, "shape": dict(shape), "dtype": dtype_name}
        if device == "cuda":
            info["events"] = timing.measure(call, inputs, _SECONDS)
            info["on_device"] = self._measure_on_device(call, inputs, info["events"]["ms"])
            seconds = 1e-3 * info["on_device"].get("ms", info["events"]["ms"])
        info |= compute_rates(seconds, rates, bytes, operations or {})
        self.benchmark.extra_info.update(info)
        return got

    def _measure_on_device(self, call: Callable[..., Any], inputs: Any, call_ms: float) -> Json:
        def get_first_tensor(*arguments: Tensor) -> Tensor:
            return next(leaf for leaf in list_leaves(call(*arguments)) if isinstance(leaf, Tensor))

        times = timing.measure_on_device(get_first_tensor, inputs, call_ms, _SECONDS)
        if times.pop("spoiled", False):
            pytest.exit(f"{self.benchmark.group}: {times['how']}; later times would be wrong", 1)
        return times


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timer:
    """The function that every benchmark calls."""
    return Timer(benchmark, request)


def compute_rates(
    seconds: float, ceilings: Json, bytes: int, operations: Mapping[str, int]
) -> Json:
    """Return the rates that were reached, and the roofline's minimum time as a share of seconds."""
    rates: Json = {}
    if bytes:
        rates |= {"bytes": bytes, "gb_s": 1e-9 * bytes / seconds}
    if operations:
        total = sum(operations.values())
        rates |= {"operations": dict(operations), "tflop_s": 1e-12 * total / seconds}
    if rates:
        copying = bytes / ceilings["copy"]
        multiplying = sum(count / ceilings[kind] for kind, count in operations.items())
        rates["bound"] = "copy" if copying > multiplying else "products"
        rates["of_ceiling"] = max(copying, multiplying) / seconds
    return rates


def list_leaves(result: Any) -> list[Any]:
    """Return the arrays and numbers of a nested result."""
    if isinstance(result, dict):
        result = result.values()
    elif not isinstance(result, (tuple, list)):
        return [result]
    return [leaf for part in result for leaf in list_leaves(part)]


def check_values(got: Any, want: Any, check: Callable[[Any, Any], None]) -> None:
    """Check each value that the oracle has, and that no value of the result is NaN."""
    for leaf in list_leaves(got):
        if isinstance(leaf, (Tensor, np.ndarray, float)):
            assert not np.isnan(as_numpy(leaf)).any(), "NaN"
    if isinstance(want, dict):
        for key, value in want.items():
            check_values(got[key], value, check)
    else:
        check(got, want)
