"""The sheet of a card: its ceilings, the GPU's tests, and error and time of every kernel.

Kernels run in a process of their own, so that one that crashes or hangs costs its row and no more.
The file is valid JSON at any moment: a run that is cut off keeps what it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import _cases, _table, _timing
from bench._case import Case

ROOT = Path(__file__).parent.parent

# Seconds. A whole run ends within 8 minutes; rows that would start late are skipped.
WHOLE, LAST_START, TESTS = 470.0, 440.0, 180.0
ROW = 90.0  # a row without news for so long hangs; compiling a kernel takes some of it

Make = Callable[[bool], list[Case]]
Json = dict[str, Any]


def sheet(out: Path, device: str = "cuda", quick: bool = False, make: Make = _cases.cases) -> Json:
    """Measure a device, write ``out`` as it goes, print a table; give the record back.

    ``quick`` takes tiny shapes and leaves the GPU's tests out. ``make`` gives the rows.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device; --device cpu --quick rehearses the sheet without one")
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: the kernels would not run on the GPU")
    end = time.time() + WHOLE
    record: Json = {
        "finished": False,
        "environment": environment(device),
        "ceilings": None,
        "tests": None,
        "rows": [_blank(case) for case in make(quick)],
    }
    save(out, record)
    record["ceilings"] = _timing.ceilings(device, quick, limit(quick))
    save(out, record)
    if device == "cuda":
        torch.cuda.empty_cache()
    record["tests"] = gpu_tests() if device == "cuda" and not quick else {"why": "no GPU, or quick"}
    save(out, record)
    _supervise(out, device, quick, make, end)
    record = load(out)
    record["finished"] = True
    save(out, record)
    _table.show(record)
    return record


def limit(quick: bool) -> float:
    """Seconds for the repetitions of one thing."""
    return 0.02 if quick else 2.0


def save(out: Path, record: Json) -> None:
    """Replace the file at once."""
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, out)


def load(out: Path) -> Json:
    record: Json = json.loads(out.read_text())
    return record


def environment(device: str) -> Json:
    """What the numbers belong to."""
    found: Json = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
    }
    for name in ("numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
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


def gpu_tests(limit: float = TESTS) -> Json:
    """Run the tests that need a GPU; those whose imports fail here don't stop the rest."""
    # Its own tests would run the sheet in the sheet.
    options = ("--continue-on-collection-errors", "--ignore=tests/test_sheet.py")
    arguments = ("-m", "pytest", "-m", "gpu", "-q", *options)
    start = time.time()
    # A file, not a pipe: whatever outlives a time limit must not hold this process.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        code = _wait(process, limit)
        # Interrupted, pytest still says what passed.
        for sent in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, sent)
                _wait(process, 10)
        output.seek(0)
        text = output.read()
    found: Json = {"command": "python " + " ".join(arguments), "seconds": time.time() - start}
    found |= {"exit_code": code, "counts": counts(text)}
    if code is None:
        found["why"] = f"stopped after {limit:g} s"
    if code != 0:
        found["tail"] = text.splitlines()[-80:]
    return found


def _wait(process: subprocess.Popen[str], seconds: float) -> int | None:
    """The exit code of a process; None if it still runs."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def counts(output: str) -> dict[str, int]:
    """Passed, failed, skipped … from the last line of pytest's output; empty if it has none."""
    lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s\b", line)]
    found = re.findall(r"(\d+) ([a-z]+)", lines[-1].rpartition(" in ")[0]) if lines else []
    return {"error" if what == "errors" else what: int(number) for number, what in found}


def _blank(case: Case) -> Json:
    return {
        "name": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "precision": case.precision,
        "bytes": case.bytes,
        "operations": case.operations,
        "tolerance": case.tolerance,
        "status": "waiting",
    }


def _supervise(out: Path, device: str, quick: bool, make: Make, end: float) -> None:
    """Have all rows measured, by another worker where one dies or is stuck."""
    context = multiprocessing.get_context("spawn")
    while waiting := _count(out, "waiting"):
        worker = context.Process(target=work, args=(out, device, quick, make, end))
        why = None
        save(out, load(out))
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.1)
                if time.time() > min(out.stat().st_mtime + ROW, end):
                    why = "stopped: it took too long"
                    worker.kill()
                    worker.join()
        finally:
            worker.kill()
        record = load(out)
        why = why or f"its process ended with exit code {worker.exitcode}"
        stuck = _count(out, "waiting") == waiting and time.time() < end
        for row in record["rows"]:
            if row["status"] == "running" or (row["status"] == "waiting" and stuck):
                row.update(status="error", why=why)
                print(f"{row['name']}, {row['shape']}: {why}", flush=True)
            elif row["status"] == "waiting" and time.time() > end:
                row.update(status="skipped", why="no time was left")
        save(out, record)


def _count(out: Path, status: str) -> int:
    return sum(row["status"] == status for row in load(out)["rows"])


def work(out: Path, device: str, quick: bool, make: Make, end: float) -> None:
    """Measure the rows that wait, until the device is lost."""
    record = load(out)
    parent = multiprocessing.parent_process()
    for row, case in zip(record["rows"], make(quick), strict=True):
        if row["status"] != "waiting" or (parent and not parent.is_alive()):
            continue
        if time.time() > end - WHOLE + LAST_START:
            row.update(status="skipped", why="no time was left")
            save(out, record)
            continue
        row["status"] = "running"
        save(out, record)
        measure(row, case, device, quick, record["ceilings"], lambda: save(out, record))
        save(out, record)
        print(*filter(None, _table.line(row)), row.get("why", ""), flush=True)
        if device == "cuda" and _lost(row):
            return


def _lost(row: Json) -> bool:
    """Whether this process can measure nothing more; the next one goes on."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(row.get("kernel", {}).get("spoiled"))


def measure(
    row: Json, case: Case, device: str, quick: bool, rates: Json, keep: Callable[[], None]
) -> None:
    """Fill in a row: the other routes, then the kernel's error, and its time if it is right."""
    bounds = {"bytes": case.bytes / rates["copy"]}
    if case.operations:
        bounds["operations"] = case.operations / rates[case.precision]
    row["bound"] = max(bounds, key=lambda what: bounds[what])
    row["floor_ms"] = 1e3 * bounds[row["bound"]]
    try:
        inputs = _timing.rotating(case.inputs, device)
        want = case.reference(*inputs[0])
        row["inputs"] = len(inputs)
    except Exception as error:
        row.update(status="error", why=f"its inputs or reference: {_said(error)}")
        return
    for name, route in case.routes.items():
        try:
            found = {"error": _number(relative_error(route(*inputs[0]), want, case.parts))}
            found |= _timing.measure(route, inputs, limit(quick))
        except Exception as error:
            found = {"why": _said(error)}
        row.setdefault("routes", {})[name] = found
        keep()
    times = {name: found["ms"] for name, found in row.get("routes", {}).items() if "ms" in found}
    if times:
        row["torch_route"] = min(times, key=lambda name: times[name])
        row["torch_ms"] = times[row["torch_route"]]
    if why := _no_kernels(device, quick):
        row.update(status="not run", why=why)
        return
    try:
        off = relative_error(_poisoned(case.kernel, *inputs[0]), want, case.parts)
        row["error"] = _number(off)
        if not off <= case.tolerance:
            row.update(status="WRONG", why="its error is above its tolerance, so it is not timed")
            return
        row["call"] = _timing.measure(case.kernel, inputs, limit(quick))
        row["ms"] = row["call"]["ms"]
        keep()
        if device == "cuda":
            row["kernel"] = _timing.on_device(case.kernel, inputs, row["ms"], limit(quick))
            row["ms"] = row["kernel"].get("ms", row["ms"])
        row["of_floor"] = row["floor_ms"] / row["ms"]
        if times:
            row["ratio"] = row["torch_ms"] / row["call"]["ms"]
        row["status"] = "ok"
    except Exception as error:
        row.update(status="error", why=_said(error))


def relative_error(got: Tensor, want: Tensor, parts: int = 1) -> float:
    """The largest relative Frobenius error of the parts; NaN if there is one."""
    if got.shape != want.shape:
        raise ValueError(f"its result is {tuple(got.shape)}, not {tuple(want.shape)}")
    if got.dtype == want.dtype and torch.equal(got, want):
        return 0.0
    got, want = (t.reshape(parts, -1).double() for t in (got, want))
    off, size = (torch.linalg.vector_norm(t, dim=1) for t in (got - want, want))
    return float((off / size.clamp(min=1e-300)).max())


def _poisoned(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The result of a call for which memory that nothing has written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def _no_kernels(device: str, quick: bool) -> str | None:
    """Why no kernel can run; None if they can."""
    if device == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "kernels need a CUDA device, or TRITON_INTERPRET=1 for a rehearsal"
    return None if quick else "the interpreter is for tiny shapes: add --quick"


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]
