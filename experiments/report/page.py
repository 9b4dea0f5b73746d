"""One self-contained HTML page about runs: what was found, the numbers, where they come from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels.experiments.analysis.published import PUBLISHED, SOURCE
from repsim_kernels.experiments.columns import BASELINE, CHANGE_NAMES, METRIC_NAMES
from repsim_kernels.experiments.errors import ReportError
from repsim_kernels.experiments.files import replacing, why_not_writable
from repsim_kernels.experiments.report import figures as draw
from repsim_kernels.experiments.report.figures import Drawing, Plate
from repsim_kernels.experiments.report.findings import (
    GROUP,
    RANK_DEFICIT,
    Model,
    costliest_layer,
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
        Folders of finished runs, or tables such as `Study.run` returns; a table
        alone doesn't say what ran. A model's name that two runs have gets the folder's behind it.
    path : path
        The HTML file; it is replaced only when the new one is whole.
    figures : {"svg", "pdf", "png"}, optional
        Write the figures as files too, into the folder ``PATH_figures`` beside the page, without
        its suffix. An earlier report's are replaced, all of them or none.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ReportError
        ``path`` is a folder or in none, ``figures`` is none of these, the folder for them holds
        other files, there are no runs, or one is named twice.
    StoreError
        A folder is not that of a finished run.
    StatsError
        A table lacks a column.
    """
    path = Path(path)
    if why := why_not_writable(path):
        raise ReportError(f"out: {why}")
    folder = path.with_name(f"{path.stem}_figures")
    if figures is not None:
        draw.check(figures, folder)
    loaded = _load(runs)
    models = [model for run in loaded for model in run["models"]]
    plates = _plates(models)
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
        plates=plates,
        styles={key: style for key, style in draw.STYLES.items() if _any(models, key)},
        metric_names=METRIC_NAMES,
        change_names=CHANGE_NAMES,
        changes=[name for name in CHANGE_NAMES if _any(models, name)],
        performance=RANK_DEFICIT,
        cells=" or ".join(str(n) for n in sorted({m.table["cell"].nunique() for m in models})),
        baseline=BASELINE,
        source=SOURCE,
        published=PUBLISHED,
    )
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
        if figures is not None:
            draw.save([plate for each in plates.values() for plate in each], folder, figures)
    return path


def _load(runs: Run | Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's name, what it says of itself, and its models under names of their own."""
    each: list[Any] = [runs] if isinstance(runs, (str, os.PathLike, pd.DataFrame)) else [*runs]
    if not each:
        raise ReportError("runs: is empty; expected a run's folder or a table")
    paths = [None if isinstance(run, pd.DataFrame) else Path(run).resolve() for run in each]
    folders = [path for path in paths if path is not None]
    if twice := [path for path in folders if folders.count(path) > 1]:
        raise ReportError(f"runs: {twice[0]} is named twice; expected different runs")
    short = len({path.name for path in folders}) == len(folders)
    loaded: list[dict[str, Any]] = []
    for number, (run, path) in enumerate(zip(each, paths, strict=True), 1):
        table, study = (run, {}) if path is None else load_run(run)
        name = f"table {number}" if path is None else path.name if short else str(path)
        loaded.append({"name": name, "table": table, "study": study})
        configured = study.get("configuration", {}).get("models", {})
        loaded[-1]["names"] = list(configured or table["model"].unique())
    shared = [name for run in loaded for name in run["names"]]
    for run in loaded:
        run["models"] = [_model(name, run, shared.count(name) > 1) for name in run["names"]]
        run["about"] = dict(run["study"].get("about", {}))
        seconds = run["study"].get("seconds", 0.0)
        run["took"] = timedelta(seconds=round(seconds)) if seconds else None
        run["missing"] = table.attrs.get("missing")
        run["versions"] = run["study"].get("configuration", {}).get("versions", {})
    return loaded


def _model(own_name: str, run: dict[str, Any], shared: bool) -> Model:
    table, study = run["table"], run["study"]
    name = f"{own_name} ({run['name']})" if shared else str(own_name)
    about = study.get("about", {}).get("models", {}).get(own_name)
    return Model(
        name=name,
        own_name=own_name,
        run=run["name"],
        table=table[table["model"] == own_name].assign(model=name),
        configuration=study.get("configuration", {}).get("models", {}).get(own_name, {}),
        about=about or {"note": table.attrs.get("notes", {}).get(own_name)},
    )


def _plates(models: Sequence[Model]) -> dict[str, list[Plate]]:
    """All figures, in the order in which they are numbered."""
    plates: dict[str, list[Plate]] = {"classes": [], "layers": [], "grid": [], "cells": []}
    number = 0
    for kind, make in zip(plates, (_classes, _layers, _grid, _cells), strict=True):
        for model in models:
            if (made := make(model)) is not None:
                number += 1
                plates[kind].append(Plate(number, model.name, *made))
    return plates


def _classes(model: Model) -> tuple[str, list[Drawing]]:
    drawings = draw.by_class(model.name, model.per_group, model.estimates, model.drawn)
    return f"{model.name}: {len(model.classes)} classes.", drawings


def _layers(model: Model) -> tuple[str, list[Drawing]]:
    drawings = draw.by_layer(model.name, model.per_group, model.layers, model.drawn)
    return f"{model.name}, from the input to the output.", drawings


def _grid(model: Model) -> tuple[str, list[Drawing]] | None:
    """The layer where ablation costs most, if its cells are a grid of known shape."""
    wanted = (*model.drawn, "cka", "procrustes", BASELINE)
    shown = [n for n in dict.fromkeys(wanted) if n in model.table and model.table[n].notna().any()]
    if not shown or shown[0] not in model.drawn or model.random:
        return None
    layer, said = costliest_layer(model.table, shown[0])
    mine = model.table[model.table["layer"] == layer]
    cells = int(mine["cell"].max()) + 1
    side = math.isqrt(cells)
    shape = tuple(model.configuration.get("grid", (side, side)))
    if shape[0] * shape[1] != cells or mine["cell"].nunique() != cells:
        return None
    caption = (
        f"{model.name}, layer {layer}: {said} ({CHANGE_NAMES[shown[0]]}). Means over "
        f"{mine['class'].nunique()} target classes."
    )
    return caption, draw.grid(model.name, layer, mine, (shape[0], shape[1]), shown)


def _cells(model: Model) -> tuple[str, list[Drawing]] | None:
    """For each of the two functions, the class and layer where the cells differ most in it."""
    drawings, places = [], []
    functions = [name for name in (RANK_DEFICIT, model.decodability) if name in model.changes]
    for change in functions or model.drawn[:1]:
        spread = model.table.groupby(GROUP, observed=True)[change].std()
        if not spread.max() > 0:
            continue
        target, layer = spread.idxmax()
        mine = model.table[(model.table["class"] == target) & (model.table["layer"] == layer)]
        found = model.per_group[
            (model.per_group["class"] == target)
            & (model.per_group["layer"] == layer)
            & (model.per_group["change"] == change)
        ]
        rho = found.set_index("distance")["spearman"]
        drawings.append(draw.scatter(model.name, (target, layer), mine, rho, change))
        places.append(f"{CHANGE_NAMES[change]}: class {target}, layer {layer}")
    return (f"{model.name}. {'; '.join(places)}.", drawings) if drawings else None


def _any(models: Sequence[Model], column: str) -> bool:
    return any(column in model.distances + model.changes for model in models)
