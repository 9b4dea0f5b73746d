"""Markdown tables and a figure of a comparison with other packages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.common.machine import Json, format_seconds
from bench.peers.packages import PACKAGES

OURS = "repsim_kernels"
_TOO_LONG = "took over "
_DISPLAYED = {"differs": "different definition"}  # clearer text for a status
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


def format_markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table whose first ``left`` columns are aligned left, the others right."""
    rule = [*["---"] * left, *["--:"] * (len(head) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def select_rows(record: Json, **facts: Any) -> list[Json]:
    """Return the rows of a record that match all the given values."""
    return [row for row in record["rows"] if all(row.get(k) == v for k, v in facts.items())]


def tabulate_ablations(record: Json, metric: str) -> str:
    """Tabulate the job "all ablations of one layer", one column per number of cells."""
    rows = select_rows(record, job="ablations", metric=metric)
    counts = sorted({row["cells"] for row in rows})
    ours = select_rows(record, job="ablations", metric=metric, package=OURS)
    table = []
    for name in dict.fromkeys(row["package"] for row in rows):
        package_rows = [row for row in rows if row["package"] == name]
        times = [_format_time(row, base) for row, base in zip(package_rows, ours, strict=True)]
        cells = [_format_memory(package_rows[-1]), _format_error(package_rows[-1])]
        table.append([_format_name(record, package_rows[-1]), *times, *cells])
    head = ["", *(f"C = {c:,}" for c in counts), f"memory, C = {counts[-1]:,}", "error"]
    return format_markdown_table(head, table)


def tabulate_pairs(record: Json, metric: str) -> str:
    """Tabulate the job "all pairs of layers"."""
    rows = select_rows(record, job="pairs", metric=metric)
    (ours,) = (row for row in rows if row["package"] == OURS)
    table = []
    for row in rows:
        facts = [_format_time(row, ours), _format_memory(row), _format_error(row)]
        table.append([_format_name(record, row), *facts, _describe_method(record, row)])
    return format_markdown_table(["", "time", "memory", "error", "method"], table)


def rank_others(record: Json, metric: str, **facts: Any) -> list[Json]:
    """Return the other packages' timed rows of a job, fastest first.

    Inaccurate results are included and marked; results by another definition are not.
    """
    rows = [
        row
        for row in select_rows(record, metric=metric, **facts)
        if row["package"] != OURS and row["status"] in ("ok", "wrong") and compute_job_seconds(row)
    ]
    return sorted(rows, key=lambda row: compute_job_seconds(row) or 0.0)


def tabulate_one_pair(record: Json, metric: str) -> str:
    """Tabulate the job "one pair": this package and the fastest others, for each shape."""
    table = []
    for row in select_rows(record, job="pair", metric=metric, package=OURS):
        others = rank_others(record, metric, job="pair", n=row["n"], p=row["p"])
        centring = [other for other in others if other["centres"]]
        fastest = [*_format_fastest(record, row, centring), *_format_fastest(record, row, others)]
        table.append([_format_shape(row), _format_time(row, row), *fastest, _format_memory(row)])
    head = [
        *("n x p", "this package", "fastest that centres", "ratio"),
        *("fastest of all", "ratio", "memory"),
    ]
    return format_markdown_table(head, table)


def tabulate_failures(record: Json) -> str:
    """Tabulate what failed, was not run, was run differently or gave other values, and why."""
    shapes: dict[tuple[str, str, str], list[str]] = {}
    for row in record["rows"]:
        if "why" in row:
            status = "" if row["status"] == "ok" else f"{_format_status(row)}: "
            key = (row["package"], row["metric"], f"{status}{row['why']}")
            shapes.setdefault(key, []).append(_format_shape(row))
    rows = [[*key, "; ".join(sizes)] for key, sizes in shapes.items()]
    return format_markdown_table(["package", "metric", "outcome", "sizes"], rows, left=4)


def tabulate_all_rows(record: Json) -> str:
    """Tabulate every row that was run."""
    head = ["job", "size", "metric", "package", "median", "range", "timed", "memory", "error"]
    rows = [row for row in record["rows"] if row["status"] != "not run"]
    return format_markdown_table(head, [format_row(record, row) for row in rows], left=4)


def format_row(record: Json, row: Json) -> list[str]:
    """Format one row for the table of all rows."""
    times = sorted(s / row["calls"] * row["of"] for s in row.get("seconds", []))
    spread = f"{format_seconds(times[0])} to {format_seconds(times[-1])}" if times[1:] else "once"
    calls = row.get("calls", row["of"])
    sampled = f"{calls} of {row['of']:,}" if calls < row["of"] else ""
    job = [row["job"], _format_shape(row), row["metric"], _format_name(record, row)]
    measured = [_format_time(row, row), spread if times else "", sampled]
    return [*job, *measured, _format_memory(row), _format_error(row)]


def tabulate_methods(record: Json) -> str:
    """Tabulate how each package computes each metric."""
    notes = record["packages"] | {
        package.key: package.note for package in PACKAGES if package.key in record["packages"]
    }
    return format_markdown_table(["package: metric", "method"], notes.items(), left=2)


def _format_shape(row: Json) -> str:
    extra = {"pairs": f", L = {row['layers']}", "ablations": f", C = {row['cells']:,}"}
    return f"{row['n']:,} x {row['p']:,}{extra.get(row['job'], '')}"


def _format_name(record: Json, row: Json) -> str:
    """Return the package's name, marked if it ran on the CPU while others used a GPU."""
    on_cpu = row["device"] == "cpu" and any(r["device"] != "cpu" for r in record["rows"])
    return str(row["package"]) + " (CPU)" * on_cpu


def _format_status(row: Json) -> str:
    return _DISPLAYED.get(row["status"], str(row["status"]))


def compute_job_seconds(row: Json) -> float | None:
    """Return the median seconds of the whole job; None if the package failed at any point."""
    if row["status"] == "failed" or not row.get("seconds"):
        return None
    return statistics.median(row["seconds"]) / row["calls"] * row["of"]


def _format_time(row: Json, ours: Json) -> str:
    duration, base = compute_job_seconds(row), compute_job_seconds(ours)
    if duration is None:
        why = str(row["why"])
        return why.replace(_TOO_LONG, "> ", 1) if why.startswith(_TOO_LONG) else str(row["status"])
    text = format_seconds(duration) + ("" if row["calls"] == row["of"] else " *")
    return text if row is ours or base is None else f"{text} ({format_ratio(duration / base)})"


def format_ratio(value: float) -> str:
    return f"{value:,.0f} x" if value >= 10 else f"{value:.2g} x"


def _format_fastest(record: Json, row: Json, others: list[Json]) -> tuple[str, str]:
    """Return the name and time of the fastest other package, and its time divided by ours."""
    ours = compute_job_seconds(row)
    if not others or ours is None:
        return "none", ""
    first, other = others[0], compute_job_seconds(others[0]) or 0.0
    wrong = f" ({first['why']})" if first["status"] == "wrong" else ""
    return f"{_format_name(record, first)}, {format_seconds(other)}{wrong}", f"{other / ours:.2f}"


def _format_memory(row: Json) -> str:
    count = row.get("memory_bytes")
    if count is None:
        return ""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _format_error(row: Json) -> str:
    """Return the error of a similarity or, for ablations, of a distance."""
    value = row.get("distance_error" if row["job"] == "ablations" else "error", "")
    text = value if isinstance(value, str) else f"{value:.0e}"
    return f"{text}, {_format_status(row)}" if row["status"] in ("wrong", "differs") else text


def _describe_method(record: Json, row: Json) -> str:
    key = f"{row['package']}: {row['metric']}"
    notes = {package.key: package.note for package in PACKAGES}
    note = notes.get(key) or str(record["packages"].get(key, ""))
    return f"{note}; {row['why']}" if "why" in row and row["status"] in ("ok", "not run") else note


def draw_figure(record: Json, out: Path, metric: str = "cka_debiased", n: int = 256) -> None:
    """Draw time against neurons for one pair, and against the number of ablations."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    rows = select_rows(record, job="pair", metric=metric, n=n)
    _draw_curves(axes[0], record, rows, lambda row: row["p"])
    axes[0].set(title=f"One pair, {n} stimuli", xlabel="neurons p", ylabel="seconds")
    rows = select_rows(record, job="ablations", metric=metric)
    _draw_curves(axes[1], record, rows, lambda row: row["cells"])
    shape = f"{rows[0]['n']} stimuli, {rows[0]['p']:,} neurons"
    axes[1].set(title=f"All ablations, {shape}", xlabel="ablations C")
    figure.suptitle(f"Debiased CKA on {record['environment']['device']}", fontsize=10)
    legend = "hollow: estimated from a sample, or not the value of the definition"
    figure.supxlabel(f"{legend}; x: failed or took too long", fontsize=8, color="#555555")
    figure.savefig(out, dpi=130)


def _draw_curves(axes: Any, record: Json, rows: list[Json], x_of: Callable[[Json], int]) -> None:
    """Draw a labelled line per package, with a cross at the top where it failed."""
    ends: list[tuple[float, str, str]] = []
    crosses: list[tuple[int, str, str]] = []
    right = max(map(x_of, rows))
    text: Any = {"textcoords": "offset points", "va": "center"}
    for name in dict.fromkeys(row["package"] for row in rows):
        package_rows = [row for row in rows if row["package"] == name]
        points = [(x_of(row), t, row) for row in package_rows if (t := compute_job_seconds(row))]
        label, colour = _format_name(record, package_rows[0]), _COLOURS.get(name, "#555555")
        crosses += [(x_of(row), label, colour) for row in package_rows if row["status"] == "failed"]
        if not points:
            continue
        x, y, _ = zip(*points, strict=True)
        axes.plot(x, y, color=colour, lw=2.6 if name == OURS else 1.3)
        for position, height, row in points:
            hollow = row["status"] != "ok" or row["calls"] < row["of"]
            face = "white" if hollow else colour
            axes.plot(position, height, "o", color=colour, markerfacecolor=face, ms=5)
        if x[-1] == right:
            ends.append((y[-1], label, colour))
        else:
            ha = "center" if x[1:] else "left"
            above = text | {"xytext": (0, 10), "ha": ha, "fontsize": 8, "color": colour}
            axes.annotate(label, (x[-1], y[-1]), **above)
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
    for i, (position, name, colour) in enumerate(crosses):
        height = high * gap ** sum(position == other for other, _, _ in crosses[: i + 1])
        top = max(top, height * gap)
        axes.plot(position, height, "x", color=colour, ms=6, mew=1.6)
        left_of = text | {"xytext": (-6, 0), "ha": "right", "fontsize": 7}
        axes.annotate(name, (position, height), color=colour, **left_of)
    axes.set_ylim(low, top)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
