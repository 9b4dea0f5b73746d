"""Facts about the machine, which every record states, and the files of records."""

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


def get_device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the number of cores available here."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        facts = _read_cpuinfo()
        model = " ".join(re.sub(r"\(R\)|\(TM\)|CPU|@.*", "", facts["model name"]).split())
        if model == "Intel Xeon Processor":  # a virtual machine may hide the model
            model += f", family {facts['cpu family']} model {facts['model']}"
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _read_cpuinfo() -> dict[str, str]:
    """Return the first core's entries of /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def slugify_device(device: str) -> str:
    """Return the device's name in a form suitable for a file name."""
    return slugify(get_device_name(device))


def slugify(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_environment(device: str, packages: tuple[str, ...] = ()) -> Json:
    """Return device, versions and commit; ``packages`` adds versions of other packages."""
    # Records and the pages made from them are not code and may change without a new commit.
    excluded = (":!bench/results", ":!*.md")
    edits = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    facts: Json = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": None if edits is None else edits != "",
        "repsim-kernels": repsim_kernels.__version__,
    }
    for name in ("numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", *packages):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    if device == "cuda":
        facts["host"] = get_device_name("cpu")
        properties = torch.cuda.get_device_properties(0)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = properties.L2_cache_size
        facts["memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        values = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")
        facts.update(zip(query.split(","), (values or "").split(", "), strict=False))
    return facts


def _output(*command: str) -> str | None:
    """Return a command's output; None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def save(out: Path, record: Json) -> None:
    """Replace the file atomically."""
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, out)


def load(out: Path) -> Json:
    record: Json = json.loads(out.read_text())
    return record


def format_seconds(value: float) -> str:
    """Format a time with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):,g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def to_json_number(value: float) -> float | str:
    """Return a finite number as it is, others as text: JSON has no NaN or infinity."""
    return value if math.isfinite(value) else str(value)
