"""The figure of the accuracy benchmark: errors by kind of input above, ablations below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.accuracy import METRICS, OURS, WRONG
from bench.common.machine import Json

TITLES = {
    "cka": "CKA",
    "cka_debiased": "debiased CKA",
    "procrustes": "Procrustes",
    "rsa": "RSA",
}
SWEPT = {
    "mean": "mean / standard deviation",
    "scale": "scale of the features",
    "condition": "condition number",
    "dtype": "dtype of the input",
}
# One fixed colour and marker per package (Okabe & Ito); ours is the darkest and widest.
STYLES = {
    OURS: ("#000000", "o"),
    "plain torch": ("#e69f00", "s"),
    "plain CuPy": ("#a6761d", "s"),
    "scikit-learn": ("#f0c800", "D"),
    "ckatorch": ("#56b4e9", "^"),
    "pytorch-cka": ("#d55e00", "v"),
    "torch-cka": ("#cc79a7", "P"),
    "repsim": ("#009e73", "<"),
    "shesha-geometry": ("#8a5fbf", ">"),
    "rsatoolbox": ("#0072b2", "X"),
    f"{OURS}, float64": ("#777777", "o"),
    f"{OURS}, tf32x3": ("#555555", "o"),
    f"{OURS}, tf32": ("#999999", "o"),
}
LOWEST, HIGHEST = 1e-17, 30.0  # exact results are drawn at the bottom, missing ones at the top
_TEXT: dict[str, Any] = {"va": "center", "size": 8}
_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def draw_figure(record: Json, out: Path) -> None:
    """Write the figure of a record as PNG, to be read at a width of 900 pixels."""
    # A package that is wrong in the easiest condition computes another definition.
    others = {
        (p["package"], p["metric"])
        for p in record["points"]
        if p["vary"] == "mean" and p["value"] == 0 and p["status"] == "wrong"
    }
    drawing = Figure(figsize=(10, 12.6), layout="constrained")
    parts: Any = drawing.subfigures(2, 1, height_ratios=[3.35, 1])
    above, below = parts
    axes = above.subplots(len(METRICS), len(SWEPT), sharey=True, sharex="col")
    for row, metric in zip(axes, METRICS, strict=True):
        for ax, vary in zip(row, SWEPT, strict=True):
            _draw_sweep(ax, record, metric, vary, others)
        row[0].set_ylabel(f"{TITLES[metric]}\nrelative error")
        row[0].text(0.03, 0.76, "wrong", size=8, color="#d55e00", transform=row[0].transAxes)
    for ax, label in zip(axes[-1], SWEPT.values(), strict=True):
        ax.set_xlabel(label)
    present = {row["package"] for row in [*record["points"], *record["order"]]}
    handles = [Line2D([], [], label=name, **_style(name)) for name in STYLES if name in present]
    cross: dict[str, Any] = {"color": "0.3", "marker": "$✕$", "linestyle": ""}
    handles.append(Line2D([], [], label="NaN, error or refused", **cross))
    above.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    _draw_ablations(below, record, others)
    title = f"Relative error, worst of the seeds; {record['environment']['device']}"
    drawing.suptitle(title, x=0.02, ha="left", weight="bold")
    if others:
        names = ", ".join(f"{name} ({TITLES[metric]})" for name, metric in sorted(others))
        drawing.supxlabel(f"Not drawn, because they compute another definition: {names}", size=8)
    drawing.savefig(out, dpi=180)


def _style(name: str) -> dict[str, Any]:
    colour, marker = STYLES[name]
    ours = name == OURS
    return {
        "color": colour,
        "marker": marker,
        "markersize": 8 if ours else 4.5,
        "linewidth": 3.5 if ours else 1.3,
        "zorder": 2 if ours else 3,  # below the others, so that it hides none
    }


def _draw_sweep(
    ax: Axes, record: Json, metric: str, vary: str, others: set[tuple[str, str]]
) -> None:
    swept = [p for p in record["points"] if p["vary"] == vary]
    values = list(dict.fromkeys(p["value"] for p in swept))
    for name in STYLES:
        points = {p["value"]: p for p in swept if (p["package"], p["metric"]) == (name, metric)}
        if points and (name, metric) not in others:
            numbers = [points[v]["status"] in ("ok", "wrong") for v in values]
            heights = [
                points[v]["worst"] if n else None for v, n in zip(values, numbers, strict=True)
            ]
            _draw_line(ax, name, heights, apart=vary == "dtype")
    _format_axes(ax, values)


def _draw_line(ax: Axes, name: str, heights: list[float | None], apart: bool = False) -> None:
    """Draw a line, broken with a cross at the top where a value is missing.

    ``apart``: draw marks side by side instead, for values that can't be interpolated.
    """
    aside = 0.06 * (list(STYLES).index(name) - 4.5)
    shown = [float("nan") if h is None else min(max(h, LOWEST), HIGHEST) for h in heights]
    where = [i + aside * apart for i in range(len(shown))]
    ax.plot(where, shown, **_style(name) | ({"linestyle": ""} if apart else {}))
    missing = [i + aside for i, h in enumerate(heights) if h is None]
    crosses = [HIGHEST * 6] * len(missing)
    ax.plot(missing, crosses, "x", color=STYLES[name][0], markersize=5, markeredgewidth=1.6)


def _format_axes(ax: Axes, values: list[Any]) -> None:
    ax.set_yscale("log")
    ax.set_ylim(LOWEST / 3, HIGHEST * 40)
    ax.set_yticks([10.0**e for e in range(-16, 1, 4)])
    ax.minorticks_off()
    ax.axhspan(WRONG, HIGHEST * 40, color="#d55e00", alpha=0.09, linewidth=0)
    ax.grid(axis="y", color="0.88", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xticks(range(len(values)), [_format_tick(v) for v in values])
    for tick in ax.get_xticklabels()[1::2] if len(values) > 6 else []:
        tick.set_visible(False)
    ax.margins(x=0.08)


def _format_tick(value: Any) -> str:
    if isinstance(value, str):
        return _SHORT.get(value, value)
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    if value == 0 or (mantissa == "1" and 0 <= int(exponent) <= 1):
        return f"{value:g}"
    return f"$10^{{{int(exponent)}}}$"


def _draw_ablations(below: Any, record: Json, others: set[tuple[str, str]]) -> None:
    """Draw errors of CKA distances by size, and the share of pairs of cells out of order."""
    means = list(dict.fromkeys(row["mean"] for row in record["order"]))
    axes = below.subplots(1, len(means) + 1, width_ratios=[1] * len(means) + [1.1])
    for ax, mean in zip(axes, means, strict=False):
        rows = [r for r in record["order"] if r["metric"] == "cka" and r["mean"] == mean]
        rows = [r for r in rows if r["status"] == "ok" and (r["package"], "cka") not in others]
        decades = [d["distance"] for d in rows[0]["decades"]]
        for row in rows:
            medians = [d["median"] for d in row["decades"]]
            _draw_line(ax, row["package"], [None if isinstance(m, str) else m for m in medians])
        _format_axes(ax, [float(d) for d in decades])
        ax.set_title(f"CKA distance of an ablation, mean {mean:g}", size=9)
        ax.set_xlabel("true distance")
    axes[0].set_ylabel("median relative error")
    _draw_bars(axes[-1], record, others, means)


def _draw_bars(ax: Axes, record: Json, others: set[tuple[str, str]], means: list[float]) -> None:
    """Draw the share of pairs out of order, for each package's worst metric."""
    mean = means[-1]
    worst: dict[str, Json] = {}
    invalid: dict[str, str] = {}  # packages without numbers
    for row in record["order"]:
        name, metric = row["package"], row["metric"]
        if row["mean"] != mean or (name, metric) in others:
            continue
        if row["status"] != "ok":
            invalid[name] = f"{TITLES[metric]}: {row['status'].replace('nan', 'NaN')}"
        elif name not in worst or row["share"] > worst[name]["share"]:
            worst[name] = row
    names = [name for name in STYLES if name in worst][::-1]
    widths = [100 * worst[name]["share"] for name in names]
    ax.barh(names, widths, color=[STYLES[name][0] for name in names], height=0.65)
    for y, (name, width) in enumerate(zip(names, widths, strict=True)):
        text = f"{width:.2g} %, {TITLES[worst[name]['metric']]}" if width else "none"
        ax.text(width + 0.8, y, "; ".join([text, *filter(None, [invalid.get(name)])]), **_TEXT)
    ax.set_xlim(0, max([*widths, 1.0]) * 1.8)
    ax.set_title(f"pairs out of order, %, mean {mean:g}", size=9)
    ax.set_xlabel("each package's worst metric")
    ax.spines[["top", "right"]].set_visible(False)
