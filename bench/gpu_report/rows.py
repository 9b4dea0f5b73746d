"""The rows of the report: other routes' times, the kernel's error, and its time if it is right."""

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
from bench.common.machine import Json, number
from bench.gpu_report.case import Case
from bench.gpu_report.processes import watch
from bench.gpu_report.report import format_row
from repsim_kernels.kernels.cupy import module

# A relative error, of plain float32, beyond which a route does something else and has no time.
PLAIN = 1e-2
SILENCE = 90.0  # seconds; a row without news for so long hangs; compiling takes some of it
LAST_START = 30.0  # seconds before the end, after which no row is begun

Make = Callable[[bool], list[Case]]


def limit_repeats(quick: bool) -> float:
    """Seconds for the repetitions of one thing."""
    return 0.02 if quick else 2.0


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def new_row(case: Case) -> Json:
    """A row that waits."""
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
    """Have the rows that wait measured, by another process where one dies or is stuck.

    Those that wait at the end are skipped if it is the last time that rows are measured.
    """
    rows, late = record["rows"], end - LAST_START
    while (waiting := _waiting(rows)) and time.time() < late:
        why = "its process ended without it"
        arguments = device, quick, make, record["ceilings"] or {}, waiting, late
        try:
            for index, row in watch(measure_cases, *arguments, end=end, silence=SILENCE):
                rows[index] = row
                keep()
                if row["status"] != "running":
                    reason = "" if row["status"] == "not run" else row.get("why", "")
                    print(*filter(None, (*format_row(row), reason)), flush=True)
        except RuntimeError as error:
            why = str(error)
        is_late = time.time() > late
        stuck = not is_late and _waiting(rows) == waiting
        for row in rows:
            if row["status"] == "running" and is_late and not last:
                row["status"] = "waiting"  # it is begun again, with more time
            elif row["status"] == "running" or (row["status"] == "waiting" and stuck):
                row.update(status="error", why=why)
                print(f"{row['name']}, {row['shape']}: {why}", flush=True)
        keep()
    if last:
        for index in _waiting(rows):
            rows[index].update(status="skipped", why="no time was left")
        keep()


def _waiting(rows: list[Json]) -> list[int]:
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
    """Measure the cases that wait, until the device is lost or it is late."""
    for index, case in enumerate(make(quick)):
        if index not in waiting:
            continue
        if time.time() > late:
            return
        row = {**new_row(case), "status": "running"}
        keep = partial(send, (index, row))
        keep()
        measure(row, case, device, quick, rates, keep)
        keep()
        if device == "cuda" and _lost(row):
            return


def _lost(row: Json) -> bool:
    """Whether this process can measure nothing more; the next one goes on."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(row.get("kernel", {}).get("spoiled"))


def measure(
    row: Json, case: Case, device: str, quick: bool, rates: Json, keep: Callable[[], None]
) -> None:
    """Fill in a row. Without the ceilings there is no floor."""
    if "copy" in rates:
        bounds = {"bytes": case.bytes / rates["copy"]}
        if case.operations:
            bounds["operations"] = case.operations / rates[case.precision]
        row["bound"] = max(bounds, key=lambda what: bounds[what])
        row["floor_ms"] = 1e3 * bounds[row["bound"]]
    try:
        inputs = timing.rotating(case.inputs, device)
        want = case.reference(*inputs[0])
        row["inputs"] = len(inputs)
    except Exception as error:
        row.update(status="error", why=f"its inputs or reference: {describe(error)}")
        return
    for name, route in case.routes.items():
        row.setdefault("routes", {})[name] = _route(name, route, case, inputs, want, quick)
        keep()
    routes = row.get("routes", {})
    ours = {name: found["ms"] for name, found in routes.items() if "ms" in found}
    cupy_ms = ours.pop("cupy", None)
    if ours:
        row["torch_route"] = min(ours, key=lambda name: ours[name])
        row["torch_ms"] = ours[row["torch_route"]]
    if cupy_ms is not None:
        row["cupy_ms"] = cupy_ms
    if why := why_no_kernels(device, quick):
        row.update(status="not run", why=why)
        return
    try:
        off = relative_error(_poisoned(case.kernel, *inputs[0]), want, case.parts)
        row["error"] = number(off)
        if not off <= case.tolerance:
            row.update(status="WRONG", why="its error is above its tolerance, so it is not timed")
            return
        row["call"] = timing.measure(case.kernel, inputs, limit_repeats(quick))
        row["ms"] = row["call"]["ms"]
        keep()
        if device == "cuda":
            row["kernel"] = timing.on_device(case.kernel, inputs, row["ms"], limit_repeats(quick))
            row["ms"] = row["kernel"].get("ms", row["ms"])
        if "floor_ms" in row:
            row["of_floor"] = row["floor_ms"] / row["ms"]
        if ours:
            row["ratio"] = row["torch_ms"] / row["call"]["ms"]
        if cupy_ms is not None:
            row["cupy_ratio"] = cupy_ms / row["call"]["ms"]
        row["status"] = "ok"
    except Exception as error:
        row.update(status="error", why=describe(error))


def _route(
    name: str,
    route: Callable[..., Tensor],
    case: Case,
    inputs: list[tuple[Tensor, ...]],
    want: Tensor,
    quick: bool,
) -> Json:
    """The error and the time of another way to a row's numbers, or why it has none."""
    if name == "cupy" and (why := module.unsupported(*inputs[0])):
        return {"why": why}
    try:
        off = relative_error(route(*inputs[0]), want, case.parts)
        if not off <= max(case.tolerance, PLAIN):
            return {"error": number(off), "why": "its numbers are others, so it is not timed"}
        return {"error": number(off), **timing.measure(route, inputs, limit_repeats(quick))}
    except Exception as error:
        return {"why": describe(error)}
    finally:
        if name == "cupy":
            with suppress(Exception):  # of a device that is lost
                _free_cupy()


def relative_error(got: Tensor, want: Tensor, parts: int = 1) -> float:
    """The largest relative Frobenius error of the parts; NaN if there is one."""
    if got.shape != want.shape:
        raise ValueError(f"its result is {tuple(got.shape)}, not {tuple(want.shape)}")
    if got.dtype == want.dtype and torch.equal(got, want):
        return 0.0
    got, want = (t.reshape(parts, -1).double() for t in (got, want))
    off, size = (torch.linalg.vector_norm(t, dim=1) for t in (got - want, want))
    return float((off / size.clamp(min=1e-300)).max())


def _poisoned(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The result of a call for which memory that nothing has written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def _free_cupy() -> None:
    """Give the memory that CuPy keeps for itself back, to PyTorch's rows."""
    import cupy  # type: ignore[import-not-found]

    cupy.get_default_memory_pool().free_all_blocks()


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_kernels(device: str, quick: bool) -> str | None:
    """Why no kernel can run; None if they can."""
    if device == "cuda":
        return None
    if not is_interpreted():
        return "kernels need a CUDA device, or TRITON_INTERPRET=1 for a rehearsal"
    return None if quick else "the interpreter is for tiny shapes: add --quick"
