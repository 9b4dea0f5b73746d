"""Roofline figures: the rate each kernel can reach on a device, and the rate it was measured at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bench.common.machine import RESULTS, Json, format_seconds, slugify

PREDICTED = "predictions only: nothing measured on a GPU yet"
UNMEASURED = "predictions only: this file has no measured rows"
OURS = "repsim_kernels"
# Each has its own ceiling.
PRECISIONS = ("tf32", "tf32x3", "ieee", "float16", "float16x3", "bfloat16", "float64")
# Paul Tol's colours, one per operation for all its shapes and dtypes.
_COLOURS = (
    "#332288", "#cc3311", "#117733", "#0077bb", "#aa4499", "#999933", "#ee7733", "#44aa99",
    "#882255", "#666666", "#ddaa33", "#000000", "#6699cc", "#994455",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A call: its minimum bytes and operations, and its seconds if it was measured."""

    group: str
    name: str
    bytes: int
    operations: dict[str, int]  # by the name of their ceiling
    seconds: float | None = None

    @property
    def total(self) -> int:
        return sum(self.operations.values())

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.total / self.bytes

    @property
    def attained(self) -> float | None:
        """Operations per second."""
        return None if self.seconds is None else self.total / self.seconds


@dataclass(frozen=True)
class Roof:
    """A device's ceilings: bytes per second, and operations per second by precision."""

    bytes: float
    operations: dict[str, float]

    def floor(self, point: Point) -> float:
        """Return the minimum seconds of a point."""
        computing = sum(count / self.operations[kind] for kind, count in point.operations.items())
        return max(point.bytes / self.bytes, computing)


@dataclass(frozen=True)
class Chart:
    """The contents of one figure."""

    device: str
    ceilings: str  # "assumed" or "measured"
    roof: Roof
    points: tuple[Point, ...]
    note: str = ""


def chart_predictions() -> Chart:
    """Return the chart of every kernel case on the H200 of MODEL.md."""
    from bench.predict import compile, h200

    floors = [(module, case.name, case.floor) for module, case in compile.list_cases()]
    points = [
        Point(module, name, floor.bytes, _by_precision(floor.precision, floor.operations))
        for module, name, floor in floors
    ]
    roof = Roof(h200.BYTES, h200.OPERATIONS)
    return Chart("H200", "assumed", roof, _merge(points), PREDICTED)


def chart_record(record: Any) -> Chart:
    """Return the chart of a GPU report or a benchmark file; raise RuntimeError if it is neither."""
    rows = record.get("rows", record.get("benchmarks")) if isinstance(record, dict) else None
    if not isinstance(rows, list) or not isinstance(record.get("environment"), dict):
        raise RuntimeError("neither a GPU report nor a benchmark file")
    rates = record.get("ceilings") or {}
    if "copy" not in rates:
        raise RuntimeError("has no ceilings")
    timed = not record.get("interpreted")  # times of Triton's interpreter are meaningless
    roof = Roof(rates["copy"], {kind: rates[kind] for kind in PRECISIONS if kind in rates})
    try:
        points = [
            _point_from_report(r, timed) if "rows" in record else _point_from_benchmark(r)
            for r in rows
        ]
        device = record["environment"]["device"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"has a row of an unknown format: {error!r}") from None
    known = [p for p in points if p and p.bytes and set(p.operations) <= set(roof.operations)]
    note = "" if any(p.seconds for p in known) else UNMEASURED
    return Chart(device, "measured", roof, _merge(known), note)


def read_chart(path: Path) -> Chart:
    """Return the chart of a file."""
    try:
        return chart_record(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"{path}: {' '.join(str(error).split())}") from None


def draw_rooflines(report: Path | None, out: Path | None) -> list[Path]:
    """Draw one file, or all GPU reports in bench/results, or the predictions if there are none."""
    files = [report] if report else sorted(RESULTS.glob("gpu_report-*.json"))
    charts = [read_chart(path) for path in files]
    if report is None:
        charts = [c for c in charts if not c.note] or [chart_predictions()]
    if out is not None and len(charts) > 1:
        raise RuntimeError(f"--out: there are {len(charts)} reports; choose one with --report")
    written = []
    for chart in charts:
        name = "h200-predicted" if chart.note == PREDICTED else slugify(chart.device)
        written.append(out or RESULTS / f"roofline-{name}.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        draw(chart).savefig(written[-1], dpi=170)
    return written


def _by_precision(precision: str, operations: int) -> dict[str, int]:
    return {precision: operations} if operations else {}


def _point_from_report(row: Json, timed: bool) -> Point:
    name = f"{row['shape']}, {row['dtype']}, {row['precision']}"
    timed = timed and row["status"] == "ok" and "ms" in row
    seconds = 1e-3 * row["ms"] if timed else None
    operations = _by_precision(row["precision"], row["operations"] or 0)
    return Point(row["name"], name, row["bytes"], operations, seconds)


def _point_from_benchmark(row: Json) -> Point | None:
    """Convert a row of this package; the bytes and operations of other methods are not known."""
    info = row["extra_info"]
    if row["name"] != OURS or not info.get("bytes"):
        return None
    on_device = info.get("on_device", {}).get("ms", info.get("events", {}).get("ms"))
    seconds = row["median_s"] if on_device is None else 1e-3 * on_device
    group, _, name = row["group"].partition(", ")
    return Point(group, name, info["bytes"], info.get("operations", {}), seconds)


def _merge(points: Sequence[Point]) -> tuple[Point, ...]:
    """Merge unmeasured points at the same place, joining the parts of their names that differ."""
    places: dict[Any, list[Point]] = {}
    for i, p in enumerate(points):
        place = (p.group, p.bytes, tuple(p.operations.items()), i if p.seconds else None)
        places.setdefault(place, []).append(p)
    merged = []
    for same in places.values():
        parts = zip(*(p.name.split(", ") for p in same), strict=False)
        name = ", ".join(" | ".join(dict.fromkeys(part)) for part in parts)
        merged.append(replace(same[0], name=name))
    return tuple(merged)


def draw(chart: Chart) -> Figure:
    """Draw the ceilings, a number for each point, and the list of what the numbers mean."""
    points = sorted(chart.points, key=lambda p: p.group)
    height = 5.9 + 0.155 * -(-len(points) // 2)
    figure = Figure(figsize=(11, height))
    ax = figure.add_axes((0.075, 1 - 5.0 / height, 0.9, 4.5 / height))
    groups = list(dict.fromkeys(p.group for p in points))
    colours = {g: _COLOURS[i % len(_COLOURS)] for i, g in enumerate(groups)}
    plotted = {i: p for i, p in enumerate(points, 1) if p.total}
    _draw_roofs(ax, chart.roof, list(plotted.values()))
    occupied: list[Bbox] = []
    for p in plotted.values():
        occupied += _draw_marks(ax, chart.roof, p, colours[p.group])
    for number, p in plotted.items():
        _draw_label(ax, chart.roof, number, p, colours[p.group], occupied)
    title = f"Roofline, {chart.device}: ceilings {chart.ceilings}"
    ax.set_title(title, loc="left", weight="bold", size=11)
    inside: Any = {"transform": ax.transAxes, "va": "top"}
    if chart.note:
        ax.text(0.012, 0.965, chart.note, size=12, color="#cc3311", **inside)
    measured = any(p.seconds for p in points)
    marks = "hollow: what the ceilings allow" + "; filled: measured" * measured
    if len(plotted) < len(points):
        marks += "; - in the list: moves bytes but computes nothing"
    ax.text(0.012, 0.90, marks, size=8, color="0.35", **inside)
    heading = "time, minimum time as a share of it" if measured else "minimum time"
    figure.text(0.988, 1 - 5.55 / height, heading, size=7, color="0.35", ha="right")
    _draw_legend(figure, chart.roof, points, colours, 1 - 5.75 / height, 0.155 / height)
    return figure


def _draw_roofs(ax: Axes, roof: Roof, points: Sequence[Point]) -> None:
    """Draw the memory slope, and a level for each precision that a point uses."""
    levels = {k: v for k, v in roof.operations.items() if any(k in p.operations for p in points)}
    lows = [p.intensity for p in points] or [1.0]
    low, high = min(lows) / 3, max([*lows, *(v / roof.bytes for v in levels.values())]) * 12
    top = max(levels.values(), default=high * roof.bytes)
    bottom = min([low * roof.bytes, *(p.attained for p in points if p.attained)]) / 2
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 1e12, 3 * top / 1e12))
    ax.set(xlabel="operations per byte", ylabel="TFLOP/s")
    slope = [low, top / roof.bytes]
    line: Any = {"color": "0.25", "linewidth": 1.6}
    ax.plot(slope, [x * roof.bytes / 1e12 for x in slope], **line)
    size, unit = (1e12, "TB/s") if roof.bytes >= 1e12 else (1e9, "GB/s")
    ax.annotate(
        f"{roof.bytes / size:.3g} {unit}", (low, low * roof.bytes / 1e12),
        xytext=(8, -8), textcoords="offset points", ha="left", color="0.25",
    )  # fmt: skip
    for kind, level in levels.items():
        ax.plot([level / roof.bytes, high], [level / 1e12] * 2, **line)
        text: Any = {"ha": "right", "va": "bottom", "color": "0.25", "size": 9}
        ax.text(high / 1.05, 1.06 * level / 1e12, f"{kind}, {level / 1e12:.3g} TFLOP/s", **text)
    ax.grid(color="0.92", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def bound_position(roof: Roof, point: Point) -> tuple[float, float]:
    """Return a point's position at its minimum time: operations per byte, and per second."""
    return point.intensity, point.total / roof.floor(point)


def _draw_marks(ax: Axes, roof: Roof, point: Point, colour: str) -> list[Bbox]:
    """Draw a point's marks and return their boxes, which no number may cover."""
    x, best = bound_position(roof, point)
    ax.plot(x, best / 1e12, "o", markerfacecolor="white", color=colour, markersize=6, zorder=3)
    if point.attained is not None:
        attained = point.attained / 1e12
        ax.plot([x, x], [best / 1e12, attained], color=colour, linewidth=0.9, zorder=2)
        ax.plot(x, attained, "o", color=colour, markersize=6, zorder=4)
    centres = [ax.transData.transform((x, y / 1e12)) for y in (best, point.attained or best)]
    return [Bbox.from_bounds(a - 5, b - 5, 10, 10) for a, b in centres]


def _draw_label(
    ax: Axes, roof: Roof, number: int, point: Point, colour: str, occupied: list[Bbox]
) -> None:
    """Draw a point's number near its mark, where it covers nothing."""
    x, y = bound_position(roof, point)
    x, y = ax.transData.transform((x, (point.attained or y) / 1e12))
    width, height = 6.0 * len(str(number)) + 2, 11.0
    for distance in range(12, 160, 4):
        for dx, dy in ((-0.7, 1), (0.7, -1), (-1, 0.2), (1, -0.3), (0.1, 1), (0, -1.1)):
            a, b = x + distance * dx, y + distance * dy
            box = Bbox.from_bounds(a - width / 2, b - height / 2, width, height)
            if not any(box.overlaps(other) for other in occupied):
                occupied.append(box)
                arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 3}
                at = ax.transData.inverted().transform([(x, y), (a, b)])
                ax.annotate(
                    str(number), at[0], xytext=at[1], color=colour, size=8, ha="center",
                    va="center", arrowprops={**arrow, "shrinkA": 0} if distance > 16 else None,
                )  # fmt: skip
                return


def _draw_legend(
    figure: Figure, roof: Roof, points: Sequence[Point], colours: dict[str, str],
    top: float, line: float,
) -> None:  # fmt: skip
    per_column = -(-len(points) // 2)
    for i, p in enumerate(points):
        x, y = 0.02 + 0.49 * (i // per_column), top - line * (i % per_column)
        name = f"{p.group}: {p.name}"
        style: Any = {"size": 7, "color": colours[p.group]}
        figure.text(x + 0.018, y, f"{i + 1}" if p.total else "-", ha="right", **style)
        figure.text(x + 0.024, y, name if len(name) <= 78 else name[:77] + "…", **style)
        figure.text(x + 0.478, y, _format_time(roof, p), ha="right", **style)


def _format_time(roof: Roof, p: Point) -> str:
    """Format a point's minimum time, or its measured time and the minimum as a share of it."""
    floor = roof.floor(p)
    if not p.seconds:
        return format_seconds(floor)
    return f"{format_seconds(p.seconds)}, {floor / p.seconds:.0%}"
