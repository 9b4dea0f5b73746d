"""The page of what kernels should cost on an H100: the least they do, and what was compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter

import torch
import triton

from bench.predict import device_estimates
from bench.predict.compile import Built, build, cases
from repsim_kernels.kernels.triton._launch import CompileCase, Floor

ARCH = 90
BYTES = 3.0e12  # a second
OPERATIONS = {"tf32": 400e12, "tf32x3": 400e12 / 3, "ieee": 60e12}  # a second, by the products

_HEAD = """\
# What the kernels should cost on an H100

**Nothing on this page was measured on a GPU.** Bytes, operations and times are arithmetic; the rest
is what the compiler made for sm_90 (Triton {triton}, PyTorch {torch}). To make the page again,
which needs no GPU:

```
.venv/bin/python -m bench model
```

Each row is a call at one of the study's shapes.

* **MB**, **Gop**: the least that goes to and from memory, and the operations (10⁹; a multiplication
  and an addition are two).
* **µs**: the larger of bytes / 3.0 TB/s and operations / rate; **bound**: which of the two it is.
  The rate, assumed like the bandwidth, is 400 TFLOP/s for TF32 products, a third of it for tf32x3,
  which takes three of them, and 60 TFLOP/s for everything else (ieee). What the host does and the
  start of each kernel, some µs, come on top.
* **kernels**: what the call starts; the columns behind have an entry for each. **tensor cores**:
  the instruction that multiplies on them (DMMA: float64).
* **blocks**: how many a multiprocessor holds at once, by registers, shared memory and warps;
  **occupancy**: their warps, of 64.
"""

# Title, alignment, and the entry of a case or of each of its kernels.
_CASE: list[tuple[str, str, Callable[[Floor], str]]] = [
    ("MB", "--:", lambda floor: _number(floor.bytes / 1e6)),
    ("Gop", "--:", lambda floor: _number(floor.operations / 1e9)),
    ("precision", "---", lambda floor: floor.precision),
    ("µs", "--:", lambda floor: _number(1e6 * predicted(floor)[0])),
    ("bound", "---", lambda floor: predicted(floor)[1]),
]
_KERNEL: list[tuple[str, str, Callable[[Built], str]]] = [
    ("kernels", "---", lambda kernel: kernel.name.strip("_").removesuffix("_kernel")),
    ("tensor cores", "---", lambda kernel: kernel.tensor_cores or "no"),
    ("registers", "--:", lambda kernel: str(kernel.registers)),
    ("shared KB", "--:", lambda kernel: _number(kernel.shared / 1024)),
    ("warps", "--:", lambda kernel: str(kernel.warps)),
    ("blocks", "--:", lambda kernel: str(blocks(kernel))),
    ("occupancy", "--:", lambda kernel: f"{blocks(kernel) * kernel.warps / 64:.0%}"),
]


def page() -> str:
    """The page as Markdown: a table for each module, a row for each case."""
    titles, alignments = zip(*((t, a) for t, a, _ in [*_CASE, *_KERNEL]), strict=True)
    head = _HEAD.format(triton=triton.__version__, torch=torch.__version__.partition("+")[0])
    parts = [head]
    for module, group in groupby(cases(), key=itemgetter(0)):
        rows = [("case", *titles), ("---", *alignments), *(_row(case) for _, case in group)]
        parts.append("\n".join([f"## {module}\n", *map(_line, rows)]) + "\n")
    return "\n".join([*parts, device_estimates.fits(), device_estimates.section()])


def predicted(floor: Floor) -> tuple[float, str]:
    """The seconds that an H100 needs at least, and what they are spent on."""
    memory, arithmetic = floor.bytes / BYTES, floor.operations / OPERATIONS[floor.precision]
    return max((memory, "bytes"), (arithmetic, "operations"))


def blocks(kernel: Built) -> int:
    """How many blocks a multiprocessor of sm_90 holds at once."""
    registers = -(-32 * kernel.registers // 256) * 256  # of a warp, in units of 256
    return min(
        32,
        64 // kernel.warps,
        16_384 // registers * 4 // kernel.warps,  # each quarter serves the registers of its warps
        228 * 1024 // (kernel.shared + 1024),  # 1 KB of each block is the system's
    )


def _row(case: CompileCase) -> tuple[str, ...]:
    kernels = build(case, ARCH)
    return (
        case.name,
        *(entry(case.floor) for _, _, entry in _CASE),
        *(" / ".join(map(entry, kernels)) for _, _, entry in _KERNEL),
    )


def _line(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
