"""Two records of times beside each other: what became faster or slower by more than the spread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from bench.common.machine import Json, load, seconds

KINDS = "the results of `make bench`, of `bench gpu-report` or of `bench peers`"
# They differ between any two runs and change no time by themselves.
_EXPECTED = {"date", "commit", "changed"}
_FEW = 5  # rounds, below which quartiles say little
_NOTE = """\
ratio: B's median over A's. Its interval: from B's lower end over A's upper to B's upper over A's
lower, where the ends lie half of the interquartile range from the median or, of fewer than five
rounds, are the fastest and slowest. Marked where it excludes 1; a single round has no interval."""


class BadRecord(Exception):
    """A file that can't be compared, in one line."""


def compare(a: Path, b: Path) -> str:
    """The page that ``python -m bench compare`` prints."""
    (kind, first), (other, second) = read(a), read(b)
    if kind != other:
        raise BadRecord(f"{b}: {other}; expected {kind}, as {a} has")
    try:
        x, y = times(kind, first), times(kind, second)
        lines = different(first["environment"], second["environment"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"{a} or {b}: {error!r}; expected {KINDS}") from None
    both = x.merge(y, left_index=True, right_index=True, suffixes=("_a", "_b"))
    if len(both):
        lines += [table(changes(both)), "", _NOTE]
    for path, own, rest in ((a, x.index, y.index), (b, y.index, x.index)):
        only = own[~own.isin(rest)]
        lines += ["", f"timed in {path} alone:", *(f"  {what}" for what in only)] * bool(len(only))
    return "\n".join(lines)


def read(path: Path) -> tuple[str, Json]:
    """What kind of record a file has, and the record."""
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
    raise BadRecord(f"{path}: another kind of record; expected {KINDS}")


def times(kind: str, record: Json) -> pd.DataFrame:
    """Seconds of everything that has a time, by what it is: the median and both ends.

    The ends are NaN of a single round.
    """
    rows = {"benchmarks": _benchmarks, "peers": _peers, "a GPU report": _gpu_report}[kind](record)
    frame = pd.DataFrame(rows, columns=["what", "median", "low", "high"])
    if frame.what.duplicated().any():
        raise ValueError(f"two of {frame.what[frame.what.duplicated()].iloc[0]}")
    return frame.set_index("what").astype(float)


Row = tuple[str, float, float, float]


def _benchmarks(record: Json) -> Iterator[Row]:
    for row in record["benchmarks"]:
        spread = [row[f"{name}_s"] for name in ("median", "iqr", "min", "max")]
        yield f"{row['group']}: {row['name']}", *ends(*spread, row["rounds"])


def _peers(record: Json) -> Iterator[Row]:
    """The time of all comparisons, of which some were made; none where a package failed."""
    identity = ("job", "n", "p", "layers", "cells", "dtype", "package", "metric")
    for row in record["rows"]:
        if row.get("seconds"):
            what = " ".join(_named(k, row[k]) for k in identity if row.get(k) is not None)
            rounds = np.array(row["seconds"]) * row["of"] / row["calls"]
            low, median, high = np.quantile(rounds, (0.25, 0.5, 0.75))
            yield what, *ends(median, high - low, rounds.min(), rounds.max(), len(rounds))


def _gpu_report(record: Json) -> Iterator[Row]:
    for row in record["rows"]:
        what = f"{row['name']} {row['shape']} {row['dtype']} {row['precision']}"
        for part in ("call", "kernel"):
            if "ms" in (found := row.get(part, {})):
                spread = [1e-3 * found.get(k, 0) for k in ("ms", "iqr_ms", "min_ms", "max_ms")]
                yield f"{what}, {part}", *ends(*spread, found.get("repeats", 1))


def _named(key: str, value: object) -> str:
    return f"{key}={value}" if key in ("n", "p", "layers", "cells") else str(value)


def ends(
    median: float, iqr: float, least: float, most: float, rounds: int
) -> tuple[float, float, float]:
    """The median, and what spreads around it: its quartiles' range or, of few rounds, all."""
    if rounds >= _FEW:
        return median, median - iqr / 2, median + iqr / 2
    return (median, least, most) if rounds > 1 else (median, np.nan, np.nan)


def different(a: Json, b: Json) -> list[str]:
    """A warning of what was not the same, device first."""
    keys = sorted({*a, *b} - _EXPECTED, key=lambda key: (key != "device", key))
    found = [f"  {k}: {a.get(k)} | {b.get(k)}" for k in keys if a.get(k) != b.get(k)]
    return ["WARNING: not measured under the same conditions (A | B):", *found, ""] if found else []


def changes(both: pd.DataFrame) -> pd.DataFrame:
    """The ratio of two medians, its interval, and whether that excludes 1; largest change first."""
    both["ratio"] = both.median_b / both.median_a
    both["from"] = (both.low_b / both.high_a).where(both.low_a > 0)
    both["to"] = (both.high_b / both.low_a).where(both.low_a > 0)
    both["mark"] = np.select([both["from"] > 1, both["to"] < 1], ["slower", "faster"], "")
    return both.sort_values("ratio", key=lambda ratio: -np.log(ratio).abs(), kind="stable")


def table(changed: pd.DataFrame) -> str:
    """What is in `changes`, for a terminal."""
    interval = changed["from"].map("{:.2f} to ".format) + changed["to"].map("{:.2f}".format)
    columns = {
        "A": changed.median_a.map(seconds),
        "B": changed.median_b.map(seconds),
        "ratio": changed.ratio.map("{:.2f}".format),
        "interval": interval.where(changed["from"].notna(), ""),
        " ": changed["mark"],
    }
    return pd.DataFrame(columns).rename_axis(None).to_string()
