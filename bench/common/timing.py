"""Times of calls: medians over inputs that no cache holds, with and without what the host adds."""

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

_MOST, _LEAST = 100, 2  # repetitions; 20 and more unless the time limit is reached
# ms of a call, above which no graph is tried. Kernels of less than 0.1 ms are what a graph is for;
# the host's part of a call can take most of the rest.
_CAPTURED = 1.0


def ceilings(device: str, quick: bool, limit: float) -> dict[str, float]:
    """What the device reaches: bytes a second of a copy, operations a second of products."""
    elements, side = (2**18, 128) if quick else (2**28, 8192) if device == "cuda" else (2**26, 2048)
    g = torch.Generator(device).manual_seed(0)

    def fastest(call: Call, *inputs: Tensor) -> float:
        return 1e-3 * measure(call, [inputs], limit)["min_ms"]

    a = torch.randn(elements, generator=g, device=device)
    rates = {"copy": 2 * a.nbytes / fastest(torch.empty_like(a).copy_, a)}
    a, b = (torch.randn(side, side, generator=g, device=device) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for precision in ("tf32", "ieee"):
        matmul.fp32_precision = precision
        rates[precision] = 2 * side**3 / fastest(torch.mm, a, b)
    matmul.fp32_precision = before
    rates["tf32x3"] = rates["tf32"] / 3
    for dtype in (torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        rates[name] = 2 * side**3 / fastest(torch.mm, a.to(dtype), b.to(dtype))
    return rates


def rotating(make: Callable[[torch.Generator], Inputs], device: str) -> list[Inputs]:
    """Enough different inputs that one is out of the L2 cache when its turn comes again."""
    g = torch.Generator(device).manual_seed(0)
    inputs = [make(g), make(g)]
    if device == "cuda":
        size = sum(t.nbytes for t in inputs[0])
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        # Caches don't replace strictly in turn: three times as much as they hold.
        inputs += [make(g) for _ in range(min(3 * l2 // size, 64) - 1)]
    return inputs


def measure(call: Call, inputs: Sequence[Inputs], limit: float) -> dict[str, Any]:
    """Milliseconds of a call as its user sees them, after a warm-up."""
    cuda = inputs[0][0].is_cuda
    begin = time.perf_counter()
    for some in inputs:
        start = time.perf_counter()
        call(*some)
        _synchronize(cuda)
        once = time.perf_counter() - start
        if time.perf_counter() - begin > limit:
            break
    repeats = max(_LEAST, min(_MOST, int(limit / max(once, 1e-9))))
    turns = [inputs[i % len(inputs)] for i in range(repeats)]
    times = _events(call, turns) if cuda else _clock(call, turns)
    return _summary(times)


def on_device(call: Call, inputs: Sequence[Inputs], call_ms: float, limit: float) -> dict[str, Any]:
    """Milliseconds of a call's work on the GPU: a replayed graph, or else the profiler's sums.

    ``how`` says which it was, and why no graph; ``spoiled``, that a capture failed, after which
    this process should measure nothing more.
    """
    why = "the call takes long" if call_ms > _CAPTURED else _not_capturable(call, inputs[0])
    if why is None:
        want = call(*inputs[-1]).clone()
        try:
            graph, got = _captured(call, inputs)
        except RuntimeError as error:
            return {"how": f"events; no graph: {_first_line(error)}", "spoiled": True}
        if torch.equal(got, want):
            return {**_summary(_replays(graph, len(inputs), limit)), "how": "graph"}
        # Last bits may differ, as those of cuBLAS with another workspace.
        why = "a replay gives other numbers"
    profiled = _profiled(call, inputs)
    if profiled is None:
        return {"how": f"events; no profiler; no graph: {why}"}
    return {**profiled, "how": f"profiler; no graph: {why}"}


def _summary(times: list[float]) -> dict[str, Any]:
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


def _clock(call: Call, turns: Sequence[Inputs]) -> list[float]:
    times = []
    for some in turns:
        start = time.perf_counter()
        call(*some)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _events(call: Callable[..., Any], turns: Sequence[Inputs]) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
    for (start, end), some in zip(pairs, turns, strict=True):
        start.record()
        call(*some)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


class _NoCopiesFromHost(TorchDispatchMode):
    """A graph would read the host's memory again when it is replayed, and find it freed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        onto = isinstance(out, Tensor) and out.is_cuda
        if onto and "copy" in str(func) and any(isinstance(a, Tensor) and a.is_cpu for a in args):
            raise RuntimeError("it copies from the host")
        return out


def _not_capturable(call: Call, some: Inputs) -> str | None:
    """Why a graph can't hold a call, found without a capture, which would spoil the process."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with _NoCopiesFromHost():
            call(*some)
    except RuntimeError as error:
        return _first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return None


def _captured(call: Call, inputs: Sequence[Inputs]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph that calls on each of the inputs, and the last result of its first replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for some in inputs:
            got = call(*some)
    graph.replay()
    torch.cuda.synchronize()
    return graph, got


def _replays(graph: torch.cuda.CUDAGraph, calls: int, limit: float) -> list[float]:
    """Times of a call, from replays of a graph of several."""
    once = _events(graph.replay, [()] * 3)[-1]
    repeats = max(20, min(_MOST, int(1e3 * limit / max(once, 1e-3))))
    return [t / calls for t in _events(graph.replay, [()] * repeats)]


def _profiled(call: Call, inputs: Sequence[Inputs]) -> dict[str, Any] | None:
    """What kernels and copies of a call take together; None without a profiler.

    The mean alone where it can't be told which of them belong to which call.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    turns = [*inputs] * (1 + 10 // len(inputs))
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for some in turns:
                call(*some)
            torch.cuda.synchronize()
        found = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
        total = sum(float(e.self_device_time_total) for e in found if not e.is_user_annotation)
    except Exception:  # a GPU without it, or without the right to it
        return None
    if not total:
        return None
    with suppress(Exception):  # what the profiler says of one event may change with its version
        events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
        return _summary(_by_turn([e for e in events if not e.is_user_annotation], len(turns)))
    return {"ms": 1e-3 * total / len(turns)}


def _by_turn(events: Sequence[Any], turns: int) -> list[float]:
    """Milliseconds of each turn's events, which have to be the same in all."""
    ordered = sorted(events, key=lambda e: e.time_range.start)
    size, rest = divmod(len(ordered), turns)
    runs = [ordered[i * size : (i + 1) * size] for i in range(turns)]
    if rest or len({tuple(e.name for e in run) for run in runs}) > 1:
        raise ValueError("turns differ")
    return [1e-3 * sum(float(e.time_range.elapsed_us()) for e in run) for run in runs]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
