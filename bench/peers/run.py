"""Every package at every job, one process each, in turns: one JSON as it goes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np

from bench.common.machine import Json, environment, load, number, save
from bench.peers import jobs, tables
from bench.peers.jobs import Case
from bench.peers.packages import PACKAGES, Package
from bench.peers.worker import serve

_ROUNDS = 5  # at most; two at least
# Seconds of one answer at most, and of the sample of a long loop; quick or not.
_LIMITS = {True: (30.0, 0.2), False: (30.0, 2.5)}
# A turn takes at least so many of the latter, and all turns of a package at most.
_TURN, _TURNS = 0.1, 4
# A loop is timed whole, however long, by who is at most so many times slower than the fastest peer.
_NEAR = 1.5
# Where the inputs lie, in memory if it can be.
SHARED = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


class Failed(RuntimeError):
    """A package could not do a job: what it raised, how its process ended, or how long it took."""


class Served:
    """A package's process, started anew where it died."""

    def __init__(self, package: Package, device: str) -> None:
        self.package, self.device = package, device
        self.process: Any = None

    def ask(self, limit: float, name: str, *arguments: Any) -> Any:
        """What the worker answers within so many seconds."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection: Connection
            self.connection, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(self.package.key, self.device, theirs), daemon=True
            )
            process.start()
            self.process = process
            theirs.close()
        try:
            self.connection.send((name, arguments))
            if not self.connection.poll(limit):
                self.stop()
                raise Failed(f"took over {limit:.0f} s")
            ok, answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(10)
            code = self.process.exitcode
            self.stop()
            raise Failed(f"its process ended with exit code {code}") from None
        if not ok:
            raise Failed(answer)
        return answer

    def forget(self, limit: float) -> None:
        """Let a process that lives have no inputs."""
        if self.process is not None:
            with contextlib.suppress(Failed):
                self.ask(limit, "forget")

    def stop(self) -> None:
        """End the process: it does so itself, unless it is busy."""
        if self.process is not None:
            self.connection.close()
            self.process.join(1)
            self.process.kill()
            self.process.join()
            self.process = None


def peers(
    out: Path | None, device: str = "cpu", quick: bool = False, job: str | None = None
) -> Json:
    """Compare the packages; ``out`` is written as it goes, and the record given back.

    Of one job alone the rows are made anew, and those of the others stay as ``out`` has them.
    """
    if job is not None and job not in jobs.JOBS:
        raise RuntimeError(f"--job {job}: expected one of {', '.join(jobs.JOBS)}")
    distributions = sorted({package.distribution for package in PACKAGES} - {""})
    here = environment(device, tuple(distributions))
    record: Json = {
        "finished": False,
        "quick": quick,
        "environment": here,
        "packages": {package.key: package.note for package in PACKAGES},
        "rows": [],
    }
    if job and out and out.exists():
        record["rows"] = [row for row in load(out)["rows"] if row["job"] != job]
    served = {package.key: Served(package, device) for package in PACKAGES}
    try:
        for case in jobs.cases(quick):
            if job not in (None, case.job):
                continue
            with tempfile.TemporaryDirectory(dir=SHARED, prefix=f"repsim-{os.getpid()}-") as folder:
                for row in _case(case, Path(folder), served, device, quick):
                    row.update(commit=here["commit"], date=here["date"])
                    record["rows"].append(row)
                    why = f"{row['status']}: {row['why']}" if "why" in row else ""
                    entries = filter(None, [*tables.entries(record, row), why])
                    print(" | ".join(entries), flush=True)
            if out:
                save(out, record)
    finally:
        for each in served.values():
            each.stop()
    record["finished"] = True
    if out:
        save(out, record)
    return record


def _case(
    case: Case, folder: Path, served: dict[str, Served], device: str, quick: bool
) -> Iterator[Json]:
    """The rows of a case: all answer once, then those that are right are timed in turns."""
    limit, budget = _LIMITS[quick]
    paths = jobs.write_inputs(case, folder)
    some = [served[package.key] for package in PACKAGES if _takes_part(package, case)]
    xs = [np.load(path, mmap_mode="r") for path in paths]
    # The definitions take as long as a slow package: of many comparisons a few are checked.
    checked = jobs.sample(case, min(case.of, 4))
    wanted = {metric: jobs.wanted(case, xs, metric, checked) for metric in case.metrics}
    rows: list[tuple[Served, Json]] = []
    for each in some:
        package = each.package
        row: Json = {
            **case.facts(),
            "package": package.name,
            "metric": package.metric,
            "device": device if package.kind != "numpy" else "cpu",
            "centres": package.centres,
            "status": "ok",
        }
        rows.append((each, row))
        if package.kind == "cupy" and device != "cuda":
            row.update(status="not run", why="needs a CUDA device")
            continue
        try:
            answer = _first(each, case, paths, limit)
        except Failed as failure:
            row.update(status="failed", why=str(failure))
            continue
        row.update(answer.pop("how", {}))
        row.update(_agreement(case, package, answer, wanted[package.metric], checked))
        row["memory_bytes"] = max(0, answer["memory"])
        row["once"] = answer["seconds"] / answer["calls"] * case.of
        row["calls"] = case.of if answer["calls"] == case.of else 0  # 0: not decided yet
    _plan(case, rows, budget, quick)
    _in_turns([(s, row) for s, row in rows if "once" in row], limit, budget)
    for each, row in rows:
        row.pop("once", None)
        each.forget(limit)
        yield row


def _takes_part(package: Package, case: Case) -> bool:
    if package.metric not in case.metrics:
        return False
    return package.pair is not None or package.whole(case.job) is not None


def _first(each: Served, case: Case, paths: list[Path], limit: float) -> Json:
    """A package's first answer; where its own function for the whole job fails, by a loop."""
    try:
        return cast(Json, each.ask(limit, "first", case, paths))
    except Failed as failure:
        if each.package.pair is None or each.package.whole(case.job) is None:
            raise
        answer: Json = each.ask(limit, "first", case, paths, True)
        return answer | {"how": {"why": f"a loop: its function for the whole job {failure}"}}


def _agreement(
    case: Case, package: Package, answer: Json, wanted: np.ndarray, checked: list[int]
) -> Json:
    """How far the numbers are from the definition's: of similarities, and of distances."""
    values = answer["values"]
    if len(values) == case.of:
        got, want = values[checked], wanted
    else:  # a loop's first two comparisons are the sample's of two
        own = jobs.sample(case, len(values))
        common = [k for k in own if k in checked]
        got = np.array([values[own.index(k)] for k in common])
        want = np.array([wanted[checked.index(k)] for k in common])
    off = float(np.max(np.abs(got - want) / np.abs(want)))
    apart = float(np.max(np.abs(got - want) / np.maximum(np.abs(1 - want), 1e-300)))
    found: Json = {"error": number(off)}
    if case.job == "ablations":
        found["distance_error"] = number(apart)
    if not off <= package.tolerance:
        found["status"] = "differs" if package.differs else "wrong"
        found["why"] = package.differs or f"off by {off:.1e}"
    return found


def _plan(case: Case, rows: list[tuple[Served, Json]], budget: float, quick: bool) -> None:
    """Decide who makes all comparisons of a loop, and who a sample of them."""
    loops = [row for _, row in rows if row.get("calls") == 0]
    peer = min((row["once"] for row in loops), default=0.0)
    for row in loops:
        whole = row["once"] <= budget or (not quick and row["once"] <= _NEAR * peer)
        sampled = max(2, min(case.of, int(budget / row["once"] * case.of)))
        row["calls"] = case.of if whole else sampled


def _in_turns(rows: list[tuple[Served, Json]], limit: float, budget: float) -> None:
    """Time all, one after the other, again and again: what slows the machine slows all."""
    spent = dict.fromkeys(range(len(rows)), 0.0)
    for _, row in rows:
        row["seconds"] = []
    for turn in range(_ROUNDS):
        for k in range(len(rows)):
            i = (k + turn) % len(rows)
            each, row = rows[i]
            again = 0.0 if turn == 0 else spent[i] / turn
            if row["status"] == "failed" or (turn > 1 and spent[i] + again > _TURNS * budget):
                continue
            if turn == 1 and row["once"] > 10 * budget:
                continue
            try:
                seconds = each.ask(
                    max(limit, 3 * row["once"]), "time", row["calls"], _TURN * budget
                )
                row["seconds"].append(seconds)
                spent[i] += seconds
            except Failed as failure:
                row.update(status="failed", why=str(failure))
