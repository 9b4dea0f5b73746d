"""Two records of times beside each other: what became faster or slower by more than the spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common.machine import Json, load, seconds

KINDS = "the results of `make bench`, of `bench sheet` or of `bench peers`"
# They differ between any two runs and change no time by themselves.
_EXPECTED = {"date", "commit", "changed"}
_FEW = 5  # rounds, below which quartiles say little


class BadRecord(Exception):
    """A file that can't be compared, in one line."""


@dataclass(frozen=True)
class Time:
    """Seconds: the median and, where there were several rounds, how low and high they spread."""

    median: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, row: Json, unit: str) -> Time:
        """From a row with medians, interquartile ranges and extremes in ``unit``.

        Half of the interquartile range to either side; of few rounds, the fastest and slowest.
        """
        scale = {"s": 1.0, "ms": 1e-3}[unit]
        median = float(row["ms"] if unit == "ms" else row["median_s"])
        rounds = int(row.get("repeats", row.get("rounds", 1)))
        low = high = None
        if rounds >= _FEW:
            half = row[f"iqr_{unit}"] / 2
            low, high = median - half, median + half
        elif rounds > 1:
            low, high = row[f"min_{unit}"], row[f"max_{unit}"]
        spread = None if low is None or high is None else (scale * low, scale * high)
        return cls(scale * median, *(spread or ()))

    @classmethod
    def of_rounds(cls, seconds: list[float]) -> Time:
        if len(seconds) == 1:
            return cls(seconds[0])
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        row = {"median_s": statistics.median(seconds), "iqr_s": high - low, "rounds": len(seconds)}
        return cls.of(row | {"min_s": min(seconds), "max_s": max(seconds)}, "s")


@dataclass(frozen=True)
class Change:
    """One row of the table."""

    what: str
    a: Time
    b: Time

    @property
    def ratio(self) -> float:
        return self.b.median / self.a.median

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ratio of B's low to A's high, and of B's high to A's low."""
        a, b = self.a, self.b
        if a.low is None or a.high is None or b.low is None or b.high is None or a.low <= 0:
            return None
        return b.low / a.high, b.high / a.low

    @property
    def mark(self) -> str:
        low, high = self.interval or (0.0, math.inf)
        return "slower" if low > 1 else "faster" if high < 1 else ""


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
    both = [Change(what, x[what], y[what]) for what in x if what in y]
    both.sort(key=lambda c: -abs(math.log(c.ratio)))
    if both:
        lines += [*table(both), "", _NOTE]
    for path, own, rest in ((a, x, y), (b, y, x)):
        only = [what for what in own if what not in rest]
        lines += ["", f"timed in {path} alone:", *(f"  {what}" for what in only)] if only else []
    return "\n".join(lines)


_NOTE = """\
ratio: B's median over A's. Its interval: from B's lower end over A's upper to B's upper over A's
lower, where the ends lie half of the interquartile range from the median or, of fewer than five
rounds, are the fastest and slowest. Marked where it excludes 1; a single round has no interval."""


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
            if "package" in rows[0]:
                return "peers", record
            if "precision" in rows[0]:
                return "a sheet", record
    raise BadRecord(f"{path}: another kind of record; expected {KINDS}")


def times(kind: str, record: Json) -> dict[str, Time]:
    """The time of everything that has one, by what it is."""
    found: dict[str, Time] = {}
    for what, time in {"benchmarks": _benchmarks, "peers": _peers, "a sheet": _sheet}[kind](record):
        if what in found:
            raise ValueError(f"two of {what}")
        found[what] = time
    return found


def _benchmarks(record: Json) -> Iterator[tuple[str, Time]]:
    for row in record["benchmarks"]:
        yield f"{row['group']}: {row['name']}", Time.of(row, "s")


def _peers(record: Json) -> Iterator[tuple[str, Time]]:
    """The time of all comparisons, of which some were made; none where a package failed."""
    identity = ("job", "n", "p", "layers", "cells", "dtype", "package", "metric")
    for row in record["rows"]:
        if row.get("seconds"):
            what = " ".join(_named(k, row[k]) for k in identity if row.get(k) is not None)
            yield what, Time.of_rounds([s * row["of"] / row["calls"] for s in row["seconds"]])


def _sheet(record: Json) -> Iterator[tuple[str, Time]]:
    for row in record["rows"]:
        what = f"{row['name']} {row['shape']} {row['dtype']} {row['precision']}"
        for part in ("call", "kernel"):
            if "ms" in row.get(part, {}):
                yield f"{what}, {part}", Time.of(row[part], "ms")


def _named(key: str, value: object) -> str:
    return f"{key}={value}" if key in ("n", "p", "layers", "cells") else str(value)


def different(a: Json, b: Json) -> list[str]:
    """A warning of what was not the same, device first."""
    keys = sorted({*a, *b} - _EXPECTED, key=lambda key: (key != "device", key))
    found = [f"  {k}: {a.get(k)} | {b.get(k)}" for k in keys if a.get(k) != b.get(k)]
    return ["WARNING: not measured under the same conditions (A | B):", *found, ""] if found else []


def table(changes: list[Change]) -> list[str]:
    head = ("", "A", "B", "ratio", "interval", "")
    rows = [head]
    for c in changes:
        between = "{:.2f} to {:.2f}".format(*c.interval) if c.interval else ""
        rows.append(
            (c.what, seconds(c.a.median), seconds(c.b.median), f"{c.ratio:.2f}", between, c.mark)
        )
    width = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for what, *values, mark in rows:
        cells = (v.rjust(w) for v, w in zip(values, width[1:-1], strict=True))
        lines.append("  ".join([what.ljust(width[0]), *cells, mark]).rstrip())
    return lines
