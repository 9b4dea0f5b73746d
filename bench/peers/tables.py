"""What a comparison found, as Markdown tables and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.common.machine import Json, seconds

OURS = "repsim_kernels"
_LATE = "took over "
_COLOURS = {
    OURS: "#c1272d",
    "plain torch": "#0072b2",
    "plain torch, by parts": "#d179a6",
    "pytorch-cka": "#009e73",
    "torch-cka": "#56b4e9",
    "ckatorch": "#e69f00",
    "repsim": "#7b5ea7",
    "shesha-geometry": "#8c8c8c",
    "plain CuPy": "#222222",
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first column to the left."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def find(record: Json, **facts: Any) -> list[Json]:
    """The rows of a record that have these facts."""
    return [row for row in record["rows"] if all(row.get(k) == v for k, v in facts.items())]


def ablations(record: Json, metric: str) -> str:
    """All ablations of one layer: a column for each count of cells."""
    rows = find(record, job="ablations", metric=metric)
    counts = sorted({row["cells"] for row in rows})
    ours = find(record, job="ablations", metric=metric, package=OURS)
    table = []
    for name in dict.fromkeys(row["package"] for row in rows):
        own = [row for row in rows if row["package"] == name]
        times = [_time(row, base) for row, base in zip(own, ours, strict=True)]
        table.append([_name(record, own[-1]), *times, _memory(own[-1]), _error(own[-1])])
    head = ["", *(f"C = {c:,}" for c in counts), f"memory, C = {counts[-1]:,}", "error"]
    return markdown(head, table)


def pairs(record: Json, metric: str) -> str:
    """All pairs of layers."""
    rows = find(record, job="pairs", metric=metric)
    (ours,) = (row for row in rows if row["package"] == OURS)
    table = [
        [_name(record, row), _time(row, ours), _memory(row), _error(row), _how(record, row)]
        for row in rows
    ]
    return markdown(["", "time", "memory", "error", "how"], table)


def one_pair(record: Json, metric: str) -> str:
    """One pair: ours, the fastest peer that centres its features, and the fastest of all.

    Wrong answers count, and are said to be; those of another definition don't.
    """
    table = []
    for row in find(record, job="pair", metric=metric, package=OURS):
        others = [
            other
            for other in find(record, job="pair", metric=metric, n=row["n"], p=row["p"])
            if other["package"] != OURS and other["status"] in ("ok", "wrong") and _taken(other)
        ]
        others.sort(key=lambda other: _taken(other) or 0.0)
        centring = [other for other in others if other["centres"]]
        fastest = [*_fastest(record, row, centring), *_fastest(record, row, others)]
        table.append([_shape(row), _time(row, row), *fastest, _memory(row)])
    head = ["n x p", "ours", "fastest that centres", "ratio", "fastest of all", "ratio", "memory"]
    return markdown(head, table)


def failures(record: Json) -> str:
    """What could not be done, was done otherwise or gave other numbers, and why."""
    table: dict[tuple[str, str, str], list[str]] = {}
    for row in record["rows"]:
        if "why" in row:
            status = "" if row["status"] == "ok" else f"{row['status']}: "
            key = (row["package"], row["metric"], f"{status}{row['why']}")
            table.setdefault(key, []).append(_shape(row))
    rows = [[*key, "; ".join(shapes)] for key, shapes in table.items()]
    return markdown(["package", "metric", "what", "where"], rows)


def everything(record: Json) -> str:
    """Every row, for who wants to see for themselves."""
    head = ["job", "size", "metric", "package", "median", "all rounds", "timed", "memory", "error"]
    return markdown(head, [entries(record, row) for row in record["rows"]])


def entries(record: Json, row: Json) -> list[str]:
    """What the table of everything says of a row."""
    times = sorted(s / row["calls"] * row["of"] for s in row.get("seconds", []))
    spread = f"{seconds(times[0])} to {seconds(times[-1])}" if times[1:] else "once"
    calls = row.get("calls", row["of"])
    sampled = f"{calls} of {row['of']:,}" if calls < row["of"] else ""
    facts = [row["job"], _shape(row), row["metric"], _name(record, row), _time(row, row)]
    return [*facts, spread if times else "", sampled, _memory(row), _error(row)]


def _shape(row: Json) -> str:
    more = {"pairs": f", L = {row['layers']}", "ablations": f", C = {row['cells']:,}"}
    return f"{row['n']:,} x {row['p']:,}{more.get(row['job'], '')}"


def _name(record: Json, row: Json) -> str:
    """The package, and where it alone ran on the CPU."""
    elsewhere = row["device"] == "cpu" and any(r["device"] != "cpu" for r in record["rows"])
    return str(row["package"]) + " (CPU)" * elsewhere


def _taken(row: Json) -> float | None:
    """Seconds of the whole job; none of a package that failed at it, in its last round or first."""
    if row["status"] == "failed" or not row.get("seconds"):
        return None
    return statistics.median(row["seconds"]) / row["calls"] * row["of"]


def _time(row: Json, ours: Json) -> str:
    taken, base = _taken(row), _taken(ours)
    if taken is None:
        why = str(row["why"])
        return why.replace(_LATE, "> ", 1) if why.startswith(_LATE) else str(row["status"])
    text = seconds(taken) + ("" if row["calls"] == row["of"] else " *")
    return text if row is ours or base is None else f"{text} ({_ratio(taken / base)})"


def _ratio(value: float) -> str:
    return f"{value:,.0f} x" if value >= 10 else f"{value:.2g} x"


def _fastest(record: Json, row: Json, others: list[Json]) -> tuple[str, str]:
    """The first of the others and its time, and the ratio to that of ours."""
    ours = _taken(row)
    if not others or ours is None:
        return "none", ""
    first, taken = others[0], _taken(others[0]) or 0.0
    wrong = f" ({first['why']})" if first["status"] == "wrong" else ""
    return f"{_name(record, first)}, {seconds(taken)}{wrong}", f"{ours / taken:.2f}"


def _memory(row: Json) -> str:
    """As MB or GB."""
    count = row.get("memory_bytes")
    if count is None:
        return ""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _error(row: Json) -> str:
    """Of similarities; of ablations, of their distances."""
    value = row.get("distance_error" if row["job"] == "ablations" else "error", "")
    text = value if isinstance(value, str) else f"{value:.0e}"
    return f"{text}, {row['status']}" if row["status"] in ("wrong", "differs") else text


def _how(record: Json, row: Json) -> str:
    note = str(record["packages"].get(f"{row['package']}: {row['metric']}", ""))
    return f"{note}; {row['why']}" if "why" in row and row["status"] in ("ok", "not run") else note


def figure(record: Json, out: Path, metric: str = "cka_debiased", n: int = 256) -> None:
    """Time against neurons of a pair, and against the number of ablations."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    some = find(record, job="pair", metric=metric, n=n)
    _curves(axes[0], record, some, lambda row: row["p"])
    axes[0].set(title=f"One pair, {n} stimuli", xlabel="neurons p", ylabel="seconds")
    some = find(record, job="ablations", metric=metric)
    _curves(axes[1], record, some, lambda row: row["cells"])
    shape = f"{some[0]['n']} stimuli, {some[0]['p']:,} neurons"
    axes[1].set(title=f"Every ablation, {shape}", xlabel="ablations C")
    figure.suptitle(f"Debiased CKA on {record['environment']['device']}", fontsize=10)
    said = "hollow: estimated from a sample, or another number than the definition's"
    figure.supxlabel(f"{said}; x: failed or took too long", fontsize=8, color="#555555")
    figure.savefig(out, dpi=130)


def _curves(axes: Any, record: Json, rows: list[Json], x_of: Callable[[Json], int]) -> None:
    """A line for each package, named at its right end, and a cross at the top where it failed."""
    ends: list[tuple[float, str, str]] = []
    crosses: list[tuple[int, str, str]] = []
    right = max(map(x_of, rows))
    text: Any = {"textcoords": "offset points", "va": "center"}
    for name in dict.fromkeys(row["package"] for row in rows):
        own = [row for row in rows if row["package"] == name]
        points = [(x_of(row), t, row) for row in own if (t := _taken(row))]
        named, colour = _name(record, own[0]), _COLOURS.get(name, "#555555")
        crosses += [(x_of(row), named, colour) for row in own if row["status"] == "failed"]
        if not points:
            continue
        x, y, _ = zip(*points, strict=True)
        axes.plot(x, y, color=colour, lw=2.6 if name == OURS else 1.3)
        for at, taken, row in points:
            hollow = row["status"] != "ok" or row["calls"] < row["of"]
            face = "white" if hollow else colour
            axes.plot(at, taken, "o", color=colour, markerfacecolor=face, ms=5)
        if x[-1] == right:
            ends.append((y[-1], named, colour))
        else:
            ha = "center" if x[1:] else "left"
            above = text | {"xytext": (0, 10), "ha": ha, "fontsize": 8, "color": colour}
            axes.annotate(named, (x[-1], y[-1]), **above)
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(right=right * (right / min(map(x_of, rows))) ** 0.4)
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.055
    last = 0.0
    for end, name, colour in sorted(ends):
        last = max(end, last * gap)
        weight = "bold" if name == OURS else "normal"
        axes.text(right * 1.25, last, name, color=colour, fontsize=8, weight=weight, va="center")
    high = max(high, last * gap)
    top = high
    for i, (at, name, colour) in enumerate(crosses):
        height = high * gap ** sum(at == other for other, _, _ in crosses[: i + 1])
        top = max(top, height * gap)
        axes.plot(at, height, "x", color=colour, ms=6, mew=1.6)
        beside = text | {"xytext": (-6, 0), "ha": "right", "fontsize": 7}
        axes.annotate(name, (at, height), color=colour, **beside)
    axes.set_ylim(low, top)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
