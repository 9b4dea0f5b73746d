"""Print studies, plans, results, correlations and the status of a run in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd  # type: ignore[import-untyped]
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from repsim_kernels.experiments.analysis.correlations import (
    change_columns,
    compute_correlations,
    distance_columns,
    summarise,
    tabulate_means,
)
from repsim_kernels.experiments.analysis.shuffles import PERCENT, find_threshold
from repsim_kernels.experiments.cli.progress import format_duration, format_rate
from repsim_kernels.experiments.columns import METRIC_NAMES
from repsim_kernels.experiments.report.findings import (
    count_nan_images,
    describe_near_chance,
    format_range,
)
from repsim_kernels.experiments.runs.store import TABLE

if TYPE_CHECKING:
    from repsim_kernels.experiments.cli.request import StudySet
    from repsim_kernels.experiments.runs.status import Status
    from repsim_kernels.experiments.runs.store import Store
    from repsim_kernels.experiments.study.estimate import Plan
    from repsim_kernels.experiments.study.study import Study

COLUMN_HEADS = {
    "rank_deficit": "rank\ndeficit",
    "log_probability": "log-\nprob.",
    "probability": "prob.",
    "top1": "top-1",
    "top5": "top-5",
    "decodability_refit": "decod.\nrefit",
    "decodability_frozen": "decod.\nfrozen",
    "margin_refit": "margin\nrefit",
    "margin_frozen": "margin\nfrozen",
    "decodability_paper": "decod.\npaper",
}


def print_studies(
    study_set: StudySet, sampled: bool, about: Mapping[str, Mapping[str, Any]]
) -> None:
    """Print what is going to run, how its weights were read, and what its images are.

    Parameters
    ----------
    study_set : StudySet
    sampled : bool
        Whether it is the demo's sample of layers, classes and images.
    about : mapping
        The facts of each study from the run's folder, by name (see `measure.describe`). The
        accuracy is printed only for studies that it contains.
    """
    from repsim_kernels.experiments.inputs.pixels import describe_size

    print(f"Images: {study_set.source}")
    for study in study_set.studies:
        print(_describe_study(study))
    if sampled:
        print("This is a quick sample; --full runs all layers, classes and images.")
    for remark in study_set.remarks:
        print(remark)
    for study, normalisation in zip(study_set.studies, study_set.normalisations, strict=True):
        size = describe_size(study.images.shape[2:])
        line = f"{study.name}: {size} pixels, {normalisation}"
        facts = about.get(study.name, {})
        if "accuracy" in facts:
            line += f", accuracy {100 * facts['accuracy']:.1f} % on {facts['images']} images"
        print(line)


def _describe_study(study: Study) -> str:
    targets = [str(study.class_name(label)) for label in study.targets]
    per_class = study.metric_images
    selection = "" if per_class is None else f", the first {per_class} of each class"
    others = "" if study.others is None else f", {study.others} other classes drawn for each target"
    return (
        f"{study.name}{'' if study.note is None else f' ({study.note})'}\n"
        f"  layers ({len(study.layers)}): {_abbreviate(study.layers)}\n"
        f"  target classes ({len(targets)} of {len(study.unique_labels)}): {_abbreviate(targets)}\n"
        f"  images for the metrics: {study.n_stimuli} of {len(study.labels)}{selection}{others}"
    )


def _abbreviate(names: Sequence[str]) -> str:
    parts = list(names) if len(names) <= 16 else [*names[:8], "…", *names[-2:]]
    return ", ".join(parts)


def warn_if_near_chance(store: Store) -> None:
    """Print which of a run's networks perform near chance, if any."""
    for name, about in store.study.get("about", {}).get("models", {}).items():
        if accuracy := describe_near_chance(about):
            print(
                f"{name} is near chance: {accuracy}. "
                "Do not treat its results as evidence; the report judges no claims."
            )


def print_results(console: Console, table: pd.DataFrame, store: Store) -> None:
    """Print the mean correlations, write the report, and print the paths of the files."""
    from repsim_kernels.experiments.report.page import write_report  # imports matplotlib

    warn_if_near_chance(store)
    distances, changes, folder = distance_columns(table), change_columns(table), store.folder
    wide = tabulate_means(compute_correlations(table, distances, changes))
    notes = table.attrs.get("notes", {})
    for model in table["model"].unique():
        note = f" ({notes[model]})" if model in notes else ""
        print(f"Mean Spearman correlation, {model}{note}")
        view = _make_table(["metric"], [COLUMN_HEADS[change] for change in changes])
        own = table[table["model"] == model]
        threshold = find_threshold(own, distances, changes)
        beyond = wide.loc[model].abs() > threshold
        marks = [(" ", "*") if beyond[change].any() else ("", "") for change in changes]
        for metric, row in wide.loc[model].iterrows():
            numbers = (
                "-" if value != value else f"{value:.2f}{mark[abs(value) > threshold]}"
                for value, mark in zip(row, marks, strict=True)
            )
            view.add_row(METRIC_NAMES[metric], *numbers)
        _print_table(console, view)
        if beyond.any(axis=None):
            print(
                f"* above {threshold:.2f} in absolute value: beyond what shuffling the cells gives "
                f"({PERCENT} %, maximum over the table)"
            )
        if count := count_nan_images(own):
            print(f"{model}: {count}.")
    print(folder / "results.parquet")
    print(write_report(folder, folder / "report.html"))


def _make_table(names: Sequence[str], numbers: Sequence[str], padding: int = 0) -> Table:
    """Make a table with columns of text, followed by columns of numbers."""
    view = Table(box=SIMPLE, padding=(0, padding))
    for head in names:
        view.add_column(head, no_wrap=True)
    for head in numbers:
        view.add_column(head, justify="right", no_wrap=True)
    return view


def _print_table(console: Console, view: Table) -> None:
    """Print a table at full width even in a narrow terminal, which would truncate it."""
    full_width = console.measure(view, options=console.options.update_width(1000)).maximum
    if full_width > console.width:
        console = Console(file=console.file, width=full_width, highlight=False, markup=False)
    console.print(view)


def print_correlations(console: Console, groups: pd.DataFrame, cluster: str) -> None:
    """Print the mean correlations over groups, with intervals over the clusters."""
    from repsim_kernels.experiments.analysis.inference import compute_intervals

    by = list(groups.columns[: groups.columns.get_loc("distance")])
    keep = [name for name in by if name == "model" and name != cluster]
    keys = [*keep, "distance", "change"]
    rows = summarise(groups, keep)
    if cluster in by:
        rows = rows.merge(compute_intervals(groups, keep, cluster)[[*keys, "low", "high"]], on=keys)
    heads = {
        "spearman": "mean\nrho",
        "low": "95 %\nfrom",
        "high": "\nto",
        "kendall": "mean\ntau-b",
        "groups": "groups",
        "nan_groups": "without\nrho",
    }
    columns = [name for name in heads if name in rows.columns]
    view = _make_table(keys, [heads[name] for name in columns])
    for row in rows[[*keys, *columns]].itertuples(index=False):
        view.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    print(f"{len(groups.drop_duplicates(by))} groups by {', '.join(by)}")
    _print_table(console, view)
    if cluster in by:
        print(f"Intervals: jackknife-t over {cluster}. Groups without a correlation are left out.")


def print_plans(console: Console, plans: Sequence[Plan], workers: int = 1) -> None:
    """Print the estimated cost of each network, layer by layer, and the total for the workers."""
    for plan in plans:
        cells = format_range([line.cells for line in plan.layers])
        print(
            f"Plan for {plan.name}: {plan.targets} target classes x {cells} cells x "
            f"{plan.images} images; metrics use {plan.stimuli} images"
        )
        heads = ["neurons", "cells per\nbatch", "TFLOP\nforward", "TFLOP\nmetrics", "GiB\nmemory"]
        fits = any(line.fits for line in plan.layers)
        view = _make_table(["layer"], [*heads, *(["logistic\nfits"] if fits else []), "time"], 1)
        for line in plan.layers:
            view.add_row(
                line.layer,
                f"{line.neurons:,}",
                str(line.cells_per_batch),
                f"{line.forward_flops / 1e12:.3g}",
                f"{line.metric_flops / 1e12:.3g}",
                f"{line.bytes_held / 2**30:.2f}",
                *([f"{line.fits:,}"] if fits else []),
                format_duration(line.seconds),
            )
        _print_table(console, view)
        noun = "pass" if plan.passes == 1 else "passes"
        print(
            f"  {plan.passes} {noun} over all images for all layers: "
            f"{plan.pass_flops / 1e12:.3g} TFLOP, {format_duration(plan.pass_seconds)}; "
            f"at most {plan.bytes_held / 2**30:.2f} GiB of activations in "
            f"{plan.memory / 2**30:.2f} GiB of memory\n"
        )
    flops, seconds = (sum(getattr(plan, name) for plan in plans) for name in ("flops", "seconds"))
    place = "on this device" if workers == 1 else f"with {workers} workers like this one"
    print(
        f"Plan: {flops / 1e12:.3g} TFLOP, about {format_duration(seconds / workers)} {place}.",
        flush=True,
    )


def print_elapsed(seconds: float, plans: Sequence[Plan], workers: int = 1) -> None:
    """Print how long a run took, compared with its plan."""
    estimate = sum(plan.seconds for plan in plans) / workers
    print(f"Took {format_duration(seconds)} (estimated: {format_duration(estimate)}).")


_MAX_ERRORS = 5  # listed individually


def print_status(console: Console, status: Status) -> None:
    """Print a run's status."""
    counts = f"{status.done} of {status.total} units done, {status.remaining} left"
    if status.failed:
        counts += f", {len(status.failed)} failed"
    _print_wrapped(console, f"{status.folder}: {counts}")
    view = Table(box=SIMPLE, padding=0)
    view.add_column("model", overflow="fold")
    for head in ("units", "done", "left", "failed"):
        view.add_column(head, justify="right", no_wrap=True)
    for model in status.models:
        numbers = model.total, model.done, model.remaining, model.failed
        view.add_row(Text(model.model), *map(str, numbers))
    console.print(view)
    for lines in (_list_problems(status), _describe_activity(status), _describe_outcome(status)):
        for line in lines:
            _print_wrapped(console, line)


def _print_wrapped(console: Console, line: str) -> None:
    # Wrap only between words: rich would break paths, which people copy.
    for part in textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False):
        console.print(part, markup=False, highlight=False, soft_wrap=True)


def _list_problems(status: Status) -> Iterator[str]:
    failures = [f"failed: {unit}: {error}" for unit, error in status.failed.items()]
    yield from failures[:_MAX_ERRORS]
    if len(failures) > _MAX_ERRORS:
        yield f"failed: {len(failures) - _MAX_ERRORS} more; see {status.folder / 'failed'}"
    for unit, reason in status.damaged.items():
        yield f"damaged: {unit} will be measured again: {reason}"


def _describe_activity(status: Status) -> Iterator[str]:
    for driver in status.drivers:
        shard = "" if driver.shard == "1/1" else f", shard {driver.shard}"
        yield f"Running: {driver}, {_count_workers(driver.workers)}{shard}"
    if not status.drivers and status.remaining + len(status.failed):
        retry = " and to retry failed units" if status.failed else ""
        yield f"Not running now; run the original command again to resume{retry}."
    if not status.remaining:
        return
    if status.seconds_left is None or status.per_minute is None:
        yield "Rate and remaining time are unknown until a unit is finished."
    else:
        yield (
            f"About {format_duration(status.seconds_left)} left with "
            f"{_count_workers(max(1, status.workers))} ({format_rate(status.per_minute)}), "
            "estimated from finished units"
        )


def _count_workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _describe_outcome(status: Status) -> Iterator[str]:
    if status.remaining or status.drivers or not status.done:
        return
    all_done = "All but the failed units are done" if status.failed else "All units are done"
    path = status.folder / TABLE
    if status.table == status.done:
        yield f"{all_done}: {path}"
    else:
        problem = "is missing" if status.table is None else f"has only {status.table} of them"
        yield f"{all_done}, but {path} {problem}; run:"
        yield f"repsim compact {status.folder}"
