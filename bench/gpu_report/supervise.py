"""Parts of the sheet in processes of their own: one that crashes or hangs costs itself alone.

Parent and child write to the same file in turns: the parent only while no child runs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import Json, load, save
from bench.gpu_report import rows, table
from bench.gpu_report.case import Case

ROW = 90.0  # seconds; a row without news for so long hangs; compiling takes some of it
LAST_START = 30.0  # seconds before the end, after which no row is begun

Make = Callable[[bool], list[Case]]


def in_a_process(
    work: Callable[..., None], out: Path, end: float, *given: Any, row: float
) -> str | None:
    """Run ``work(out, *given, end)``, and say how it ended; None where all went well.

    It is stopped at the end, or where it has written nothing for ``row`` seconds.
    """
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(out, *given, end))
    why = None
    save(out, load(out))  # its clock starts now
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.1)
            if time.time() > min(out.stat().st_mtime + row, end):
                why = "stopped: it took too long"
                worker.kill()
                worker.join()
    finally:
        worker.kill()
    return why or (
        f"its process ended with exit code {worker.exitcode}" if worker.exitcode else None
    )


def measure_rows(
    out: Path, device: str, quick: bool, make: Make, end: float, last: bool = True
) -> None:
    """Have the rows that wait measured, by another worker where one dies or is stuck.

    Those that wait at the end are skipped if it is the last time that rows are measured.
    """
    while (waiting := _waiting(out)) and time.time() < end - LAST_START:
        why = in_a_process(work, out, end, device, quick, make, row=ROW)
        record, late = load(out), time.time() > end - LAST_START
        stuck = not late and _waiting(out) == waiting
        for row in record["rows"]:
            if row["status"] == "running" and late and not last:
                row["status"] = "waiting"  # it is begun again, with more time
            elif row["status"] == "running" or (row["status"] == "waiting" and stuck):
                row.update(status="error", why=why or "its process ended without it")
                print(f"{row['name']}, {row['shape']}: {row['why']}", flush=True)
        save(out, record)
    if last:
        record = load(out)
        for row in record["rows"]:
            if row["status"] == "waiting":
                row.update(status="skipped", why="no time was left")
        save(out, record)


def _waiting(out: Path) -> int:
    return sum(row["status"] == "waiting" for row in load(out)["rows"])


def work(out: Path, device: str, quick: bool, make: Make, end: float) -> None:
    """Measure the rows that wait, until the device is lost or it is late."""
    record = load(out)
    parent = multiprocessing.parent_process()
    for row, case in zip(record["rows"], make(quick), strict=True):
        if row["status"] != "waiting" or (parent and not parent.is_alive()):
            continue
        if time.time() > end - LAST_START:
            return
        row["status"] = "running"
        save(out, record)
        given = record["ceilings"] or {}
        rows.measure(row, case, device, quick, given, lambda: save(out, record))
        save(out, record)
        why = "" if row["status"] == "not run" else row.get("why", "")
        print(*filter(None, (*table.line(row), why)), flush=True)
        if device == "cuda" and _lost(row):
            return


def _lost(row: Json) -> bool:
    """Whether this process can measure nothing more; the next one goes on."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(row.get("kernel", {}).get("spoiled"))
