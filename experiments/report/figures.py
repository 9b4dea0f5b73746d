"""The report's figures, as inline SVG of the page or as files next to it."""

from __future__ import annotations

import io
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repsim_kernels.experiments.columns import ALL_METRICS, BASELINE, CHANGE_NAMES, METRIC_NAMES
from repsim_kernels.experiments.errors import ReportError

INK = "#010203"  # becomes the page's own text colour, light or dark
# Colour, marker, the marker as text, and line width. The colours of the default metrics are Okabe &
# Ito's, which most colour-blind readers can tell apart, except those that are hard to see on white
# or black; the markers serve all other readers. Debiased CKA has a wide line, to be visible under
# CKA's.
STYLES = {
    "cka": ("#0072b2", "o", "●", 1.3),
    "procrustes": ("#e69f00", "s", "■", 1.3),
    "pwcca": ("#009e73", "^", "▲", 1.3),
    "cca": ("#d55e00", "v", "▼", 1.3),
    "cca_squared": ("#cc79a7", "D", "◆", 1.3),
    "svcca": ("#56b4e9", "P", "✚", 1.3),
    "cka_debiased": ("#888888", "X", "✖", 3.5),
    "rsa_euclidean": ("#8a63d2", "<", "◀", 1.3),
    "rsa_cosine": ("#999933", ">", "▶", 1.3),
    "rsa_correlation": ("#a6613c", "h", "⬢", 1.3),
    "cka_rbf": ("#44aa99", "p", "⬟", 1.3),
    "mutual_knn": ("#e0567a", "*", "★", 1.3),
    BASELINE: (INK, "x", "✕", 0.8),
}
MAX_NAME = 24  # characters of a layer's name that fit into a figure
MAX_POINTS = 500  # cells that are drawn as points
FORMATS = ("svg", "pdf", "png")


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Parameters
    ----------
    name : str
        What it shows, as part of a file's name.
    alt : str
        Text alternative, for readers who cannot see the figure.
    figure : Figure
    """

    name: str
    alt: str
    figure: Figure

    def svg(self) -> Markup:
        """The figure as inline SVG that uses the page's text colour and contains no address."""
        file = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.alt}):
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        # Ids repeat in every figure, and nothing refers to them.
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        label = Markup('<svg role="img" aria-label="{}"').format(self.alt)
        return Markup(text.replace("<svg", label, 1).replace(INK, "currentColor"))

    def save(self, folder: Path, name: str, kind: str) -> None:
        """Write the figure as a file with editable text."""
        title = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
        path = folder / f"{name}.{kind}"
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.alt, "pdf.fonttype": 42}):
            self.figure.savefig(path, format=kind, dpi=200, metadata={"Title": self.alt, **title})


@dataclass(frozen=True)
class FigureGroup:
    """Drawings under one numbered caption."""

    number: int
    model: str
    caption: str
    drawings: list[Drawing]


def plot_by_class(
    model: str, per_group: pd.DataFrame, estimates: pd.DataFrame, changes: Sequence[str]
) -> list[Drawing]:
    """Plot, for each change, every metric's mean in each class, overall mean and interval."""
    classes = per_group.groupby(["change", "distance", "class"], observed=True)["spearman"].mean()
    intervals = estimates.set_index(["change", "distance"])
    lowest = min(-0.25, _floor_to_tenth(classes), _floor_to_tenth(intervals["low"]))
    drawings = []
    for change in changes:
        distances = list(per_group["distance"].unique())
        figure, axes = _make_figure(4.6, 0.8 + 0.36 * len(distances))
        axes.axvline(0, color=INK, linewidth=0.6)
        for y, distance in enumerate(distances):
            colour, marker, *_ = STYLES[distance]
            values = classes[change, distance].to_numpy()
            spread = 0.2 * (np.arange(len(values)) % 3 - 1) / 2 + 0.22
            axes.plot(values, y + spread, ".", color=colour, markersize=4, alpha=0.6)
            row = intervals.loc[(change, distance)]
            axes.plot([row["low"], row["high"]], [y - 0.15, y - 0.15], color=colour, lw=2)
            axes.plot(row["estimate"], y - 0.15, color=colour, marker=marker, markersize=6)
        axes.set_yticks(range(len(distances)), [METRIC_NAMES[name] for name in distances])
        axes.set(xlim=(lowest, 1.05), ylim=(len(distances) - 0.5, -0.6))
        axes.set_xlabel("mean rank correlation")
        axes.set_title(CHANGE_NAMES[change])
        axes.grid(axis="x", color=INK, alpha=0.15)
        alt = (
            f"{model}: rank correlation of each metric with the loss of {CHANGE_NAMES[change]}: "
            "the mean, its 95 % interval, and the mean of each class"
        )
        drawings.append(Drawing(f"by_class_{change}", alt, figure))
    return drawings


def plot_by_layer(
    model: str, per_group: pd.DataFrame, layers: Sequence[str], changes: Sequence[str]
) -> list[Drawing]:
    """Plot, for each change, the mean correlation at each layer, with one line per metric."""
    mean = per_group.groupby(["change", "distance", "layer"], observed=True)["spearman"].mean()
    lowest = min(-0.25, _floor_to_tenth(mean))
    drawings = []
    for change in changes:
        figure, axes = _make_figure(4.6, 3.1)
        axes.axhline(0, color=INK, linewidth=0.6)
        for distance in reversed(per_group["distance"].unique()):
            colour, marker, _, width = STYLES[distance]
            values = mean[change, distance].reindex(layers).to_numpy()
            axes.plot(values, color=colour, marker=marker, markersize=4, linewidth=width)
        step = math.ceil(len(layers) / 16)
        names = [
            name if len(name) <= MAX_NAME else f"…{name[-MAX_NAME:]}" for name in layers[::step]
        ]
        axes.set_xticks(range(0, len(layers), step), names, rotation=90, parse_math=False)
        axes.set(ylim=(lowest, 1.05), ylabel="mean rank correlation")
        axes.set_title(CHANGE_NAMES[change])
        axes.grid(axis="y", color=INK, alpha=0.15)
        alt = (
            f"{model}: mean rank correlation of each metric with the loss of "
            f"{CHANGE_NAMES[change]}, at each of {len(layers)} layers"
        )
        drawings.append(Drawing(f"by_layer_{change}", alt, figure))
    return drawings


def plot_grid(
    model: str, layer: str, cells: pd.DataFrame, shape: tuple[int, int], columns: Sequence[str]
) -> list[Drawing]:
    """Plot heat maps of one layer's cells: the means of some columns over the classes."""
    mean = cells.groupby("cell")[list(columns)].mean()
    drawings = []
    for name in columns:
        figure, axes = _make_figure(3.4, 3.2)
        values = mean[name].to_numpy().reshape(shape)
        mesh = axes.pcolormesh(values, cmap="cividis")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "#000000" if sum(mesh.to_rgba(value)[:3]) > 1.5 else "#ffffff"
                text = axes.text(column + 0.5, row + 0.5, f"{value:.2g}", color=ink)
                text.set(ha="center", va="center", fontsize=9)
        axes.set(xticks=[], xlabel="magnitude, low to high")
        axes.set(yticks=[], ylabel="selectivity, low to high")
        title = _column_title(name)
        axes.set_title(title)
        alt = f"{model}, layer {layer}: {title}, for each of {shape[0]} x {shape[1]} cells"
        drawings.append(Drawing(f"grid_{name}", alt, figure))
    return drawings


def plot_strip(model: str, layer: str, cells: pd.DataFrame, columns: Sequence[str]) -> Drawing:
    """Plot one layer's cells side by side: the means of some columns over the classes, as bars."""
    mean = cells.groupby("cell")[list(columns)].mean()
    figure = Figure(figsize=(5.6, 0.6 + 1.0 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), 1, sharex=True, squeeze=False).ravel()
    edges = np.arange(len(mean) + 1) - 0.5
    for axes, name in zip(panels, columns, strict=True):
        _set_ink(axes)
        colour = STYLES[name][0] if name in STYLES else INK
        axes.stairs(mean[name], edges, fill=True, color=colour, alpha=0.8)
        axes.set_title(_column_title(name), fontsize=9, loc="left")
        axes.yaxis.set_major_locator(MaxNLocator(2))
        axes.margins(x=0.01)
    panels[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    panels[-1].set_xlabel("cell")
    titles = ", ".join(map(_column_title, columns))
    alt = f"{model}, layer {layer}: {titles}, as a bar for each of {len(mean)} cells"
    return Drawing("strip", alt, figure)


def plot_cells(
    model: str, group: tuple[str, str], cells: pd.DataFrame, rho: pd.Series, change: str
) -> Drawing:
    """Plot the cells of one class and layer: ranks of change against ranks of each distance.

    If there are many cells, only every second, third … is drawn.
    """
    ranks = cells[[*rho.index, change]].rank().iloc[:: thin(len(cells))]
    rows = math.ceil(len(rho) / 2)
    figure = Figure(figsize=(4.6, 0.5 + 1.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (distance, value) in zip(panels, rho.items(), strict=False):
        _set_ink(axes)
        colour, marker, *_ = STYLES[distance]
        axes.plot(ranks[distance], ranks[change], marker, color=colour, markersize=4, alpha=0.8)
        label = "no correlation" if math.isnan(value) else f"ρ {value:.2f}"  # noqa: RUF001
        axes.set_title(f"{METRIC_NAMES[distance]}, {label}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in panels[len(rho) :]:
        axes.set_axis_off()
    figure.supylabel(f"rank of the {_column_title(change)}", color=INK, fontsize=10)
    figure.supxlabel("rank of the metric's distance", color=INK, fontsize=10)
    target, layer = group
    alt = (
        f"{model}, class {target}, layer {layer}: ranks of the {_column_title(change)} "
        f"against ranks of each metric's distance, one point for each of {len(ranks)} cells"
    )
    return Drawing(f"cells_{change}", alt, figure)


def thin(n_cells: int) -> int:
    """Return k such that every k-th cell is drawn as a point."""
    return math.ceil(n_cells / MAX_POINTS)


def check_figure_folder(kind: str, folder: Path) -> None:
    """Raise ReportError if figures of this kind can't be written into the folder."""
    if kind not in FORMATS:
        raise ReportError(f"figures: {kind!r} is unknown; expected {', '.join(FORMATS)}")
    if folder.is_dir():
        endings = tuple(f".{name}" for name in FORMATS)
        other = [
            each.name
            for each in sorted(folder.iterdir())
            if not (each.name.startswith("figure") and each.name.endswith(endings))
        ]
        if other:
            raise ReportError(
                f"figures: {folder} holds {other[0]}; expected only an earlier report's figures"
            )
    elif folder.exists():
        raise ReportError(
            f"figures: {folder} is a file; expected a folder, or that it does not exist"
        )


def save_figures(groups: Sequence[FigureGroup], folder: Path, kind: str) -> None:
    """Write the figures to a new folder, which replaces an earlier report's once it is complete."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        for group in groups:
            for drawing in group.drawings:
                name = re.sub(r"\W+", "-", group.model).strip("-")
                drawing.save(new, f"figure{group.number}_{name}_{drawing.name}", kind)
        if folder.exists():
            shutil.move(folder, old)
        shutil.move(new, folder)


def _column_title(column: str) -> str:
    """What a column of the table shows, as a title."""
    if column == BASELINE:
        return METRIC_NAMES[column]
    if column in ALL_METRICS:
        return f"{METRIC_NAMES[column]} distance"
    return f"loss of {CHANGE_NAMES[column]}"


def _floor_to_tenth(values: pd.Series) -> float:
    """The smallest value, rounded down to a tenth; infinity if all are NaN."""
    return math.floor(10 * values.min()) / 10 if values.notna().any() else math.inf


def _make_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _set_ink(axes)
    return figure, axes


def _set_ink(axes: Axes) -> None:
    """Draw ticks, labels and the left and bottom spines in the page's text colour."""
    axes.tick_params(colors=INK, labelsize=9)
    axes.title.set(color=INK, fontsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=10)
    for side, spine in axes.spines.items():
        spine.set(color=INK, visible=side in ("left", "bottom"))
