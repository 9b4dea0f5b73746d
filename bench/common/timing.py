"""Time calls on inputs that no cache holds, with and without the host's share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]

_MIN_REPEATS, _MAX_REPEATS = 2, 100
_MIN_REPLAYS = 20
# Longer calls are not captured in a graph. Graphs matter for kernels below 0.1 ms, because the host
# may need most of the time of such a call.
_LONGEST_CAPTURED_MS = 1.0


def measure_ceilings(device: str, quick: bool, limit: float) -> dict[str, float]:
    """Measure what the device reaches: bytes/s of a copy, operations/s of matrix products."""
    elements, side = (2**18, 128) if quick else (2**28, 8192) if device == "cuda" else (2**26, 2048)
    g = torch.Generator(device).manual_seed(0)

    def time_fastest(call: Call, *inputs: Tensor) -> float:
        return 1e-3 * measure(call, [inputs], limit)["min_ms"]

    a = torch.randn(elements, generator=g, device=device)
    rates = {"copy": 2 * a.nbytes / time_fastest(torch.empty_like(a).copy_, a)}
    a, b = (torch.randn(side, side, generator=g, device=device) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for precision in ("tf32", "ieee"):
        matmul.fp32_precision = precision
        rates[precision] = 2 * side**3 / time_fastest(torch.mm, a, b)
    matmul.fp32_precision = before
    rates["tf32x3"] = rates["tf32"] / 3
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        rates[name] = 2 * side**3 / time_fastest(torch.mm, a.to(dtype), b.to(dtype))
    rates["float16x3"] = rates["float16"] / 3
    return rates


def make_inputs(make: Callable[[torch.Generator], Inputs], device: str) -> list[Inputs]:
    """Return enough inputs that each has left the L2 cache before it is used again."""
    g = torch.Generator(device).manual_seed(0)
    inputs = [make(g), make(g)]
    if device == "cuda":
        size = sum(t.nbytes for t in inputs[0])
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        # Caches don't replace lines in strict order, so the inputs fill three times the cache.
        inputs += [make(g) for _ in range(min(3 * l2 // size, 64) - 1)]
    return inputs


def measure(call: Call, inputs: Sequence[Inputs], limit: float) -> dict[str, Any]:
    """Return the milliseconds of a call as a user sees them, after a warm-up."""
    cuda = inputs[0][0].is_cuda
    begin = time.perf_counter()
    for arguments in inputs:
        start = time.perf_counter()
        call(*arguments)
        _synchronize(cuda)
        once = time.perf_counter() - start
        if time.perf_counter() - begin > limit:
            break
    repeats = max(_MIN_REPEATS, min(_MAX_REPEATS, int(limit / max(once, 1e-9))))
    turns = [inputs[i % len(inputs)] for i in range(repeats)]
    times = _time_by_events(call, turns) if cuda else _time_by_clock(call, turns)
    return _summarize(times)


def measure_on_device(
    call: Call, inputs: Sequence[Inputs], call_ms: float, limit: float
) -> dict[str, Any]:
    """Return the milliseconds of a call's work on the GPU, by replaying a graph or by the profiler.

    ``how`` names the method and the reason for not using a graph. ``spoiled`` means that a capture
    failed, after which this process should not measure any further call.
    """
    why = (
        "the call is long"
        if call_ms > _LONGEST_CAPTURED_MS
        else _explain_no_capture(call, inputs[0])
    )
    if why is None:
        want = call(*inputs[-1]).clone()
        try:
            graph, got = _capture(call, inputs)
        except RuntimeError as error:
            return {"how": f"events; no graph: {_first_line(error)}", "spoiled": True}
        if torch.equal(got, want):
            return {**_summarize(_time_replays(graph, len(inputs), limit)), "how": "graph"}
        # The last bits may differ, for example those of cuBLAS with another workspace.
        why = "a replay gives a different result"
    profiled = _profile(call, inputs)
    if profiled is None:
        return {"how": f"events; no profiler; no graph: {why}"}
    return {**profiled, "how": f"profiler; no graph: {why}"}


def _summarize(times: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(times, n=4)
    return {
        "ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "iqr_ms": high - low,
        "repeats": len(times),
    }


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _time_by_clock(call: Call, turns: Sequence[Inputs]) -> list[float]:
    times = []
    for arguments in turns:
        start = time.perf_counter()
        call(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _time_by_events(call: Callable[..., Any], turns: Sequence[Inputs]) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
    for (start, end), arguments in zip(pairs, turns, strict=True):
        start.record()
        call(*arguments)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


class _NoCopiesFromHost(TorchDispatchMode):
    """Refuse copies from the host: a replayed graph would read host memory that was freed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        to_device = isinstance(out, Tensor) and out.is_cuda
        if (
            to_device
            and "copy" in str(func)
            and any(isinstance(a, Tensor) and a.is_cpu for a in args)
        ):
            raise RuntimeError("the call copies from the host")
        return out


def _explain_no_capture(call: Call, arguments: Inputs) -> str | None:
    """Return why a graph can't hold a call; a failed capture would spoil the process."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with _NoCopiesFromHost():  # type: ignore[no-untyped-call]
            call(*arguments)
    except RuntimeError as error:
        return _first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return None


def _capture(call: Call, inputs: Sequence[Inputs]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a graph that calls each of the inputs, and the last result of its first replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            got = call(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    return graph, got


def _time_replays(graph: torch.cuda.CUDAGraph, calls: int, limit: float) -> list[float]:
    """Return times per call from replays of a graph with several calls."""
    once = _time_by_events(graph.replay, [()] * 3)[-1]
    repeats = max(_MIN_REPLAYS, min(_MAX_REPEATS, int(1e3 * limit / max(once, 1e-3))))
    return [t / calls for t in _time_by_events(graph.replay, [()] * repeats)]


def _profile(call: Call, inputs: Sequence[Inputs]) -> dict[str, Any] | None:
    """Return the total milliseconds of a call's kernels and copies; None without a profiler.

    Only the mean is returned if events can't be assigned to calls.
    """
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    turns = [*inputs] * (1 + 10 // len(inputs))
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for arguments in turns:
                call(*arguments)
            torch.cuda.synchronize()
        averages = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
        total = sum(float(e.self_device_time_total) for e in averages if not e.is_user_annotation)
    except Exception:  # the profiler may be missing, or not permitted
        return None
    if not total:
        return None
    with suppress(Exception):  # the fields of an event may change with the profiler's version
        events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
        return _summarize(_sum_by_turn([e for e in events if not e.is_user_annotation], len(turns)))
    return {"ms": 1e-3 * total / len(turns)}


def _sum_by_turn(events: Sequence[Any], turns: int) -> list[float]:
    """Return the milliseconds of each turn; all turns must have the same events."""
    ordered = sorted(events, key=lambda e: e.time_range.start)
    size, rest = divmod(len(ordered), turns)
    runs = [ordered[i * size : (i + 1) * size] for i in range(turns)]
    if rest or len({tuple(e.name for e in run) for run in runs}) > 1:
        raise ValueError("turns differ")
    return [1e-3 * sum(float(e.time_range.elapsed_us()) for e in run) for run in runs]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
