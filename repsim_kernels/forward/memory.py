"""How much memory there is, and what fits into it."""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repsim_kernels import _options
from repsim_kernels.errors import OptionError

_UNITS = {
    "B": 1,
    **{f"{prefix}iB": 1024**k for k, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**k for k, prefix in enumerate("kMGT", 1)},
}
_BUSY = 2**33  # bytes of a batch


def size(value: Any, name: str = "memory") -> int:
    """Bytes: a number of them, or text such as "8GiB", "500 MB".

    Raises
    ------
    OptionError
        Anything else, or less than a byte.
    """
    if not isinstance(value, str):
        return int(_options.number(value, name, low=1))
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = None if found is None else _UNITS.get(found[2] or "B")
    count = 0.0 if found is None or unit is None else float(found[1]) * unit
    if not 1 <= count < math.inf:
        raise OptionError(
            f"{name}: {_options.shown(value)}; expected bytes, or a size such as '8GiB' or '500MB'"
        )
    return int(count)


def free(device: torch.device) -> int:
    """Bytes that can be had on a device: what is unused, and what PyTorch keeps for itself."""
    if device.type == "cuda":
        unused = torch.cuda.mem_get_info(device)[0]
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(filter(None, (_machine(), _group())))


def resolve_budget(value: Any, device: torch.device) -> int:
    """The bytes that were asked for, or half of what is free."""
    return free(device) // 2 if value is None else size(value)


def for_a_batch(room: int, device: torch.device) -> int:
    """As much of a budget as runs together: what keeps a GPU busy, and is indexed by 32 bits."""
    return min(room, _BUSY) if device.type == "cuda" else room


class Batch(NamedTuple):
    """Cells, and of the stimuli those from `start` to `stop`, that run together."""

    cells: list[int]
    start: int
    stop: int


def fit(batch: Batch, rows: int, cells: int) -> list[Batch]:
    """A batch in parts of so many rows, cells x stimuli, and so many cells, at most.

    Cells are kept whole where one fits; else the stimuli of one cell are cut in equal parts.
    """
    n = batch.stop - batch.start
    count = max(1, min(cells, rows // n))
    parts = -(-n // max(1, min(rows, n)))
    edges = [batch.start + i * n // parts for i in range(parts + 1)]
    return [
        Batch(batch.cells[i : i + count], start, stop)
        for i in range(0, len(batch.cells), count)
        for start, stop in itertools.pairwise(edges)
    ]


def _machine() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
        found = re.search(r"MemAvailable:\s+(\d+) kB", text)
        if found is not None:
            return int(found[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group() -> int | None:
    """What the control group of this process leaves, if it has a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return max(1, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None
