"""Measure every package on every job, one process per package, in turns."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np

from bench.common.machine import Json, describe_environment, load, save, to_json_number
from bench.peers import jobs, tables
from bench.peers.jobs import Workload
from bench.peers.packages import PACKAGES, Package
from bench.peers.worker import serve

_ROUNDS = 5  # at most; slow packages get fewer
# By `quick`: maximum seconds for one answer, and the budget: seconds for the sample of a long loop.
_LIMITS = {True: (30.0, 0.2), False: (15.0, 2.5)}
# Minimum length of a turn, and maximum of all turns of a package, in units of the budget.
_TURN, _TURNS = 0.1, 4
# A long loop is timed completely if it is at most this many times slower than the fastest one.
_NEAR = 1.5
# Folder for the inputs, in memory if possible.
SHARED = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


class PackageError(RuntimeError):
    """A package could not do a job: it raised an error, its process died, or it took too long."""


class PackageProcess:
    """The worker process of a package, which is restarted if it dies."""

    def __init__(self, package: Package, device: str) -> None:
        self.package, self.device = package, device
        self.process: Any = None

    def ask(self, limit: float, name: str, *arguments: Any) -> Any:
        """Return the worker's answer; raise PackageError after ``limit`` seconds."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection: Connection
            self.connection, worker_end = context.Pipe()
            process = context.Process(
                target=serve, args=(self.package.key, self.device, worker_end), daemon=True
            )
            process.start()
            self.process = process
            worker_end.close()
        try:
            self.connection.send((name, arguments))
            if not self.connection.poll(limit):
                self.stop()
                raise PackageError(f"took over {limit:.0f} s")
            ok, answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(10)
            code = self.process.exitcode
            self.stop()
            raise PackageError(f"its process ended with exit code {code}") from None
        if not ok:
            raise PackageError(answer)
        return answer

    def forget(self, limit: float) -> None:
        """Let the worker release its inputs if it is running."""
        if self.process is not None:
            with contextlib.suppress(PackageError):
                self.ask(limit, "forget")

    def stop(self) -> None:
        """End the process: it exits when the connection closes, and is killed if it is busy."""
        if self.process is not None:
            self.connection.close()
            self.process.join(1)
            self.process.kill()
            self.process.join()
            self.process = None


def compare_packages(
    out: Path | None,
    device: str = "cpu",
    quick: bool = False,
    job: str | None = None,
    workloads: Sequence[Workload] | None = None,
) -> Json:
    """Compare the packages, saving the record to ``out`` after each workload; return it.

    ``workloads`` replaces those of ``bench peers``, and then a package may be missing.

    With ``job``, only the rows of that job are measured; ``out`` keeps the rows of the others.
    """
    if job is not None and job not in jobs.JOBS:
        raise RuntimeError(f"--job {job}: expected one of {', '.join(jobs.JOBS)}")
    distributions = sorted({package.distribution for package in PACKAGES} - {""})
    environment_facts = describe_environment(device, tuple(distributions))
    record: Json = {
        "finished": False,
        "quick": quick,
        "environment": environment_facts,
        "packages": {package.key: package.note for package in PACKAGES},
        "rows": [],
    }
    if job and out and out.exists():
        record["rows"] = [row for row in load(out)["rows"] if row["job"] != job]
    processes = {
        package.key: PackageProcess(package, device)
        for package in PACKAGES
        if workloads is None or _is_installed(package)
    }
    try:
        for workload in jobs.list_workloads(quick) if workloads is None else workloads:
            if job not in (None, workload.job):
                continue
            with tempfile.TemporaryDirectory(dir=SHARED, prefix=f"repsim-{os.getpid()}-") as folder:
                for row in _measure(workload, Path(folder), processes, device, quick):
                    row.update({key: environment_facts[key] for key in ("commit", "date")})
                    record["rows"].append(row)
                    why = f"{row['status']}: {row['why']}" if "why" in row else ""
                    entries = filter(None, [*tables.format_row(record, row), why])
                    print(" | ".join(entries), flush=True)
            if out:
                save(out, record)
    finally:
        for process in processes.values():
            process.stop()
    record["finished"] = True
    if out:
        save(out, record)
    return record


def _measure(
    workload: Workload,
    folder: Path,
    processes: dict[str, PackageProcess],
    device: str,
    quick: bool,
) -> Iterator[Json]:
    """Yield the rows of a workload: check every package once, then time them in turns."""
    limit, budget = _LIMITS[quick]
    paths = jobs.write_inputs(workload, folder)
    taking_part = [p for p in PACKAGES if _takes_part(p, workload)]
    participants = [processes[p.key] for p in taking_part if p.key in processes]
    for package in taking_part:
        if package.key not in processes:
            facts = {"package": package.name, "metric": package.metric, "device": device}
            why = f"{package.distribution} is not installed"
            yield {**workload.facts(), **facts, "status": "not run", "why": why}
    xs = [np.load(path, mmap_mode="r") for path in paths]
    # The definitions are as slow as a slow package, so only a few comparisons are checked.
    checked = jobs.sample_comparisons(workload, min(workload.n_comparisons, 4))
    expected = {m: jobs.compute_expected(workload, xs, m, checked) for m in workload.metrics}
    rows: list[tuple[PackageProcess, Json]] = []
    for process in participants:
        package = process.package
        row: Json = {
            **workload.facts(),
            "package": package.name,
            "metric": package.metric,
            "device": device if package.kind != "numpy" else "cpu",
            "centres": package.centres,
            "status": "ok",
        }
        rows.append((process, row))
        if package.kind == "cupy" and device != "cuda":
            row.update(status="not run", why="needs a CUDA device")
            continue
        try:
            answer = _ask_first(process, workload, paths, limit)
        except PackageError as failure:
            row.update(status="failed", why=str(failure))
            continue
        row.update(answer.pop("how", {}))
        row.update(_compute_errors(workload, package, answer, expected[package.metric], checked))
        row["memory_bytes"] = max(0, answer["memory"])
        total = workload.n_comparisons
        row["once"] = answer["seconds"] / answer["calls"] * total
        row["calls"] = total if answer["calls"] == total else 0  # 0: not decided yet
    _plan_calls(workload, rows, budget, quick)
    _time_in_turns([(process, row) for process, row in rows if "once" in row], limit, budget)
    for process, row in rows:
        row.pop("once", None)
        process.forget(limit)
        yield row


def _is_installed(package: Package) -> bool:
    try:
        return not package.distribution or bool(importlib.metadata.version(package.distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def _takes_part(package: Package, workload: Workload) -> bool:
    if package.metric not in workload.metrics:
        return False
    return package.pair is not None or package.job_function(workload.job) is not None


def _ask_first(
    process: PackageProcess, workload: Workload, paths: list[Path], limit: float
) -> Json:
    """Return a package's first answer, from a loop if its function for the job fails."""
    package = process.package
    try:
        return cast(Json, process.ask(limit, "start", workload, paths))
    except PackageError as failure:
        if package.pair is None or package.job_function(workload.job) is None:
            raise
        answer: Json = process.ask(limit, "start", workload, paths, True)
        return answer | {"how": {"why": f"a loop: its function for the whole job {failure}"}}


def _compute_errors(
    workload: Workload, package: Package, answer: Json, expected: np.ndarray, checked: list[int]
) -> Json:
    """Return the errors of similarities and distances, and a status if they are too large."""
    values = answer["values"]
    if len(values) == workload.n_comparisons:
        got, want = values[checked], expected
    else:  # the first two comparisons of a loop are a sample of two
        indices = jobs.sample_comparisons(workload, len(values))
        common = [k for k in indices if k in checked]
        got = np.array([values[indices.index(k)] for k in common])
        want = np.array([expected[checked.index(k)] for k in common])
    error = float(np.max(np.abs(got - want) / np.abs(want)))
    facts: Json = {"error": to_json_number(error)}
    if workload.job == "ablations":
        distances = np.maximum(np.abs(1 - want), 1e-300)
        facts["distance_error"] = to_json_number(float(np.max(np.abs(got - want) / distances)))
    if not error <= package.tolerance:
        facts["status"] = "differs" if package.differs else "wrong"
        facts["why"] = package.differs or f"off by {error:.1e}"
    return facts


def _plan_calls(
    workload: Workload, rows: list[tuple[PackageProcess, Json]], budget: float, quick: bool
) -> None:
    """Decide which loops make all comparisons, and which a sample of them."""
    total = workload.n_comparisons
    loops = [row for _, row in rows if row.get("calls") == 0]
    fastest = min((row["once"] for row in loops), default=0.0)
    for row in loops:
        complete = row["once"] <= budget or (not quick and row["once"] <= _NEAR * fastest)
        sampled = max(2, min(total, int(budget / row["once"] * total)))
        row["calls"] = total if complete else sampled


def _time_in_turns(rows: list[tuple[PackageProcess, Json]], limit: float, budget: float) -> None:
    """Time all packages in repeated rounds, so that a slow machine affects all of them."""
    spent = dict.fromkeys(range(len(rows)), 0.0)
    for _, row in rows:
        row["seconds"] = []
    for turn in range(_ROUNDS):
        for k in range(len(rows)):
            i = (k + turn) % len(rows)
            process, row = rows[i]
            expected = 0.0 if turn == 0 else spent[i] / turn
            if row["status"] == "failed" or (turn > 1 and spent[i] + expected > _TURNS * budget):
                continue
            if turn == 1 and row["once"] > 10 * budget:
                continue
            try:
                seconds = process.ask(
                    max(limit, 3 * row["once"]), "time_calls", row["calls"], _TURN * budget
                )
                row["seconds"].append(seconds)
                spent[i] += seconds
            except PackageError as failure:
                row.update(status="failed", why=str(failure))
