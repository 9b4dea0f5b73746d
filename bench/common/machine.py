"""What numbers belong to, and the files that hold them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import repsim_kernels

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def device_name(device: str) -> str:
    """A GPU's name, or a processor's with the cores that this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        facts = _cpuinfo()
        model = " ".join(re.sub(r"\(R\)|\(TM\)|CPU|@.*", "", facts["model name"]).split())
        if model == "Intel Xeon Processor":  # a virtual machine that hides its model
            model += f", family {facts['cpu family']} model {facts['model']}"
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def slug(device: str) -> str:
    """The device's name as part of a file's."""
    return file_part(device_name(device))


def file_part(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str, packages: tuple[str, ...] = ()) -> Json:
    """Device, versions and commit; ``packages`` are named beside those that compute."""
    # Records and what is made of them are no code: one may follow the other.
    made = (":!bench/results", ":!*.md")
    edits = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *made)
    found: Json = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": None if edits is None else edits != "",
        "repsim-kernels": repsim_kernels.__version__,
    }
    for name in ("numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", *packages):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        found["host"] = device_name("cpu")
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        values = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")
        found.update(zip(query.split(","), (values or "").split(", "), strict=False))
    return found


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def save(out: Path, record: Json) -> None:
    """Replace the file at once."""
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, out)


def load(out: Path) -> Json:
    record: Json = json.loads(out.read_text())
    return record


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):,g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
