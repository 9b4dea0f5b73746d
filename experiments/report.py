"""One self-contained HTML page about a run: what ran, the correlations, where they come from."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import pandas as pd  # type: ignore[import-untyped]
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .stats import CHANGES, METRICS, correlations, summary
from .store import load, replacing

METRIC_NAMES = {
    "cka": "CKA",
    "procrustes": "Procrustes",
    "pwcca": "PWCCA",
    "cca": "mean CCA",
    "cca_squared": "mean squared CCA",
    "svcca": "SVCCA",
    "cka_debiased": "debiased CKA",
}
CHANGE_NAMES = {
    "rank_deficit": "rank of the true class",
    "log_probability": "log-probability",
    "probability": "probability",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "decodability_refit": "decodability, refitted",
    "decodability_frozen": "decodability, frozen",
    "margin_refit": "linear margin, refitted",
    "margin_frozen": "linear margin, frozen",
    "decodability_paper": "decodability, the paper's",
}
BY_LAYER = ("rank_deficit", "log_probability", "decodability_refit", "decodability_paper")
# Okabe & Ito's colours, told apart by most colour-blind readers, without those that are lost on
# white or black; and a marker each, for everybody else. The last is wide, to be seen under CKA.
STYLES = (
    ("#0072b2", "o", "●", 1.3),
    ("#e69f00", "s", "■", 1.3),
    ("#009e73", "^", "▲", 1.3),
    ("#d55e00", "v", "▼", 1.3),
    ("#cc79a7", "D", "◆", 1.3),
    ("#56b4e9", "P", "✚", 1.3),
    ("#888888", "X", "✖", 3.5),
)
INK = "#010203"  # becomes the page's own text colour, light or dark


def write_report(run: str | os.PathLike[str] | pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write the report of a run.

    Parameters
    ----------
    run : path or DataFrame
        The folder of a finished run, or a table such as `experiments.Study.run` returns; a table
        alone doesn't say what ran.
    path : path
        The HTML file; it is replaced only when the new one is whole.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    StoreError
        The folder is not that of a finished run.
    StatsError
        The table lacks a column.
    """
    table, study = (run, {}) if isinstance(run, pd.DataFrame) else load(run)
    metrics = [name for name in METRICS if name in table.columns]
    changes = [name for name in CHANGES if name in table.columns]
    per_group = correlations(table, metrics, changes)
    models = [
        _model(name, table, per_group, study)
        for name in study.get("configuration", {}).get("models", {}) or table["model"].unique()
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        models=models,
        metrics=dict(zip(metrics, STYLES, strict=False)),
        metric_names=METRIC_NAMES,
        change_names=CHANGE_NAMES,
        changes=changes,
        cells=int(table["cell"].nunique()),
        grid=_grid(table, study),
        about=study.get("about", {}),
        versions=study.get("configuration", {}).get("versions", {}),
    )
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def means(per_group: pd.DataFrame) -> pd.DataFrame:
    """Mean correlations with a row per model and metric, a column per function change."""
    table = summary(per_group)
    order = {key: list(table[key].unique()) for key in ("model", "distance", "change")}
    wide = table.pivot(index=["model", "distance"], columns="change", values="spearman")
    rows = pd.MultiIndex.from_product([order["model"], order["distance"]])
    return wide.reindex(index=rows, columns=order["change"])


def _model(
    name: str, table: pd.DataFrame, per_group: pd.DataFrame, study: dict[str, Any]
) -> dict[str, Any]:
    """What the template says of one model."""
    mine = per_group[per_group["model"] == name]
    configuration = study.get("configuration", {}).get("models", {}).get(name, {})
    layers = configuration.get("layers") or sorted(mine["layer"].unique(), key=_natural)
    cells = summary(mine).set_index(["distance", "change"])
    extremes = {}
    for change, rho in cells["spearman"].dropna().unstack("distance").iterrows():
        best, least = rho.idxmax(), rho.idxmin()
        extremes[change] = (METRIC_NAMES[best], rho[best], METRIC_NAMES[least], rho[least])
    return {
        "name": name,
        "configuration": configuration,
        "about": study.get("about", {}).get("models", {}).get(name)
        or {"note": table.attrs.get("notes", {}).get(name)},
        "layers": layers,
        "classes": configuration.get("classes") or [str(c) for c in mine["class"].unique()],
        "groups": len(mine.groupby(["class", "layer"])),
        "mean": cells["spearman"].to_dict(),
        "nan": cells["nan_groups"].to_dict(),
        "extremes": {change: extremes[change] for change in BY_LAYER if change in extremes},
        "by_layer": _by_layer(name, mine, layers),
    }


def _by_layer(model: str, mine: pd.DataFrame, layers: Sequence[str]) -> list[Markup]:
    """A figure for each of the main changes: mean correlation at each layer, a line a metric."""
    mean = mine.groupby(["change", "distance", "layer"], observed=True)["spearman"].mean()
    lowest = min(-0.25, math.floor(10 * mean.min()) / 10) if mean.notna().any() else -1.0
    figures = []
    for change in (c for c in BY_LAYER if c in set(mine["change"])):
        figure, axes = _figure(4.6, 3.1)
        axes.axhline(0, color=INK, linewidth=0.6)
        for metric, (colour, marker, _, width) in reversed(
            [*zip(mine["distance"].unique(), STYLES, strict=False)]
        ):
            values = mean[change, metric].reindex(layers).to_numpy()
            axes.plot(values, color=colour, marker=marker, markersize=4, linewidth=width)
        step = math.ceil(len(layers) / 16)
        axes.set_xticks(range(0, len(layers), step), layers[::step], rotation=90)
        axes.set(ylim=(lowest, 1.05), ylabel="mean rank correlation")
        axes.set_title(CHANGE_NAMES[change])
        axes.grid(axis="y", color=INK, alpha=0.15)
        alt = (
            f"{model}: mean rank correlation of each metric with the loss of "
            f"{CHANGE_NAMES[change]}, at each of {len(layers)} layers"
        )
        figures.append(_svg(figure, alt))
    return figures


def _grid(table: pd.DataFrame, study: dict[str, Any]) -> dict[str, Any] | None:
    """Heat maps of the layer where ablation costs most, if the shape of the grid is known."""
    wanted = ("rank_deficit", "decodability_refit", "decodability_paper", "cka")
    shown = [name for name in wanted if name in table.columns]
    keys = ["model", "layer"]
    cost = table.groupby(keys, observed=True)[shown[0]].mean() if shown else None
    if cost is None or cost.isna().all():
        return None
    model, layer = cost.idxmax()
    mine = table[(table["model"] == model) & (table["layer"] == layer)]
    n_cells = int(mine["cell"].max()) + 1
    side = math.isqrt(n_cells)
    configuration = study.get("configuration", {}).get("models", {}).get(model, {})
    rows, columns = configuration.get("grid", (side, side))
    if rows * columns != n_cells:
        return None
    mean = mine.groupby("cell")[shown].mean()
    figures = []
    for name in shown:
        what = METRIC_NAMES.get(name, "") + " distance" if name in METRICS else CHANGE_NAMES[name]
        figure, axes = _figure(3.4, 3.2)
        values = mean[name].to_numpy().reshape(rows, columns)
        mesh = axes.pcolormesh(values, cmap="cividis")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "#000000" if sum(mesh.to_rgba(value)[:3]) > 1.5 else "#ffffff"
                text = axes.text(column + 0.5, row + 0.5, f"{value:.2g}", color=ink)
                text.set(ha="center", va="center", fontsize=9)
        axes.set(xticks=[], xlabel="magnitude, low to high")
        axes.set(yticks=[], ylabel="selectivity, low to high")
        axes.set_title(what if name in METRICS else f"loss: {what}")
        alt = f"{model}, layer {layer}: {what}, for each of {rows} x {columns} cells"
        figures.append(_svg(figure, alt))
    return {
        "model": model,
        "layer": layer,
        "classes": int(mine["class"].nunique()),
        "figures": figures,
    }


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=9)
    axes.title.set(color=INK, fontsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=10)
    for side, spine in axes.spines.items():
        spine.set(color=INK, visible=side in ("left", "bottom"))
    return figure, axes


def _svg(figure: Figure, alt: str) -> Markup:
    """The figure as inline SVG that takes the page's colour and names no address."""
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    label = Markup('<svg role="img" aria-label="{}"').format(alt)
    return Markup(text.replace("<svg", label, 1).replace(INK, "currentColor"))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts features.10 after features.4."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
