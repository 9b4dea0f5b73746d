"""What a network costs before and after a layer: counted, and timed."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from repsim_kernels.forward.dataflow import Split, schedule
from repsim_kernels.forward.trace import Trace, Values

# A CPU's products are at their full speed where each byte of a weight serves so many operations.
_INTENSITY = 100


@dataclass(frozen=True)
class Cost:
    """What a network takes before a layer (the head) and after it (the tail).

    Attributes
    ----------
    head_flops, tail_flops : float
        Floating-point operations an image: two for each multiply-add.
    head_seconds, tail_seconds : float
        Of a pass of all the images that were given, nothing masked.
    held_bytes, peak_bytes, pass_bytes : int
        Bytes an image: of what a `State` holds, the most that the tail holds at once, and the most
        that a whole pass holds.
    together : int
        Cells that run together on a CPU by default, for so many images.
    """

    head_flops: float
    tail_flops: float
    head_seconds: float
    tail_seconds: float
    held_bytes: int
    peak_bytes: int
    pass_bytes: int
    together: int


def together(split: Split, n: int) -> int:
    """Cells to run together on a CPU: one, unless its n stimuli alone leave the weights unused."""
    return max(1, -(-_INTENSITY * split.weights // max(1, int(split.tail_flops * n))))


def cost(split: Split, times: dict[fx.Node, float] | None, n: int) -> Cost:
    head, tail = (
        math.nan if times is None else sum(times[step.node] for step in part)
        for part in (split.head, split.tail)
    )
    return Cost(
        head_flops=split.head_flops,
        tail_flops=split.tail_flops,
        head_seconds=head,
        tail_seconds=tail,
        held_bytes=split.held,
        peak_bytes=split.peak,
        pass_bytes=split.whole_peak,
        together=together(split, n),
    )


def seconds(trace: Trace, images: Tensor, passes: int = 3) -> dict[fx.Node, float]:
    """The median time of each operation over some passes: what is to be expected, not the best."""

    def now() -> float:
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    taken: dict[fx.Node, list[float]] = {x: [] for x in trace.nodes[1:]}
    for _ in range(passes):
        values: Values = {trace.input: images}
        for step in schedule(trace.nodes[1:], {trace.output}):
            start = now()
            values[step.node] = trace.run(step.node, values)
            taken[step.node].append(now() - start)
            for x in step.dropped:
                del values[x]
    return {node: statistics.median(times) for node, times in taken.items()}
