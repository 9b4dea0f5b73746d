"""Measure the rows of the report: a kernel's error and time, and the times of other routes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from bench.common import timing
from bench.common.machine import Json, to_json_number
from bench.gpu_report.cache import run_logged
from bench.gpu_report.case import KernelCase
from bench.gpu_report.processes import watch
from bench.gpu_report.report import format_row
from repsim_kernels.kernels.cupy import module

# A route with a larger relative error computes something different and is not timed; plain float32
# stays below it.
ROUTE_TOLERANCE = 1e-2
SILENCE = 60.0  # seconds without a message, including compilation, after which a row counts as hung
LAST_START = 30.0  # seconds before the end; no row starts later

Make = Callable[[bool], list[KernelCase]]


def get_time_limit(quick: bool) -> float:
    """Return how many seconds the repeated calls of one function may take."""
    return 0.02 if quick else 0.4


def describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def make_row(case: KernelCase) -> Json:
    """Return a row that waits to be measured."""
    row = {name: getattr(case, name) for name in ("name", "shape", "dtype", "precision")}
    costs = {name: getattr(case, name) for name in ("bytes", "operations", "tolerance")}
    return {**row, "dtype": str(case.dtype).removeprefix("torch."), **costs, "status": "waiting"}


def measure_rows(
    record: Json,
    keep: Callable[[], None],
    device: str,
    quick: bool,
    make: Make,
    end: float,
    last: bool = True,
) -> None:
    """Measure the waiting rows in worker processes, starting a new one if one dies or hangs.

    If ``last``, rows that still wait at the end are marked as skipped.
    """
    rows, late = record["rows"], end - LAST_START
    while (waiting := _find_waiting(rows)) and time.time() < late:
        why = "its process ended without it"
        arguments = device, quick, make, record["ceilings"] or {}, waiting, late
        try:
            for index, row in watch(
                run_logged, measure_cases, *arguments, end=end, silence=SILENCE
            ):
                rows[index] = row
                keep()
                if row["status"] != "running":
                    reason = "" if row["status"] == "not run" else row.get("why", "")
                    print(*filter(None, (*format_row(row), reason)), flush=True)
        except RuntimeError as error:
            why = str(error)
        is_late = time.time() > late
        stuck = not is_late and _find_waiting(rows) == waiting
        for row in rows:
            if row["status"] == "running" and is_late and not last:
                row["status"] = "waiting"  # it will be retried with more time
            elif row["status"] == "running" or (row["status"] == "waiting" and stuck):
                row.update(status="error", why=why)
                print(f"{row['name']}, {row['shape']}: {why}", flush=True)
        keep()
    if last:
        for index in _find_waiting(rows):
            rows[index].update(status="skipped", why="no time remained")
        keep()


def _find_waiting(rows: list[Json]) -> list[int]:
    return [index for index, row in enumerate(rows) if row["status"] == "waiting"]


def measure_cases(
    send: Callable[[tuple[int, Json]], None],
    device: str,
    quick: bool,
    make: Make,
    rates: Json,
    waiting: Sequence[int],
    late: float,
) -> None:
    """Measure the waiting cases until the device is lost or ``late`` has passed."""
    for index, case in enumerate(make(quick)):
        if index not in waiting:
            continue
        if time.time() > late:
            return
        row = {**make_row(case), "status": "running"}
        keep = partial(send, (index, row))
        keep()
        measure(row, case, device, quick, rates, keep)
        keep()
        if device == "cuda" and _is_lost(row):
            return


def _is_lost(row: Json) -> bool:
    """Return whether this process can't measure any further row; a new one continues."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(row.get("kernel", {}).get("spoiled"))


def measure(
    row: Json, case: KernelCase, device: str, quick: bool, rates: Json, keep: Callable[[], None]
) -> None:
    """Fill in a row; without ceilings it has no floor."""
    if "copy" in rates:
        bounds = {"bytes": case.bytes / rates["copy"]}
        if case.operations:
            bounds["operations"] = case.operations / rates[case.precision]
        row["bound"] = max(bounds, key=lambda what: bounds[what])
        row["floor_ms"] = 1e3 * bounds[row["bound"]]
    try:
        inputs = timing.make_inputs(case.inputs, device)
        want = case.reference(*inputs[0])
        row["inputs"] = len(inputs)
    except Exception as failure:
        row.update(status="error", why=f"inputs or reference: {describe_error(failure)}")
        return
    for name, route in case.routes.items():
        row.setdefault("routes", {})[name] = _measure_route(name, route, case, inputs, want, quick)
        keep()
    routes = row.get("routes", {})
    torch_ms = {name: route["ms"] for name, route in routes.items() if "ms" in route}
    cupy_ms = torch_ms.pop("cupy", None)
    if torch_ms:
        row["torch_route"] = min(torch_ms, key=lambda name: torch_ms[name])
        row["torch_ms"] = torch_ms[row["torch_route"]]
    if cupy_ms is not None:
        row["cupy_ms"] = cupy_ms
    if why := explain_no_kernels(device, quick):
        row.update(status="not run", why=why)
        return
    try:
        error = compute_relative_error(_call_poisoned(case.kernel, *inputs[0]), want, case.parts)
        row["error"] = to_json_number(error)
        if not error <= case.tolerance:
            row.update(status="WRONG", why="error above the tolerance")
        row["call"] = timing.measure(case.kernel, inputs, get_time_limit(quick))
        row["ms"] = row["call"]["ms"]
        keep()
        if device == "cuda":
            row["kernel"] = timing.measure_on_device(
                case.kernel, inputs, row["ms"], get_time_limit(quick)
            )
            row["ms"] = row["kernel"].get("ms", row["ms"])
        if "floor_ms" in row:
            row["of_floor"] = row["floor_ms"] / row["ms"]
        if torch_ms:
            row["ratio"] = row["torch_ms"] / row["call"]["ms"]
        if cupy_ms is not None:
            row["cupy_ratio"] = cupy_ms / row["call"]["ms"]
        if row["status"] != "WRONG":
            row["status"] = "ok"
    except Exception as failure:
        wrong = row["status"] == "WRONG"
        why = f"{row['why']}; timing: " if wrong else ""
        row.update(status="WRONG" if wrong else "error", why=why + describe_error(failure))


def _measure_route(
    name: str,
    route: Callable[..., Tensor],
    case: KernelCase,
    inputs: list[tuple[Tensor, ...]],
    want: Tensor,
    quick: bool,
) -> Json:
    """Return the error and time of another route to a row's result, or why it has none."""
    if name == "cupy" and (why := module.unsupported(*inputs[0])):
        return {"why": why}
    try:
        error = compute_relative_error(route(*inputs[0]), want, case.parts)
        if not error <= max(case.tolerance, ROUTE_TOLERANCE):
            return {"error": to_json_number(error), "why": "different values; not timed"}
        times = timing.measure(route, inputs, get_time_limit(quick))
        return {"error": to_json_number(error), **times}
    except Exception as error:
        return {"why": describe_error(error)}
    finally:
        if name == "cupy":
            with suppress(Exception):  # the device may be lost
                _free_cupy()


def compute_relative_error(got: Tensor, want: Tensor, parts: int = 1) -> float:
    """Return the largest relative Frobenius error of the parts; NaN if any part has NaN."""
    if got.shape != want.shape:
        raise ValueError(f"result has shape {tuple(got.shape)}; expected {tuple(want.shape)}")
    if got.dtype == want.dtype and torch.equal(got, want):
        return 0.0
    got, want = (t.reshape(parts, -1).double() for t in (got, want))
    error, size = (torch.linalg.vector_norm(t, dim=1) for t in (got - want, want))
    return float((error / size.clamp(min=1e-300)).max())


def _call_poisoned(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a function with uninitialised memory filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def _free_cupy() -> None:
    """Release the memory pool of CuPy, so that PyTorch can use it."""
    import cupy  # type: ignore[import-not-found]

    cupy.get_default_memory_pool().free_all_blocks()


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def explain_no_kernels(device: str, quick: bool) -> str | None:
    """Return the reason why kernels can't run; None if they can."""
    if device == "cuda":
        return None
    if not is_interpreted():
        return "kernels need a CUDA device, or TRITON_INTERPRET=1 for a rehearsal"
    return None if quick else "the interpreter is only for tiny shapes; pass --quick"
