"""The roofline: what each kernel can reach on a device, and what it was measured to reach."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bench.common.machine import RESULTS, Json, file_part, seconds

PREDICTED = "predictions only: nothing measured on a GPU yet"
UNMEASURED = "predictions only: this file has no measured row"
OURS = "repsim_kernels"
_PRODUCTS = ("tf32", "tf32x3", "ieee", "bfloat16", "float64")  # ceilings of operations
# Paul Tol's colours; an operation has one, whatever its shapes and dtypes are.
_COLOURS = (
    "#332288", "#cc3311", "#117733", "#0077bb", "#aa4499", "#999933", "#ee7733", "#44aa99",
    "#882255", "#666666", "#ddaa33", "#000000", "#6699cc", "#994455",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A call: the least that it moves and computes, and its seconds where it was measured."""

    group: str
    name: str
    bytes: int
    operations: dict[str, int]  # by the ceiling that they have
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
        """Operations a second."""
        return None if self.seconds is None else self.total / self.seconds


@dataclass(frozen=True)
class Roof:
    """A device's ceilings: bytes a second, and operations a second by their kind."""

    bytes: float
    operations: dict[str, float]

    def floor(self, point: Point) -> float:
        """The least seconds of a point."""
        computing = sum(count / self.operations[kind] for kind, count in point.operations.items())
        return max(point.bytes / self.bytes, computing)


@dataclass(frozen=True)
class Chart:
    """What is drawn."""

    device: str
    ceilings: str  # "assumed" or "measured"
    roof: Roof
    points: tuple[Point, ...]
    note: str = ""


def predictions() -> Chart:
    """Every case of the kernels on the H100 of MODEL.md."""
    from bench.predict import compile, model

    floors = [(module, case.name, case.floor) for module, case in compile.cases()]
    points = [
        Point(module, name, floor.bytes, _counted(floor.precision, floor.operations))
        for module, name, floor in floors
    ]
    roof = Roof(model.BYTES, model.OPERATIONS)
    return Chart("H100", "assumed", roof, _merged(points), PREDICTED)


def chart(record: Any) -> Chart:
    """What a GPU report or a file of benchmarks has measured; RuntimeError if it is neither."""
    rows = record.get("rows", record.get("benchmarks")) if isinstance(record, dict) else None
    if not isinstance(rows, list) or not isinstance(record.get("environment"), dict):
        raise RuntimeError("it is neither a GPU report nor a file of benchmarks")
    rates = record.get("ceilings") or {}
    if "copy" not in rates:
        raise RuntimeError("it has no ceilings")
    timed = not record.get("interpreted")  # an interpreter's times say nothing
    roof = Roof(rates["copy"], {kind: rates[kind] for kind in _PRODUCTS if kind in rates})
    try:
        made = [_of_report(r, timed) if "rows" in record else _of_benchmark(r) for r in rows]
        device = record["environment"]["device"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"a row of it is not one of ours: {error!r}") from None
    known = [p for p in made if p and p.bytes and set(p.operations) <= set(roof.operations)]
    note = "" if any(p.seconds for p in known) else UNMEASURED
    return Chart(device, "measured", roof, _merged(known), note)


def read(path: Path) -> Chart:
    """The chart of a file."""
    try:
        return chart(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"{path}: {' '.join(str(error).split())}") from None


def roofline(report: Path | None, out: Path | None) -> list[Path]:
    """Draw a file, or all GPU reports among the results, or the predictions if there are none."""
    files = [report] if report else sorted(RESULTS.glob("gpu_report-*.json"))
    charts = [read(path) for path in files]
    if report is None:
        charts = [c for c in charts if not c.note] or [predictions()]
    if out is not None and len(charts) > 1:
        raise RuntimeError(f"--out is for one of {len(charts)} reports: name it by --report")
    written = []
    for each in charts:
        name = "h100-predicted" if each.note == PREDICTED else file_part(each.device)
        written.append(out or RESULTS / f"roofline-{name}.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        draw(each).savefig(written[-1], dpi=170)
    return written


def _counted(kind: str, operations: int) -> dict[str, int]:
    return {kind: operations} if operations else {}


def _of_report(row: Json, timed: bool) -> Point:
    name = f"{row['shape']}, {row['dtype']}, {row['precision']}"
    timed = timed and row["status"] == "ok" and "ms" in row
    seconds = 1e-3 * row["ms"] if timed else None
    operations = _counted(row["precision"], row["operations"] or 0)
    return Point(row["name"], name, row["bytes"], operations, seconds)


def _of_benchmark(row: Json) -> Point | None:
    """A row of our own: what other ways move and compute is not known."""
    info = row["extra_info"]
    if row["name"] != OURS or not info.get("bytes"):
        return None
    on_device = info.get("on_device", {}).get("ms", info.get("events", {}).get("ms"))
    seconds = row["median_s"] if on_device is None else 1e-3 * on_device
    group, _, name = row["group"].partition(", ")
    return Point(group, name, info["bytes"], info.get("operations", {}), seconds)


def _merged(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points at the same place as one, its name what theirs have in common and what differs."""
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
    """The roofs, a number for each point, and what the numbers stand for."""
    points = sorted(chart.points, key=lambda p: p.group)
    height = 5.9 + 0.155 * -(-len(points) // 2)
    figure = Figure(figsize=(11, height))
    ax = figure.add_axes((0.075, 1 - 5.0 / height, 0.9, 4.5 / height))
    groups = list(dict.fromkeys(p.group for p in points))
    colours = {g: _COLOURS[i % len(_COLOURS)] for i, g in enumerate(groups)}
    placed = {i: p for i, p in enumerate(points, 1) if p.total}
    _roofs(ax, chart.roof, list(placed.values()))
    taken: list[Bbox] = []
    for p in placed.values():
        taken += _mark(ax, chart.roof, p, colours[p.group])
    for number, p in placed.items():
        _label(ax, chart.roof, number, p, colours[p.group], taken)
    title = f"Roofline, {chart.device}: ceilings {chart.ceilings}"
    ax.set_title(title, loc="left", weight="bold", size=11)
    inside: Any = {"transform": ax.transAxes, "va": "top"}
    if chart.note:
        ax.text(0.012, 0.965, chart.note, size=12, color="#cc3311", **inside)
    measured = any(p.seconds for p in points)
    marks = "hollow: what the ceilings allow" + "; filled: measured" * measured
    if len(placed) < len(points):
        marks += "; - in the list: moves bytes and computes nothing"
    ax.text(0.012, 0.90, marks, size=8, color="0.35", **inside)
    heads = "time, share of it that the ceilings need" if measured else "least time"
    figure.text(0.988, 1 - 5.55 / height, heads, size=7, color="0.35", ha="right")
    _legend(figure, chart.roof, points, colours, 1 - 5.75 / height, 0.155 / height)
    return figure


def _roofs(ax: Axes, roof: Roof, placed: Sequence[Point]) -> None:
    """The slope of the bytes, and a level for each kind of operations that is used."""
    levels = {k: v for k, v in roof.operations.items() if any(k in p.operations for p in placed)}
    lows = [p.intensity for p in placed] or [1.0]
    low, high = min(lows) / 3, max([*lows, *(v / roof.bytes for v in levels.values())]) * 12
    top = max(levels.values(), default=high * roof.bytes)
    bottom = min([low * roof.bytes, *(p.attained for p in placed if p.attained)]) / 2
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 1e12, 3 * top / 1e12))
    ax.set(xlabel="operations per byte", ylabel="TFLOP/s")
    slope = [low, top / roof.bytes]
    line: Any = {"color": "0.25", "linewidth": 1.6}
    ax.plot(slope, [x * roof.bytes / 1e12 for x in slope], **line)
    middle = (slope[0] * slope[1]) ** 0.5
    size, unit = (1e12, "TB/s") if roof.bytes >= 1e12 else (1e9, "GB/s")
    ax.annotate(
        f"{roof.bytes / size:.3g} {unit}", (middle, middle * roof.bytes / 1e12),
        xytext=(-14, 12), textcoords="offset points", ha="right", color="0.25",
    )  # fmt: skip
    for kind, level in levels.items():
        ax.plot([level / roof.bytes, high], [level / 1e12] * 2, **line)
        text: Any = {"ha": "right", "va": "bottom", "color": "0.25", "size": 9}
        ax.text(high / 1.05, 1.06 * level / 1e12, f"{kind}, {level / 1e12:.3g} TFLOP/s", **text)
    ax.grid(color="0.92", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def place(roof: Roof, point: Point) -> tuple[float, float]:
    """Where a point would be in its least time: operations per byte, and operations a second."""
    return point.intensity, point.total / roof.floor(point)


def _mark(ax: Axes, roof: Roof, point: Point, colour: str) -> list[Bbox]:
    """A point's marks, and where they are: no number may hide them."""
    x, best = place(roof, point)
    ax.plot(x, best / 1e12, "o", markerfacecolor="white", color=colour, markersize=6, zorder=3)
    if point.attained is not None:
        found = point.attained / 1e12
        ax.plot([x, x], [best / 1e12, found], color=colour, linewidth=0.9, zorder=2)
        ax.plot(x, found, "o", color=colour, markersize=6, zorder=4)
    centres = [ax.transData.transform((x, y / 1e12)) for y in (best, point.attained or best)]
    return [Bbox.from_bounds(a - 5, b - 5, 10, 10) for a, b in centres]


def _label(ax: Axes, roof: Roof, number: int, point: Point, colour: str, taken: list[Bbox]) -> None:
    """The number beside its mark, where no other number stands."""
    x, y = place(roof, point)
    x, y = ax.transData.transform((x, (point.attained or y) / 1e12))
    width, height = 6.0 * len(str(number)) + 2, 11.0
    for distance in range(12, 160, 4):
        for dx, dy in ((-0.7, 1), (0.7, -1), (-1, 0.2), (1, -0.3), (0.1, 1), (0, -1.1)):
            a, b = x + distance * dx, y + distance * dy
            box = Bbox.from_bounds(a - width / 2, b - height / 2, width, height)
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 3}
                at = ax.transData.inverted().transform([(x, y), (a, b)])
                ax.annotate(
                    str(number), at[0], xytext=at[1], color=colour, size=8, ha="center",
                    va="center", arrowprops={**arrow, "shrinkA": 0} if distance > 16 else None,
                )  # fmt: skip
                return


def _legend(
    figure: Figure, roof: Roof, points: Sequence[Point], colours: dict[str, str],
    top: float, line: float,
) -> None:  # fmt: skip
    half = -(-len(points) // 2)
    for i, p in enumerate(points):
        x, y = 0.02 + 0.49 * (i // half), top - line * (i % half)
        name = f"{p.group}: {p.name}"
        style: Any = {"size": 7, "color": colours[p.group]}
        figure.text(x + 0.018, y, f"{i + 1}" if p.total else "-", ha="right", **style)
        figure.text(x + 0.024, y, name if len(name) <= 78 else name[:77] + "…", **style)
        figure.text(x + 0.478, y, _time(roof, p), ha="right", **style)


def _time(roof: Roof, p: Point) -> str:
    """What a point takes at least, or what it took and the share of that which it had to."""
    least = roof.floor(p)
    return f"{seconds(p.seconds)}, {least / p.seconds:.0%}" if p.seconds else seconds(least)
