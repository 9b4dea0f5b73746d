"""Peak memory of this process, as counted by the system."""

from __future__ import annotations

from pathlib import Path

from repsim_kernels.forward.memory import trim_heap


def start_peak() -> int:
    """Return free memory to the system, reset the peak, and return the bytes in use now."""
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_peak() -> int:
    """Return the most bytes in use since `start_peak`."""
    return read_status("VmHWM")


def read_status(name: str) -> int:
    """Return a byte count of this process from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status")
