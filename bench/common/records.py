"""What the pages say about a record: its device, versions, dates and commits."""

from __future__ import annotations

from bench.common.machine import Json


def describe_device(record: Json) -> str:
    """Return "device, torch version, date" of a record, for the line above its tables."""
    environment = record["environment"]
    host = f", host {environment['host']}" if "host" in environment else ""
    return f"{environment['device']}{host}, torch {environment['torch']}, {format_dates(record)}"


def _list_runs(record: Json) -> list[tuple[str, str | None]]:
    """Return (date, commit) of each measurement, newest first; rows may have their own."""
    rows = [row for row in record.get("rows", []) if "commit" in row] or [record["environment"]]
    rows.sort(key=lambda row: row["date"], reverse=True)
    return [(row["date"][:10], row["commit"]) for row in rows]


def format_dates(record: Json) -> str:
    days = [day for day, _ in _list_runs(record)]
    return days[0] if days[0] == days[-1] else f"{days[-1]} to {days[0]}"


def format_commits(record: Json) -> str:
    """Return the commits that were measured, newest first."""
    environment = record["environment"]
    suffix = {environment["commit"]: " + changes"} if environment["changed"] else {}
    commits = dict.fromkeys(commit for _, commit in _list_runs(record))
    return ", ".join((c[:7] if c else "unknown") + suffix.get(c, "") for c in commits)
