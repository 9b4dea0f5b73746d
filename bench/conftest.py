"""Benchmarks that are held to an oracle before they are timed, and the file of their results."""

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
from bench.common.inputs import DEVICE, Make, as_distances, reference
from bench.common.machine import Json
from bench.common.tolerances import as_numpy

_SECONDS = 1.0  # of the rounds of a benchmark, unless fewer than the least would fit
_LEAST, _MOST = 3, 50  # rounds
_LONG = 5.0  # seconds of a call that is timed twice only
_CEILINGS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for bench-<device>.json, if all pass")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: an interpreter's times say nothing; unset it")
    folder = config.getoption("results")
    if folder is not None and not folder.is_dir():
        raise pytest.UsageError(f"--results {folder}: no such folder")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write all or nothing: half of a file's numbers would pass for the whole."""
    folder = session.config.getoption("results")
    if folder is None:
        return
    out = folder / f"bench-{machine.slug(DEVICE)}.json"
    rows = [row(benchmark) for benchmark in session.config._benchmarksession.benchmarks]
    if exitstatus or not rows:
        outcome = f"{out}: not written; {'not all passed' if exitstatus else 'none timed'}"
    else:
        packages = ("scikit-learn", "torchvision", "pytest-benchmark")
        environment = machine.environment(DEVICE, packages)
        rates = session.config.stash[_CEILINGS]
        machine.save(out, {"environment": environment, "ceilings": rates, "benchmarks": rows})
        outcome = str(out)
    session.config.get_terminal_writer().line(f"\n{outcome}")


def row(benchmark: Any) -> Json:
    """One entry of the results, from the statistics of pytest-benchmark."""
    stats = benchmark.stats
    times = {f"{name}_s": getattr(stats, name) for name in ("min", "median", "iqr", "max")}
    info = {"rounds": stats.rounds, "extra_info": benchmark.extra_info}
    return {"group": benchmark.group, "name": benchmark.name, **times, **info}


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What this device reaches, measured once, in the same run."""
    return timing.ceilings(DEVICE, quick=False, limit=1.0)


@dataclass
class Timed:
    """Checks a call, times it, and notes what the time amounts to."""

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
        what: str = "",
        name: str = "repsim_kernels",
        bytes: int = 0,
        operations: Mapping[str, int] | None = None,
        device: str = DEVICE,
    ) -> Any:
        """Return the result that was checked.

        ``make`` gives the arguments of ``call`` and ``oracle``; ``check`` takes their results, or
        each value that the oracle has of a dict. Without them the operation itself is called with
        ``options`` and held to its definition as a distance. ``bytes`` are the least that go to and
        from memory, ``operations`` the least, by the name of the ceiling that they have; left out
        where an algorithm has no such number.
        """
        sizes = " ".join(f"{key}={value:,}" for key, value in shape.items())
        short = str(dtype).removeprefix("torch.")
        self.benchmark.group = ", ".join(filter(None, (operation, what, sizes, short)))
        self.benchmark.name = name
        options = options or {}
        call = call or partial(getattr(rk, operation), **options)
        oracle = oracle or reference(operation, **options)
        check = check or as_distances(operation, dtype)
        inputs = timing.make_inputs(make, device)

        def run(*some: Tensor) -> Any:
            result = call(*some)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        def once(some: tuple[Tensor, ...]) -> tuple[float, Any]:
            start = time.perf_counter()
            result = run(*some)
            return time.perf_counter() - start, result

        seconds, got = once(inputs[0])
        agree(got, oracle(*inputs[0]), check)
        if not self.benchmark.enabled:
            self.benchmark.pedantic(lambda: None)
            return got
        rates = self.request.getfixturevalue("ceilings")
        self.request.config.stash[_CEILINGS] = rates
        if seconds < _SECONDS or device == "cuda":  # the first call also loads and compiles
            seconds, _ = once(inputs[1])
        turn = cycle(inputs)
        least = _LEAST if seconds < _LONG else 2
        rounds = max(least, min(_MOST, int(_SECONDS / seconds)))
        self.benchmark.pedantic(run, setup=lambda: (next(turn), {}), rounds=rounds)
        seconds = self.benchmark.stats.stats.median
        info: Json = {"operation": operation, "shape": dict(shape), "dtype": short}
        if device == "cuda":
            info["events"] = timing.measure(call, inputs, _SECONDS)
            info["on_device"] = self._on_device(call, inputs, info["events"]["ms"])
            seconds = 1e-3 * info["on_device"].get("ms", info["events"]["ms"])
        info |= amounts(seconds, rates, bytes, operations or {})
        self.benchmark.extra_info.update(info)
        return got

    def _on_device(self, call: Callable[..., Any], inputs: Any, call_ms: float) -> Json:
        def tensor(*some: Tensor) -> Tensor:
            return next(found for found in leaves(call(*some)) if isinstance(found, Tensor))

        found = timing.measure_on_device(tensor, inputs, call_ms, _SECONDS)
        if found.pop("spoiled", False):
            pytest.exit(f"{self.benchmark.group}: {found['how']}; no later time would be right", 1)
        return found


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """What every benchmark is made with."""
    return Timed(benchmark, request)


def amounts(seconds: float, rates: Json, bytes: int, operations: Mapping[str, int]) -> Json:
    """Rates, and the share that the roofline's floor has of the time."""
    found: Json = {}
    if bytes:
        found |= {"bytes": bytes, "gb_s": 1e-9 * bytes / seconds}
    if operations:
        total = sum(operations.values())
        found |= {"operations": dict(operations), "tflop_s": 1e-12 * total / seconds}
    if found:
        copying = bytes / rates["copy"]
        multiplying = sum(count / rates[kind] for kind, count in operations.items())
        found["bound"] = "copy" if copying > multiplying else "products"
        found["of_ceiling"] = max(copying, multiplying) / seconds
    return found


def leaves(result: Any) -> list[Any]:
    """The arrays and numbers of a result."""
    if isinstance(result, dict):
        result = result.values()
    elif not isinstance(result, (tuple, list)):
        return [result]
    return [leaf for part in result for leaf in leaves(part)]


def agree(got: Any, want: Any, check: Callable[[Any, Any], None]) -> None:
    """Check each value that the oracle has, and that none of the whole result is NaN."""
    for leaf in leaves(got):
        if isinstance(leaf, (Tensor, np.ndarray, float)):
            assert not np.isnan(as_numpy(leaf)).any(), "NaN"
    if isinstance(want, dict):
        for key, value in want.items():
            agree(got[key], value, check)
    else:
        check(got, want)
