"""The report: one self-contained HTML page with the findings, numbers and origin of runs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels._files import find_write_obstacle, replace_file
from repsim_kernels._options import short_repr
from repsim_kernels.experiments.analysis.published import PUBLISHED, SOURCE
from repsim_kernels.experiments.analysis.shuffles import PERCENT, SHUFFLES
from repsim_kernels.experiments.columns import BASELINE, CHANGE_NAMES, METRIC_NAMES
from repsim_kernels.experiments.errors import ReportError
from repsim_kernels.experiments.report import figures as plots
from repsim_kernels.experiments.report.figures import Drawing, FigureGroup
from repsim_kernels.experiments.report.findings import (
    CELL_KINDS,
    GROUP,
    RANK_DEFICIT,
    NetworkFindings,
    costliest_layer,
    format_range,
)
from repsim_kernels.experiments.runs.store import load_run

Run: TypeAlias = str | os.PathLike[str] | pd.DataFrame


def write_report(
    runs: Run | Sequence[Run], path: str | os.PathLike[str], figures: str | None = None
) -> Path:
    """Write the report of a run, or of several together.

    Parameters
    ----------
    runs : path, DataFrame, or a sequence of these
        Folders of finished runs, or tables as in the results of `Study.run`; a table alone does
        not record what ran. If two runs have a model of the same name, the run's name is appended.
    path : path
        The HTML file. An earlier one is replaced only when the new one is complete.
    figures : {"svg", "pdf", "png"}, optional
        Also write the figures as files, into the folder ``STEM_figures`` next to the page, where
        STEM is the page's name without its suffix. The figures of an earlier report are replaced,
        either all of them or none.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReportError
        ``path`` is no path or a folder, its folder does not exist, ``figures`` is unknown, the
        folder of the figures holds other files, there are no runs, or a run is repeated.
    StoreError
        A folder does not hold a finished run.
    StatsError
        A table lacks a column.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ReportError(f"path: {short_repr(path)}; expected the name of an .html file")
    path = Path(path)
    if why := find_write_obstacle(path):
        raise ReportError(f"path: {why}")
    folder = path.with_name(f"{path.stem}_figures")
    if figures is not None:
        plots.check_figure_folder(figures, folder)
    loaded = _load(runs)
    models = [model for run in loaded for model in run["models"]]
    groups = _make_figures(models)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        models=models,
        runs=loaded,
        figures=groups,
        styles={key: style for key, style in plots.STYLES.items() if _has_column(models, key)},
        metric_names=METRIC_NAMES,
        change_names=CHANGE_NAMES,
        changes=[name for name in CHANGE_NAMES if _has_column(models, name)],
        performance=RANK_DEFICIT,
        cells=format_range([count for model in models for count in model.cell_counts]),
        fills=" or ".join(sorted({model.fill for model in models}, reverse=True)),
        cell_kinds=CELL_KINDS,
        baseline=BASELINE,
        percent=PERCENT,
        shuffles=SHUFFLES,
        source=SOURCE,
        published=PUBLISHED,
    )
    with replace_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
        if figures is not None:
            plots.save_figures(
                [group for part in groups.values() for group in part], folder, figures
            )
    return path


def _load(runs: Run | Sequence[Run]) -> list[dict[str, Any]]:
    """Load each run: its name, table, study.json and models, with distinct names of models."""
    inputs: list[Any] = [runs] if isinstance(runs, (str, os.PathLike, pd.DataFrame)) else [*runs]
    if not inputs:
        raise ReportError("runs: empty; expected the folder of a run, or a table")
    paths = [None if isinstance(run, pd.DataFrame) else Path(run).resolve() for run in inputs]
    folders = [path for path in paths if path is not None]
    if repeated := [path for path in folders if folders.count(path) > 1]:
        raise ReportError(f"runs: {repeated[0]} is repeated; expected different runs")
    names_differ = len({path.name for path in folders}) == len(folders)
    loaded: list[dict[str, Any]] = []
    for number, (run, path) in enumerate(zip(inputs, paths, strict=True), 1):
        table, study = (run, {}) if path is None else load_run(run)
        name = f"table {number}" if path is None else path.name if names_differ else str(path)
        loaded.append({"name": name, "table": table, "study": study})
        configured = study.get("configuration", {}).get("models", {})
        loaded[-1]["names"] = list(configured or table["model"].unique())
    all_names = [name for run in loaded for name in run["names"]]
    for run in loaded:
        run["models"] = [
            _make_findings(name, run, all_names.count(name) > 1) for name in run["names"]
        ]
        run["about"] = dict(run["study"].get("about", {}))
        seconds = run["study"].get("seconds", 0.0)
        run["unit_time"] = timedelta(seconds=round(seconds)) if seconds else None
        run["missing"] = table.attrs.get("missing")
        run["versions"] = run["study"].get("configuration", {}).get("versions", {})
    return loaded


def _make_findings(name_in_run: str, run: dict[str, Any], shared: bool) -> NetworkFindings:
    """Make the findings of one network of a run; the run's name is appended to a shared name."""
    table, study = run["table"], run["study"]
    name = f"{name_in_run} ({run['name']})" if shared else str(name_in_run)
    about = study.get("about", {}).get("models", {}).get(name_in_run)
    configuration = study.get("configuration", {}).get("models", {}).get(name_in_run)
    return NetworkFindings(
        name=name,
        name_in_run=name_in_run,
        run=run["name"],
        table=table[table["model"] == name_in_run].assign(model=name),
        configuration=configuration or table.attrs.get("ablations", {}).get(name_in_run, {}),
        about=about or {"note": table.attrs.get("notes", {}).get(name_in_run)},
    )


def _make_figures(models: Sequence[NetworkFindings]) -> dict[str, list[FigureGroup]]:
    """Draw all figures, in the order of their numbers."""
    draw_each = {
        "classes": _draw_classes,
        "layers": _draw_layers,
        "grid": _draw_grid,
        "strip": _draw_strip,
        "cells": _draw_cells,
    }
    groups: dict[str, list[FigureGroup]] = {kind: [] for kind in draw_each}
    number = 0
    for kind, draw in draw_each.items():
        for model in models:
            if (result := draw(model)) is not None:
                number += 1
                groups[kind].append(FigureGroup(number, model.name, *result))
    return groups


def _draw_classes(model: NetworkFindings) -> tuple[str, list[Drawing]]:
    drawings = plots.plot_by_class(
        model.name, model.per_group, model.estimates, model.plotted_changes
    )
    return f"{model.name}: {len(model.classes)} classes.", drawings


def _draw_layers(model: NetworkFindings) -> tuple[str, list[Drawing]]:
    drawings = plots.plot_by_layer(model.name, model.per_group, model.layers, model.plotted_changes)
    return f"{model.name}, from the input to the output.", drawings


def _draw_grid(model: NetworkFindings) -> tuple[str, list[Drawing]] | None:
    """Draw the layer where ablation costs most, if its cells are a grid of known shape."""
    if model.cell_kind != "selectivity" or (chosen := _choose_layer(model)) is None:
        return None
    layer, rows, columns, caption = chosen
    n_cells = int(rows["cell"].max()) + 1
    side = math.isqrt(n_cells)
    shape = tuple(model.configuration.get("grid", (side, side)))
    if shape[0] * shape[1] != n_cells or rows["cell"].nunique() != n_cells:
        return None
    return caption, plots.plot_grid(model.name, layer, rows, (shape[0], shape[1]), columns)


def _draw_strip(model: NetworkFindings) -> tuple[str, list[Drawing]] | None:
    """Draw the cells of the layer where ablation costs most, if all classes have the same ones."""
    if model.cell_kind in ("selectivity", "random") or (chosen := _choose_layer(model)) is None:
        return None
    layer, rows, columns, caption = chosen
    costs = rows.groupby("cell")[columns[0]].mean().nlargest(3)
    names = ", ".join(str(cell) for cell in costs.index[costs > 0])
    caption += f" Cells that cost most: {names}." if names else ""
    return caption, [plots.plot_strip(model.name, layer, rows, columns)]


def _choose_layer(
    model: NetworkFindings,
) -> tuple[str, pd.DataFrame, list[str], str] | None:
    """Choose the layer where ablation costs most; return its rows, columns to draw, and a caption.

    None if no plotted change has a value.
    """
    candidates = dict.fromkeys((*model.plotted_changes, "cka", "procrustes", BASELINE))
    columns = [n for n in candidates if n in model.table and model.table[n].notna().any()]
    if not columns or columns[0] not in model.plotted_changes:
        return None
    layer, description = costliest_layer(model.table, columns[0])
    rows = model.table[model.table["layer"] == layer]
    caption = (
        f"{model.name}, layer {layer}: {description} ({CHANGE_NAMES[columns[0]]}). Means over "
        f"{rows['class'].nunique()} target classes."
    )
    return layer, rows, columns, caption


def _draw_cells(model: NetworkFindings) -> tuple[str, list[Drawing]] | None:
    """Draw, for each of the two functions, the class and layer where cells differ most in it."""
    drawings, places = [], []
    functions = [name for name in (RANK_DEFICIT, model.decodability) if name in model.changes]
    for change in functions or model.plotted_changes[:1]:
        spread = model.table.groupby(GROUP, observed=True)[change].std()
        if not spread.max() > 0:
            continue
        target, layer = spread.idxmax()
        rows = model.table[(model.table["class"] == target) & (model.table["layer"] == layer)]
        group = model.per_group[
            (model.per_group["class"] == target)
            & (model.per_group["layer"] == layer)
            & (model.per_group["change"] == change)
        ]
        rho = group.set_index("distance")["spearman"]
        drawings.append(plots.plot_cells(model.name, (target, layer), rows, rho, change))
        step = plots.thin(len(rows))
        some = f" (one in {step} cells is drawn)" if step > 1 else ""
        places.append(f"{CHANGE_NAMES[change]}: class {target}, layer {layer}{some}")
    return (f"{model.name}. {'; '.join(places)}.", drawings) if drawings else None


def _has_column(models: Sequence[NetworkFindings], column: str) -> bool:
    """Whether a network has such a distance or function change."""
    return any(column in model.distances + model.changes for model in models)
