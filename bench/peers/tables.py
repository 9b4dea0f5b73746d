"""What a comparison found, as Markdown tables and a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench._machine import Json
from bench.peers.run import median

OURS = "repsim_kernels"
_COLOURS = {
    OURS: "#c1272d",
    "plain torch": "#0072b2",
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


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{float(f'{value / size:.3g}'):,.4g} {unit}"
    raise AssertionError


def memory(count: float) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def find(record: Json, **facts: Any) -> list[Json]:
    """The rows of a record that have these facts."""
    return [row for row in record["rows"] if all(row.get(k) == v for k, v in facts.items())]


def ablations(record: Json, metric: str) -> str:
    """All ablations of one layer: a column for each count of cells."""
    rows = find(record, job="ablations", metric=metric)
    counts = sorted({row["cells"] for row in rows})
    names = list(dict.fromkeys(row["package"] for row in rows))
    table = []
    for name in names:
        own = [one for c in counts for one in rows if (one["package"], one["cells"]) == (name, c)]
        ours = [one for one in rows if one["package"] == OURS]
        times = [_time(row, base) for row, base in zip(own, ours, strict=True)]
        table.append([name, *times, _memory(own[-1]), _error(own[-1], "distance_error")])
    head = ["", *(f"C = {c:,}" for c in counts), f"memory, C = {counts[-1]:,}", "error"]
    return markdown(head, table)


def pairs(record: Json, metric: str) -> str:
    """All pairs of layers."""
    rows = find(record, job="pairs", metric=metric)
    (ours,) = (row for row in rows if row["package"] == OURS)
    table = [
        [row["package"], _time(row, ours), _memory(row), _error(row), _how(record, row)]
        for row in rows
    ]
    return markdown(["", "time", "memory", "error", "how"], table)


def one_pair(record: Json, metric: str) -> str:
    """One pair: ours, the fastest peer that centres its features, and the fastest of all."""
    table = []
    for row in find(record, job="pair", metric=metric, package=OURS):
        others = [
            other
            for other in find(record, job="pair", metric=metric, n=row["n"], p=row["p"])
            if other["package"] != OURS and other["status"] == "ok" and median(other)
        ]
        right = sorted(others, key=lambda other: median(other) or 0.0)
        centred = [other for other in right if other["centres"]]
        shape = f"{row['n']:,} x {row['p']:,}"
        table.append(
            [shape, _time(row, row), *_other(row, centred), *_other(row, right), _memory(row)]
        )
    head = ["n x p", "ours", "fastest that centres", "ratio", "fastest of all", "ratio", "memory"]
    return markdown(head, table)


def failures(record: Json) -> str:
    """What could not be done, or gave other numbers, and why."""
    table: dict[tuple[str, str, str], list[str]] = {}
    for row in record["rows"]:
        if row["status"] != "ok":
            key = (row["package"], row["metric"], f"{row['status']}: {row['why']}")
            table.setdefault(key, []).append(_shape(row))
    rows = [[*key, "; ".join(shapes)] for key, shapes in table.items()]
    return markdown(["package", "metric", "what", "where"], rows)


def everything(record: Json) -> str:
    """Every row, for who wants to see for themselves."""
    table = []
    for row in record["rows"]:
        times = sorted(s / row["calls"] * row["of"] for s in row.get("seconds", []))
        spread = f"{seconds(times[0])} to {seconds(times[-1])}" if times else ""
        calls = row.get("calls", row["of"])
        sampled = f"{calls} of {row['of']:,}" if calls < row["of"] else ""
        facts = [row["job"], _shape(row), row["metric"], row["package"]]
        table.append([*facts, _time(row, row), spread, sampled, _memory(row), _error(row)])
    head = ["job", "size", "metric", "package", "median", "all rounds", "timed", "memory", "error"]
    return markdown(head, table)


def _shape(row: Json) -> str:
    more = {"pairs": f", L = {row['layers']}", "ablations": f", C = {row['cells']:,}"}
    return f"{row['n']:,} x {row['p']:,}{more.get(row['job'], '')}"


def _time(row: Json, ours: Json) -> str:
    taken, base = median(row), median(ours)
    if taken is None:
        return str(row["status"])
    text = seconds(taken) + ("" if row["calls"] == row["of"] else " *")
    return text if row is ours or base is None else f"{text} ({_ratio(taken / base)})"


def _ratio(value: float) -> str:
    return f"{value:,.0f} x" if value >= 10 else f"{value:.2g} x"


def _other(row: Json, others: list[Json]) -> tuple[str, str]:
    ours = median(row)
    if not others or ours is None:
        return "none", ""
    taken = median(others[0]) or 0.0
    return f"{others[0]['package']}, {seconds(taken)}", f"{ours / taken:.2f}"


def _memory(row: Json) -> str:
    return memory(row["memory_bytes"]) if "memory_bytes" in row else ""


def _error(row: Json, which: str = "error") -> str:
    value = row.get(which, "")
    text = value if isinstance(value, str) else f"{value:.0e}"
    return f"{text}, {row['status']}" if row["status"] not in ("ok", "failed") else text


def _how(record: Json, row: Json) -> str:
    return str(record["packages"].get(f"{row['package']}: {row['metric']}", ""))


def figure(record: Json, out: Path, metric: str = "cka_debiased", n: int = 256) -> None:
    """Time against neurons of a pair, and against the number of ablations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    some = find(record, job="pair", metric=metric, n=n)
    _curves(axes[0], some, lambda row: row["p"])
    axes[0].set(title=f"One pair, {n} stimuli", xlabel="neurons p", ylabel="seconds")
    some = find(record, job="ablations", metric=metric)
    _curves(axes[1], some, lambda row: row["cells"])
    shape = f"{some[0]['n']} stimuli, {some[0]['p']:,} neurons"
    axes[1].set(title=f"Every ablation, {shape}", xlabel="ablations C")
    figure.suptitle(f"Debiased CKA on {record['environment']['device']}", fontsize=10)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _curves(axes: Any, rows: list[Json], x_of: Callable[[Json], int]) -> None:
    """A line for each package, named at its right end."""
    ends = []
    for name in dict.fromkeys(row["package"] for row in rows):
        points = [(x_of(row), t) for row in rows if row["package"] == name and (t := median(row))]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        colour = _COLOURS.get(name, "#555555")
        axes.plot(x, y, "o-", color=colour, lw=2.6 if name == OURS else 1.3, ms=4)
        ends.append([y[-1], name, colour])
    axes.set(xscale="log", yscale="log")
    right = max(map(x_of, rows))
    axes.set_xlim(right=right * (right / min(map(x_of, rows))) ** 0.4)
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.055
    last = 0.0
    for y, name, colour in sorted(ends):
        last = max(y, last * gap)
        weight = "bold" if name == OURS else "normal"
        axes.text(right * 1.25, last, name, color=colour, fontsize=8, weight=weight, va="center")
    axes.set_ylim(low, max(high, last * gap))
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
