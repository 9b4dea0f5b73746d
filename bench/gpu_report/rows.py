"""A row of the sheet: other routes' times, the kernel's error, and its time if it is right."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from bench.common import timing
from bench.common.machine import Json, number
from bench.gpu_report import plain_cupy
from bench.gpu_report.case import Case
from repsim_kernels.kernels.cupy import module

# A relative error, of plain float32, beyond which a route does something else and has no time.
PLAIN = 1e-2


def limit(quick: bool) -> float:
    """Seconds for the repetitions of one thing."""
    return 0.02 if quick else 2.0


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def blank(case: Case) -> Json:
    """A row that waits."""
    return {
        "name": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "precision": case.precision,
        "bytes": case.bytes,
        "operations": case.operations,
        "tolerance": case.tolerance,
        "status": "waiting",
    }


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
        row.update(status="error", why=f"its inputs or reference: {said(error)}")
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
    if why := no_kernels(device, quick):
        row.update(status="not run", why=why)
        return
    try:
        off = relative_error(_poisoned(case.kernel, *inputs[0]), want, case.parts)
        row["error"] = number(off)
        if not off <= case.tolerance:
            row.update(status="WRONG", why="its error is above its tolerance, so it is not timed")
            return
        row["call"] = timing.measure(case.kernel, inputs, limit(quick))
        row["ms"] = row["call"]["ms"]
        keep()
        if device == "cuda":
            row["kernel"] = timing.on_device(case.kernel, inputs, row["ms"], limit(quick))
            row["ms"] = row["kernel"].get("ms", row["ms"])
        if "floor_ms" in row:
            row["of_floor"] = row["floor_ms"] / row["ms"]
        if ours:
            row["ratio"] = row["torch_ms"] / row["call"]["ms"]
        if cupy_ms is not None:
            row["cupy_ratio"] = cupy_ms / row["call"]["ms"]
        row["status"] = "ok"
    except Exception as error:
        row.update(status="error", why=said(error))


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
        return {"error": number(off), **timing.measure(route, inputs, limit(quick))}
    except Exception as error:
        return {"why": said(error)}
    finally:
        if name == "cupy":
            with suppress(Exception):  # of a device that is lost
                plain_cupy.forget()


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


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_kernels(device: str, quick: bool) -> str | None:
    """Why no kernel can run; None if they can."""
    if device == "cuda":
        return None
    if not interpreted():
        return "kernels need a CUDA device, or TRITON_INTERPRET=1 for a rehearsal"
    return None if quick else "the interpreter is for tiny shapes: add --quick"
