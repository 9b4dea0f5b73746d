"""How much memory is free, and how to split a batch to fit."""

from __future__ import annotations

import ctypes
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
_GPU_BATCH_BYTES = 2**33


def parse_size(value: Any, name: str = "memory") -> int:
    """Convert a size to bytes: a number, or text such as "8GiB" or "500 MB".

    Raises
    ------
    OptionError
        The value is not a size, or is below one byte.
    """
    if not isinstance(value, str):
        return int(_options.check_number(value, name, low=1))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = None if match is None else _UNITS.get(match[2] or "B")
    count = 0.0 if match is None or unit is None else float(match[1]) * unit
    if not 1 <= count < math.inf:
        text = _options.short_repr(value)
        raise OptionError(f"{name}: {text}; expected bytes, or a size such as '8GiB' or '500MB'")
    return int(count)


def format_bytes(count: int) -> str:
    """Return a size as text, such as "1.5 GiB"."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def get_free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device, including PyTorch's unused cache."""
    if device.type == "cuda":
        unused = torch.cuda.mem_get_info(device)[0]
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(filter(None, (_read_machine_bytes(), _read_cgroup_bytes())))


def trim_heap() -> None:
    """Return freed memory to the system, where glibc manages it.

    Freed tensors of less than 32 MiB stay on its heap, which larger tensors can't use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resolve_budget(value: Any, device: torch.device) -> int:
    """Return the requested bytes; half of the free memory if the value is None."""
    return get_free_bytes(device) // 2 if value is None else parse_size(value)


def resolve_batch_budget(value: Any, device: torch.device) -> int:
    """Return the bytes of one batch: as `resolve_budget`, but on CUDA at most 8 GiB.

    8 GiB keep a GPU busy, and tensors stay within 32-bit indexing.
    """
    budget = resolve_budget(value, device)
    return min(budget, _GPU_BATCH_BYTES) if device.type == "cuda" else budget


class Batch(NamedTuple):
    """Cells that run in one pass, over the images from `start` to `stop`."""

    cells: list[int]
    start: int
    stop: int


def split_to_fit(batch: Batch, rows: int, cells: int) -> list[Batch]:
    """Split a batch into parts of at most `rows` (cells x images) and at most `cells` cells.

    A cell keeps all its images together if they fit; otherwise its images are split into parts of
    equal size.
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


def _read_machine_bytes() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
        match = re.search(r"MemAvailable:\s+(\d+) kB", text)
        if match is not None:
            return int(match[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_cgroup_bytes() -> int | None:
    """Return the bytes left to this process's control group; None if it has no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return max(1, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None
