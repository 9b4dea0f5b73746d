"""Compare two records of times: what became faster or slower by more than the spread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from bench.common.machine import Json, format_seconds, load

KINDS = "the results of `make bench`, of `bench gpu-report` or of `bench peers`"
# Facts that differ between any two runs without affecting the times.
_EXPECTED = {"date", "commit", "changed"}
_FEW = 5  # rounds; with fewer, quartiles are meaningless
_NOTE = """\
ratio: B's median divided by A's. Its interval: B's lower end divided by A's upper end, to B's upper
end divided by A's lower end. The ends are half an interquartile range from the median or, with
fewer than five rounds, the fastest and slowest. Marked if the interval excludes 1; a single round
has no interval."""


class BadRecord(Exception):
    """A file that can't be compared; the message is one line."""


def compare_records(a: Path, b: Path) -> str:
    """Return the text that ``python -m bench compare`` prints."""
    (kind, first), (other, second) = read_record(a), read_record(b)
    if kind != other:
        raise BadRecord(f"{b}: holds {other}; expected {kind}, like {a}")
    try:
        x, y = extract_times(kind, first), extract_times(kind, second)
        lines = list_differences(first["environment"], second["environment"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"{a} or {b}: {error!r}; expected {KINDS}") from None
    both = x.merge(y, left_index=True, right_index=True, suffixes=("_a", "_b"))
    if len(both):
        lines += [format_table(compute_changes(both)), "", _NOTE]
    for path, names, rest in ((a, x.index, y.index), (b, y.index, x.index)):
        only = names[~names.isin(rest)]
        lines += ["", f"timed only in {path}:", *(f"  {what}" for what in only)] * bool(len(only))
    return "\n".join(lines)


def read_record(path: Path) -> tuple[str, Json]:
    """Return the kind of record in a file, and the record."""
    try:
        record = load(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise BadRecord(f"{path}: {why}; expected {KINDS}") from None
    if isinstance(record, dict) and isinstance(record.get("environment"), dict):
        if isinstance(record.get("benchmarks"), list):
            return "benchmarks", record
        rows = record.get("rows")
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            for column, kind in (("package", "peers"), ("precision", "a GPU report")):
                if column in rows[0]:
                    return kind, record
    raise BadRecord(f"{path}: unknown kind of record; expected {KINDS}")


def extract_times(kind: str, record: Json) -> pd.DataFrame:
    """Return the median and both ends, in seconds, of everything that was timed, by its name.

    The ends are NaN for a single round.
    """
    readers = {
        "benchmarks": _iter_benchmarks,
        "peers": _iter_peers,
        "a GPU report": _iter_gpu_report,
    }
    frame = pd.DataFrame(readers[kind](record), columns=["what", "median", "low", "high"])
    if frame.what.duplicated().any():
        raise ValueError(f"duplicate entry: {frame.what[frame.what.duplicated()].iloc[0]}")
    return frame.set_index("what").astype(float)


Row = tuple[str, float, float, float]


def _iter_benchmarks(record: Json) -> Iterator[Row]:
    for row in record["benchmarks"]:
        median, iqr, least, most = (row[f"{name}_s"] for name in ("median", "iqr", "min", "max"))
        what = f"{row['group']}: {row['name']}"
        yield what, *spread_ends(median, iqr, least, most, row["rounds"])


def _iter_peers(record: Json) -> Iterator[Row]:
    """Yield the times of whole jobs, scaled up from samples; failed packages have none."""
    identity = ("job", "n", "p", "layers", "cells", "dtype", "package", "metric")
    for row in record["rows"]:
        if row.get("seconds"):
            what = " ".join(_format_fact(k, row[k]) for k in identity if row.get(k) is not None)
            rounds = np.array(row["seconds"]) * row["of"] / row["calls"]
            low, median, high = np.quantile(rounds, (0.25, 0.5, 0.75))
            yield what, *spread_ends(median, high - low, rounds.min(), rounds.max(), len(rounds))


def _iter_gpu_report(record: Json) -> Iterator[Row]:
    for row in record["rows"]:
        what = f"{row['name']} {row['shape']} {row['dtype']} {row['precision']}"
        what += ", WRONG" if row.get("status") == "WRONG" else ""  # not comparable with a right one
        for part in ("call", "kernel"):
            if "ms" in (times := row.get(part, {})):
                keys = ("ms", "iqr_ms", "min_ms", "max_ms")
                median, iqr, least, most = (1e-3 * times.get(key, 0) for key in keys)
                rounds = times.get("repeats", 1)
                yield f"{what}, {part}", *spread_ends(median, iqr, least, most, rounds)


def _format_fact(key: str, value: object) -> str:
    return f"{key}={value}" if key in ("n", "p", "layers", "cells") else str(value)


def spread_ends(
    median: float, iqr: float, least: float, most: float, rounds: int
) -> tuple[float, float, float]:
    """Return the median and the ends of its spread: quartiles or, for few rounds, extremes."""
    if rounds >= _FEW:
        return median, median - iqr / 2, median + iqr / 2
    return (median, least, most) if rounds > 1 else (median, np.nan, np.nan)


def list_differences(a: Json, b: Json) -> list[str]:
    """Return a warning that lists differing conditions, the device first."""
    keys = sorted({*a, *b} - _EXPECTED, key=lambda key: (key != "device", key))
    lines = [f"  {k}: {a.get(k)} | {b.get(k)}" for k in keys if a.get(k) != b.get(k)]
    return ["WARNING: not measured under the same conditions (A | B):", *lines, ""] if lines else []


def compute_changes(both: pd.DataFrame) -> pd.DataFrame:
    """Add the ratio of medians, its interval and a mark if it excludes 1; largest change first."""
    both["ratio"] = both.median_b / both.median_a
    both["from"] = (both.low_b / both.high_a).where(both.low_a > 0)
    both["to"] = (both.high_b / both.low_a).where(both.low_a > 0)
    both["mark"] = np.select([both["from"] > 1, both["to"] < 1], ["slower", "faster"], "")
    return both.sort_values("ratio", key=lambda ratio: -np.log(ratio).abs(), kind="stable")


def format_table(changed: pd.DataFrame) -> str:
    """Format the result of `compute_changes` for a terminal."""
    interval = changed["from"].map("{:.2f} to ".format) + changed["to"].map("{:.2f}".format)
    columns = {
        "A": changed.median_a.map(format_seconds),
        "B": changed.median_b.map(format_seconds),
        "ratio": changed.ratio.map("{:.2f}".format),
        "interval": interval.where(changed["from"].notna(), ""),
        " ": changed["mark"],
    }
    return pd.DataFrame(columns).rename_axis(None).to_string()
