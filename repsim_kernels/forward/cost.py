"""What a network costs before and after a layer: counted operations and measured times."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import fx

from repsim_kernels.forward.dataflow import Split, schedule
from repsim_kernels.forward.inputs import Inputs
from repsim_kernels.forward.trace import Trace

# From this number of operations per byte of weights, a CPU's matrix products run at full speed.
_INTENSITY = 100
# Bytes of a pass that a CPU's last-level cache holds. Small passes are slow, because each of their
# operations costs as much to start as a large one: passes of this size took 0.5 to 0.9 times as
# long as those of one cell, for the small networks of the study and 50 images.
_CACHED_BYTES = 2**24


@dataclass(frozen=True)
class Cost:
    """What a network costs before a layer (the head) and after it (the tail).

    Attributes
    ----------
    head_flops, tail_flops : float
        Floating-point operations per image; a multiply-add counts as two.
    head_seconds, tail_seconds : float
        Time for one pass of all the images passed to `AblatedForward.costs`, without masks; NaN
        if not measured.
    held_bytes : int
        Bytes per image that a `State` holds.
    peak_bytes : int
        The most bytes per image that the tail holds at one moment.
    pass_bytes : int
        The most bytes per image that a whole pass holds at one moment.
    together : int
        Cells per pass that `AblatedForward.logits` runs on a CPU by default, for this number of
        images.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import repsim_kernels as rk
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> forward = rk.forward.AblatedForward(model, "1")
    >>> cost = forward.costs(torch.ones(2, 4), timed=False)["1"]
    >>> cost.head_flops, cost.tail_flops, cost.held_bytes
    (64.0, 48.0, 32)
    """

    head_flops: float
    tail_flops: float
    head_seconds: float
    tail_seconds: float
    held_bytes: int
    peak_bytes: int
    pass_bytes: int
    together: int


def choose_cells_per_pass(split: Split, n: int) -> int:
    """Return the cells per pass on a CPU: one, or more if n images are few or small."""
    to_amortise_weights = -(-_INTENSITY * split.weight_bytes // max(1, int(split.tail_flops * n)))
    return max(1, to_amortise_weights, _CACHED_BYTES // max(1, split.tail_peak_bytes * n))


def summarize(split: Split, times: dict[fx.Node, float] | None, n: int) -> Cost:
    """Return the cost of a split network for n images, from the seconds of each operation."""
    head, tail = (
        math.nan if times is None else sum(times[step.node] for step in part)
        for part in (split.head, split.tail)
    )
    return Cost(
        head_flops=split.head_flops,
        tail_flops=split.tail_flops,
        head_seconds=head,
        tail_seconds=tail,
        held_bytes=split.state_bytes,
        peak_bytes=split.tail_peak_bytes,
        pass_bytes=split.pass_peak_bytes,
        together=choose_cells_per_pass(split, n),
    )


def time_operations(trace: Trace, inputs: Inputs, passes: int = 3) -> dict[fx.Node, float]:
    """Return the seconds of each operation: the median over some passes."""

    def read_clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    device = inputs.tensors[0].device
    seconds: dict[fx.Node, list[float]] = {x: [] for x in trace.operations}
    for _ in range(passes):
        values = trace.bind(inputs)
        for step in schedule(trace.operations, {trace.output}):
            start = read_clock()
            values[step.node] = trace.run(step.node, values)
            seconds[step.node].append(read_clock() - start)
            for x in step.to_drop:
                del values[x]
    return {node: statistics.median(times) for node, times in seconds.items()}
