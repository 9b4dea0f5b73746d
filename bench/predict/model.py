"""MODEL.md: the predicted cost of each kernel on an H200, and what the compiler produced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter

import torch
import triton

from bench.predict import device_estimates
from bench.predict.compile import CompiledKernel, build, list_cases
from repsim_kernels.kernels.triton._launch import CompileCase, Floor

ARCH = 90
BYTES = 4.3e12  # per second: a large copy, measured on an H200 (its data sheet says 4.8e12)
# Operations per second by precision. TF32: half of the 770-800 TFLOP/s measured for bfloat16.
OPERATIONS = {"tf32": 400e12, "tf32x3": 400e12 / 3, "ieee": 60e12}

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
* **µs**: the larger of bytes / 4.3 TB/s and operations / rate; **bound**: which of the two is
  larger. 4.3 TB/s is the rate of a large copy on an H200. The rates are assumed: 400 TFLOP/s for
  TF32 products, a third of that for tf32x3, which needs three products, and 60 TFLOP/s for
  all other operations (ieee). Host work and kernel launches, a few µs each, are not included.
* **kernels**: the kernels that the call launches; the columns to the right have one entry per
  kernel. **tensor cores**: the tensor-core instruction used (DMMA is float64).
* **blocks**: the number of blocks that fit on a multiprocessor at once, limited by registers,
  shared memory and warps; **occupancy**: the share of its 64 warps that they fill.
"""

# Title, alignment, and the function that formats the entry for a case or for each of its kernels.
_CASE: list[tuple[str, str, Callable[[Floor], str]]] = [
    ("MB", "--:", lambda floor: _format_number(floor.bytes / 1e6)),
    ("Gop", "--:", lambda floor: _format_number(floor.operations / 1e9)),
    ("precision", "---", lambda floor: floor.precision),
    ("µs", "--:", lambda floor: _format_number(1e6 * predict(floor)[0])),
    ("bound", "---", lambda floor: predict(floor)[1]),
]
_KERNEL: list[tuple[str, str, Callable[[CompiledKernel], str]]] = [
    ("kernels", "---", lambda kernel: kernel.name.strip("_").removesuffix("_kernel")),
    ("tensor cores", "---", lambda kernel: kernel.tensor_cores or "no"),
    ("registers", "--:", lambda kernel: str(kernel.registers)),
    ("shared KB", "--:", lambda kernel: _format_number(kernel.shared / 1024)),
    ("warps", "--:", lambda kernel: str(kernel.warps)),
    ("blocks", "--:", lambda kernel: str(blocks_per_multiprocessor(kernel))),
    ("occupancy", "--:", lambda k: f"{blocks_per_multiprocessor(k) * k.warps / 64:.0%}"),
]


def render_page() -> str:
    """Return the page as Markdown, with one table per module and one row per case."""
    titles, alignments = zip(*((t, a) for t, a, _ in [*_CASE, *_KERNEL]), strict=True)
    head = _HEAD.format(triton=triton.__version__, torch=torch.__version__.partition("+")[0])
    parts = [head]
    for module, group in groupby(list_cases(), key=itemgetter(0)):
        rows = [("case", *titles), ("---", *alignments), *(_make_row(case) for _, case in group)]
        parts.append("\n".join([f"## {module}\n", *map(_format_row, rows)]) + "\n")
    return "\n".join([*parts, device_estimates.describe_fits(), device_estimates.describe_stage()])


def predict(floor: Floor) -> tuple[float, str]:
    """Return the minimum seconds on an H200, and whether bytes or operations bound them."""
    memory, arithmetic = floor.bytes / BYTES, floor.operations / OPERATIONS[floor.precision]
    return max((memory, "bytes"), (arithmetic, "operations"))


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
    kernels = build(case, ARCH)
    return (
        case.name,
        *(entry(case.floor) for _, _, entry in _CASE),
        *(" / ".join(map(entry, kernels)) for _, _, entry in _KERNEL),
    )


def _format_row(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
