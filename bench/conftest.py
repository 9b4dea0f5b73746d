"""Benchmarks that are held to an oracle before they are timed, and the file of their results."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.common import machine, timing
from bench.common.inputs import DEVICE, Make
from bench.common.machine import Json
from bench.common.tolerances import as_numpy

_SECONDS = 1.0  # of the rounds of a benchmark, unless fewer than the least would fit
_LEAST, _MOST = 3, 50  # rounds
_LONG = 5.0  # seconds of a call that is timed twice only


@dataclass
class Record:
    """What a session has measured."""

    ceilings: dict[str, float] = field(default_factory=dict)
    benchmarks: list[Json] = field(default_factory=list)
    findings: dict[str, dict[str, float]] = field(default_factory=dict)
    line: str = ""

    def add(self, row: Json) -> None:
        known = {(r["group"], r["name"]) for r in self.benchmarks}
        assert (row["group"], row["name"]) not in known, f"{row['group']}: two {row['name']}"
        self.benchmarks.append(row)

    def least(self, group: str) -> dict[str, float]:
        """Seconds of the fastest round, by the name of a benchmark."""
        return {r["name"]: r["min_s"] for r in self.benchmarks if r["group"] == group}


@cache
def _environment() -> Json:
    return machine.environment(DEVICE, ("scikit-learn", "torchvision", "pytest-benchmark"))


_RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        help="file for the results if all pass, or a folder for bench-<device>.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: an interpreter's times say nothing; unset it")
    out = config.getoption("results")
    if out is not None and not out.absolute().parent.is_dir():
        raise pytest.UsageError(f"--results {out}: no such folder")
    config.stash[_RECORD] = Record()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write all or nothing: half of a file's numbers would pass for the whole."""
    out, record = session.config.getoption("results"), session.config.stash[_RECORD]
    if out is None:
        return
    if exitstatus or not record.benchmarks:
        record.line = f"{out}: not written; " + ("not all passed" if exitstatus else "none timed")
        return
    if out.is_dir():
        out /= f"bench-{machine.slug(DEVICE)}.json"
    machine.save(
        out,
        {
            "environment": _environment(),
            "ceilings": record.ceilings,
            "benchmarks": record.benchmarks,
            "findings": record.findings,
        },
    )
    record.line = str(out)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    record = config.stash[_RECORD]
    for group, numbers in record.findings.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        terminalreporter.write_line(f"{group}: {shown}")
    if record.line:
        terminalreporter.write_line(record.line)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    return pytestconfig.stash[_RECORD]


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What this device reaches, measured once, in the same run."""
    return timing.ceilings(DEVICE, quick=False, limit=1.0)


@dataclass
class Timed:
    """Checks a call, times it, and keeps both times and what they amount to."""

    benchmark: Any
    record: Record
    request: pytest.FixtureRequest

    def __call__(
        self,
        operation: str,
        call: Callable[..., Any],
        make: Make,
        *,
        oracle: Callable[..., Any],
        check: Callable[[Any, Any], None],
        shape: Mapping[str, int],
        dtype: torch.dtype = torch.float32,
        what: str = "",
        name: str = "repsim_kernels",
        bytes: int = 0,
        operations: Mapping[str, int] | None = None,
        device: str = DEVICE,
    ) -> Any:
        """Return the result that was checked.

        ``make`` gives the arguments of ``call`` and ``oracle``; ``check`` takes their results, or
        each value that the oracle has of a dict. ``bytes`` are the least that go to and from
        memory, ``operations`` the least, by the name of the ceiling that they have; left out where
        an algorithm has no such number.
        """
        sizes = " ".join(f"{key}={value:,}" for key, value in shape.items())
        short = str(dtype).removeprefix("torch.")
        self.benchmark.group = ", ".join(filter(None, (operation, what, sizes, short)))
        self.benchmark.name = name
        inputs = timing.rotating(make, device)

        def run(*some: Tensor) -> Any:
            result = call(*some)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        start = time.perf_counter()
        got = run(*inputs[0])
        once = time.perf_counter() - start
        agree(got, oracle(*inputs[0]), check)
        if not self.benchmark.enabled:
            self.benchmark.pedantic(lambda: None)
            return got
        rates = self.request.getfixturevalue("ceilings")
        self.record.ceilings = rates
        if once < _SECONDS or device == "cuda":  # the first call also loads and compiles
            start = time.perf_counter()
            run(*inputs[1])
            once = time.perf_counter() - start
        turn = cycle(inputs)
        least = _LEAST if once < _LONG else 2
        rounds = max(least, min(_MOST, int(_SECONDS / once)))
        self.benchmark.pedantic(run, setup=lambda: (next(turn), {}), rounds=rounds)
        times = self.benchmark.stats.stats.data
        seconds = statistics.median(times)
        info: Json = {"operation": operation, "shape": dict(shape), "dtype": short}
        if device == "cuda":
            info["events"] = timing.measure(call, inputs, _SECONDS)
            info["on_device"] = self._on_device(call, inputs, info["events"]["ms"])
            seconds = 1e-3 * info["on_device"].get("ms", info["events"]["ms"])
        info |= amounts(seconds, rates, bytes, operations or {})
        self.benchmark.extra_info |= _environment() | info
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        self.record.add(
            {
                "group": self.benchmark.group,
                "name": name,
                "min_s": min(times),
                "median_s": statistics.median(times),
                "iqr_s": high - low,
                "max_s": max(times),
                "rounds": rounds,
                "extra_info": info,
            }
        )
        return got

    def _on_device(self, call: Callable[..., Any], inputs: Any, call_ms: float) -> Json:
        def tensor(*some: Tensor) -> Tensor:
            return next(found for found in leaves(call(*some)) if isinstance(found, Tensor))

        found = timing.on_device(tensor, inputs, call_ms, _SECONDS)
        if found.pop("spoiled", False):
            pytest.exit(f"{self.benchmark.group}: {found['how']}; no later time would be right", 1)
        return found


@pytest.fixture
def timed(benchmark: Any, record: Record, request: pytest.FixtureRequest) -> Timed:
    """What every benchmark is made with."""
    return Timed(benchmark, record, request)


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
