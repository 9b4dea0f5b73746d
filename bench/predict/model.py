"""MODEL.md: the predicted cost of each kernel on an H200, and what the compiler produced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter

import torch
import triton

from bench.predict import device_estimates
from bench.predict.budgets import describe_loops, shorten
from bench.predict.compile import CompiledKernel, build, list_cases
from bench.predict.h200 import BYTES, CLOCK, MULTIPROCESSORS, OPERATIONS, count_products
from repsim_kernels.kernels.triton._launch import CompileCase, Floor

ARCH = 90

_HEAD = """\
# Predicted cost of the kernels on an H200

**Nothing on this page was measured on a GPU.** These are predictions: no kernel has been run on
a GPU yet. Bytes, operations and times are arithmetic; the remaining columns describe the code that
the compiler generated for sm_90 (Triton {triton}, PyTorch {torch}). To regenerate the page, which
needs no GPU:

```
.venv/bin/python -m bench model
```

Each row is one call at a shape from the study.

* **MB**, **Gop**: the minimum memory traffic, and the number of operations (10⁹; a multiplication
  and an addition count as two).
* **bytes µs**: bytes / {bytes:.3g} TB/s, the rate of a large copy on an H200.
* **operations µs**: operations / rate. 770-800 TFLOP/s were measured on an H200 for bfloat16, so
  products of 16 bits are assumed to reach {half:.0f}, and TF32 {tf32:.0f}. A precision that ends in
  x3 needs three products, a third of the rate. All other operations (ieee) are assumed to reach
  {ieee:.0f} TFLOP/s.
* **issue µs**: the time in which the schedulers issue the product loop. A multiprocessor has four,
  each of which issues one instruction of one warp per cycle, so an iteration costs a block
  instructions x warps / 4 cycles. The iterations, operations / operations per iteration, are
  divided among 132 multiprocessors at {clock:.1f} GHz (assumed). If several kernels have products,
  the fastest counts. Without products below float64 there is no such time (-).
* **bound**: the largest of the three, which is the prediction. All of them are lower bounds. They
  leave out host work and launches, a few µs each; what precedes and follows the product loop;
  the padding of tiles (for n = 500, tiles of 64 compute 18 % more than counted here, tiles of 128
  31 % more); and the bandwidth of the L2 cache, which may limit tiles of 128 x 128 to about 65 % of
  the tensor cores' peak.
* **kernels**: the kernels that the call launches; the columns to the right have one entry per
  kernel. **tensor cores**: the tensor-core instruction used (DMMA is float64).
* **instructions**: per tensor-core instruction, in the product loop. **issue / tensor**: cycles in
  which the loop is issued, over cycles that it occupies the tensor cores, at 4096 operations of 16
  bits per cycle and multiprocessor and 2048 of TF32: the data sheet's 989 TFLOP/s at 1.83 GHz.
  Above 1, the tensor cores wait for the schedulers. The loop may occupy them for longer than its
  products need, because Triton repeats some products of tf32x3 in each group of warps.
* **blocks**: the number of blocks that fit on a multiprocessor at once, limited by registers,
  shared memory and warps; **occupancy**: the share of its 64 warps that they fill.
"""

# Title, alignment, and the function that formats the entry for a case or for each of its kernels.
_CASE: list[tuple[str, str, Callable[[Floor], str]]] = [
    ("MB", "--:", lambda floor: _format_number(floor.bytes / 1e6)),
    ("Gop", "--:", lambda floor: _format_number(floor.operations / 1e9)),
    ("precision", "---", lambda floor: floor.precision),
]
_TIMES = [("bytes µs", "--:"), ("operations µs", "--:"), ("issue µs", "--:"), ("bound", "---")]
_KERNEL: list[tuple[str, str, Callable[[CompiledKernel], str]]] = [
    ("kernels", "---", lambda kernel: shorten(kernel.name)),
    ("tensor cores", "---", lambda kernel: kernel.tensor_cores or "no"),
    ("instructions", "--:", lambda kernel: _describe_loop(kernel)[0]),
    ("issue / tensor", "--:", lambda kernel: _describe_loop(kernel)[1]),
    ("registers", "--:", lambda kernel: str(kernel.registers)),
    ("shared KB", "--:", lambda kernel: _format_number(kernel.shared / 1024)),
    ("warps", "--:", lambda kernel: str(kernel.warps)),
    ("blocks", "--:", lambda kernel: str(blocks_per_multiprocessor(kernel))),
    ("occupancy", "--:", lambda k: f"{blocks_per_multiprocessor(k) * k.warps / 64:.0%}"),
]


def render_page() -> str:
    """Return the page as Markdown, with one table per module and one row per case."""
    columns = [*((t, a) for t, a, _ in _CASE), *_TIMES, *((t, a) for t, a, _ in _KERNEL)]
    titles, alignments = zip(*columns, strict=True)
    head = _HEAD.format(
        triton=triton.__version__,
        torch=torch.__version__.partition("+")[0],
        bytes=BYTES / 1e12,
        half=OPERATIONS["bfloat16"] / 1e12,
        tf32=OPERATIONS["tf32"] / 1e12,
        ieee=OPERATIONS["ieee"] / 1e12,
        clock=CLOCK / 1e9,
    )
    parts = [head]
    for module, group in groupby(list_cases(), key=itemgetter(0)):
        rows = [("case", *titles), ("---", *alignments), *(_make_row(case) for _, case in group)]
        parts.append("\n".join([f"## {module}\n", *map(_format_row, rows)]) + "\n")
    estimates = device_estimates.describe_fits(), device_estimates.describe_stage()
    return "\n".join([*parts, describe_loops(ARCH), *estimates])


def predict(floor: Floor, issue: float | None = None) -> tuple[float, str]:
    """Return the minimum seconds on an H200, and the bound: bytes, operations or issue."""
    times = {
        "bytes": floor.bytes / BYTES,
        "operations": floor.operations / OPERATIONS[floor.precision],
        "issue": issue or 0.0,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def predict_issue(case: CompileCase) -> float | None:
    """Return the seconds in which an H200 issues a case's product loop.

    Several kernels with products share the work depending on the data: the fastest counts. Returns
    None if the number of iterations isn't known: without products below float64, or if an iteration
    has more of them than the precision needs.
    """
    products = count_products(case.floor.precision)
    kernels = build(case, ARCH) if case.products else ()
    seconds = [
        case.floor.operations / k.dots.operations * k.product_loop.issue_cycles(k.warps)
        for k in kernels
        if k.dots and k.dots.count <= products and len(k.product_loops) == 1
    ]
    return min(seconds, default=0) / (MULTIPROCESSORS * CLOCK) or None


def blocks_per_multiprocessor(kernel: CompiledKernel) -> int:
    """Return how many blocks an sm_90 multiprocessor holds at once."""
    registers = -(-32 * kernel.registers // 256) * 256  # per warp, allocated in units of 256
    return min(
        32,
        64 // kernel.warps,
        16_384 // registers * 4 // kernel.warps,  # each quarter has its own registers
        228 * 1024 // (kernel.shared + 1024),  # the system reserves 1 KB per block
    )


def _make_row(case: CompileCase) -> tuple[str, ...]:
    kernels, floor, issue = build(case, ARCH), case.floor, predict_issue(case)
    return (
        case.name,
        *(entry(floor) for _, _, entry in _CASE),
        _format_number(1e6 * floor.bytes / BYTES),
        _format_number(1e6 * floor.operations / OPERATIONS[floor.precision]),
        "-" if issue is None else _format_number(1e6 * issue),
        predict(floor, issue)[1],
        *(" / ".join(map(entry, kernels)) for _, _, entry in _KERNEL),
    )


def _describe_loop(kernel: CompiledKernel) -> tuple[str, str]:
    """Return instructions per tensor-core instruction, and issue over tensor cycles."""
    if len(kernel.product_loops) != 1:
        return "-", "-"
    loop = kernel.product_loop
    return _format_number(len(loop) / loop.products), f"{kernel.issue_share:.2f}"


def _format_row(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
