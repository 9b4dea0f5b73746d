"""What a person sees of a run in the terminal."""

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
    changes_of,
    correlations,
    distances_of,
    means,
    summary,
)
from repsim_kernels.experiments.cli.progress import format_duration, format_rate
from repsim_kernels.experiments.columns import METRIC_NAMES
from repsim_kernels.experiments.report.findings import count_nan_images, near_chance
from repsim_kernels.experiments.runs.store import TABLE

if TYPE_CHECKING:
    from repsim_kernels.experiments.cli.request import StudySet
    from repsim_kernels.experiments.runs.status import Status
    from repsim_kernels.experiments.runs.store import Store
    from repsim_kernels.experiments.study.estimate import Plan
    from repsim_kernels.experiments.study.study import Study

HEADS = {
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


def print_studies(job: StudySet, sampled: bool, about: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what is going to run, how its weights were read, and what its images are.

    Parameters
    ----------
    job : StudySet
    sampled : bool
        Whether it is a part of the demo.
    about : mapping
        What the run's folder says of each study, by name (see `measure.describe`); no accuracy is
        printed of studies that are not in it.
    """
    from repsim_kernels.experiments.inputs.pixels import describe_size

    print(f"Images: {job.source}")
    for study in job.studies:
        print(_extent(study))
    if sampled:
        print("A sample, to be quick; --full runs all layers, classes and stimuli.")
    for remark in job.remarks:
        print(remark)
    for study, normalisation in zip(job.studies, job.normalisations, strict=True):
        size = describe_size(study.images.shape[2:])
        line = f"{study.name}: {size} pixels, {normalisation}"
        facts = about.get(study.name, {})
        if "accuracy" in facts:
            line += f", {100 * facts['accuracy']:.1f} % right of {facts['images']} images"
        print(line)


def _extent(study: Study) -> str:
    targets = [str(study.class_name(label)) for label in study.targets]
    per_class = study.metric_images
    which = "all" if per_class is None else f"the first {per_class} of each class"
    beside = "" if study.others is None else f", {study.others} other classes drawn for each target"
    return (
        f"{study.name}{'' if study.note is None else f' ({study.note})'}\n"
        f"  layers ({len(study.layers)}): {_some(study.layers)}\n"
        f"  target classes ({len(targets)} of {len(study.present)}): {_some(targets)}\n"
        f"  stimuli of the metrics: {study.stimuli} of {len(study.labels)} images, {which}{beside}"
    )


def _some(names: Sequence[str]) -> str:
    shown = list(names) if len(names) <= 16 else [*names[:8], "…", *names[-2:]]
    return ", ".join(shown)


def warn_if_near_chance(store: Store) -> None:
    """Say which of a run's networks are near chance, if any."""
    for name, about in store.study.get("about", {}).get("models", {}).items():
        if how := near_chance(about):
            print(
                f"{name} is near chance: {how}. What it shows is no evidence; no claim is judged."
            )


def print_results(console: Console, table: pd.DataFrame, store: Store) -> None:
    """Print the mean correlations, write the report, say where things are."""
    from repsim_kernels.experiments.report.page import write_report  # imports matplotlib

    warn_if_near_chance(store)
    changes, folder = changes_of(table), store.folder
    wide = means(correlations(table, distances_of(table), changes))
    notes = table.attrs.get("notes", {})
    for model in table["model"].unique():
        note = f" ({notes[model]})" if model in notes else ""
        print(f"Mean Spearman correlation, {model}{note}")
        view = _table(["metric"], [HEADS[change] for change in changes])
        for metric, row in wide.loc[model].iterrows():
            numbers = ("-" if value != value else f"{value:.2f}" for value in row)
            view.add_row(METRIC_NAMES[metric], *numbers)
        _show(console, view)
        if count := count_nan_images(table[table["model"] == model]):
            print(f"{model}: {count}.")
    print(folder / "results.parquet")
    print(write_report(folder, folder / "report.html"))


def _table(names: Sequence[str], numbers: Sequence[str], padding: int = 0) -> Table:
    """A table of some columns of text, and then of numbers."""
    view = Table(box=SIMPLE, padding=(0, padding))
    for head in names:
        view.add_column(head, no_wrap=True)
    for head in numbers:
        view.add_column(head, justify="right", no_wrap=True)
    return view


def _show(console: Console, view: Table) -> None:
    """Print a table whole, however narrow the terminal: what is cut off can't be read."""
    natural = console.measure(view, options=console.options.update_width(1000)).maximum
    if natural > console.width:
        console = Console(file=console.file, width=natural, highlight=False, markup=False)
    console.print(view)


def print_correlations(console: Console, groups: pd.DataFrame, cluster: str) -> None:
    """Print what the groups' correlations come to, with an interval over the clusters."""
    from repsim_kernels.experiments.analysis.inference import intervals

    by = list(groups.columns[: groups.columns.get_loc("distance")])
    keep = [name for name in by if name == "model" and name != cluster]
    keys = [*keep, "distance", "change"]
    rows = summary(groups, keep)
    if cluster in by:
        rows = rows.merge(intervals(groups, keep, cluster)[[*keys, "low", "high"]], on=keys)
    heads = {
        "spearman": "mean\nrho",
        "low": "95 %\nfrom",
        "high": "\nto",
        "kendall": "mean\ntau-b",
        "groups": "groups",
        "nan_groups": "without",
    }
    shown = [name for name in heads if name in rows.columns]
    view = _table(keys, [heads[name] for name in shown])
    for row in rows[[*keys, *shown]].itertuples(index=False):
        view.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    print(f"{len(groups.drop_duplicates(by))} groups by {', '.join(by)}")
    _show(console, view)
    if cluster in by:
        print(f"Intervals: jackknife-t over {cluster}. Groups without a correlation are left out.")


def print_plans(console: Console, plans: Sequence[Plan], workers: int = 1) -> None:
    """What each network is going to take, layer by layer, and all of them by some workers."""
    for plan in plans:
        print(
            f"Plan, {plan.name}: {plan.targets} target classes x {plan.cells} cells x "
            f"{plan.images} images, metrics over {plan.stimuli} stimuli"
        )
        heads = ["neurons", "cells\ntogether", "TFLOP\nforward", "TFLOP\nmetrics", "GiB\nheld"]
        fits = any(line.fits for line in plan.layers)
        view = _table(["layer"], [*heads, *(["logistic\nfits"] if fits else []), "time"], 1)
        for line in plan.layers:
            view.add_row(
                line.layer,
                f"{line.neurons:,}",
                str(line.together),
                f"{line.forward_flops / 1e12:.3g}",
                f"{line.metric_flops / 1e12:.3g}",
                f"{line.held / 2**30:.2f}",
                *([f"{line.fits:,}"] if fits else []),
                format_duration(line.seconds),
            )
        _show(console, view)
        many = "pass" if plan.passes == 1 else "passes"
        print(
            f"  {plan.passes} {many} of all images for all layers, "
            f"{plan.pass_flops / 1e12:.3g} TFLOP, {format_duration(plan.pass_seconds)}; "
            f"{plan.held / 2**30:.2f} GiB of activations at most, of "
            f"{plan.memory / 2**30:.2f} GiB of memory\n"
        )
    flops, seconds = (sum(getattr(plan, what) for plan in plans) for what in ("flops", "seconds"))
    who = "on this device" if workers == 1 else f"by {workers} workers like this one"
    print(
        f"Plan: {flops / 1e12:.3g} TFLOP, about {format_duration(seconds / workers)} {who}.",
        flush=True,
    )


def print_elapsed(seconds: float, plans: Sequence[Plan], workers: int = 1) -> None:
    """Hold what a run took against its plan."""
    said = sum(plan.seconds for plan in plans) / workers
    print(f"Took {format_duration(seconds)}; the plan said {format_duration(said)}.")


_SHOWN = 5  # errors


def print_status(console: Console, status: Status) -> None:
    """Print a run's status."""
    counts = f"{status.done} of {status.total} units done, {status.left} left"
    if status.failed:
        counts += f", {len(status.failed)} failed"
    _say(console, f"{status.folder}: {counts}")
    view = Table(box=SIMPLE, padding=0)
    view.add_column("model", overflow="fold")
    for head in ("units", "done", "left", "failed"):
        view.add_column(head, justify="right", no_wrap=True)
    for share in status.shares:
        numbers = share.total, share.done, share.left, share.failed
        view.add_row(Text(share.model), *map(str, numbers))
    console.print(view)
    for lines in (_faults(status), _work(status), _outcome(status)):
        for line in lines:
            _say(console, line)


def _say(console: Console, line: str) -> None:
    # Wrapped between words alone: rich would break a path that is to be copied.
    for part in textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False):
        console.print(part, markup=False, highlight=False, soft_wrap=True)


def _faults(status: Status) -> Iterator[str]:
    told = [f"failed: {unit}: {error}" for unit, error in status.failed.items()]
    yield from told[:_SHOWN]
    if len(told) > _SHOWN:
        yield f"failed: {len(told) - _SHOWN} more, see {status.folder / 'failed'}"
    for unit, reason in status.damaged.items():
        yield f"damaged: {unit} counts as left: {reason}"


def _work(status: Status) -> Iterator[str]:
    for driver in status.drivers:
        shard = "" if driver.shard == "1/1" else f", shard {driver.shard}"
        yield f"At work: {driver}, {_workers(driver.workers)}{shard}"
    if not status.drivers and status.left + len(status.failed):
        again = ", and tries again what failed" if status.failed else ""
        yield f"Nobody works on it now; the command that began it goes on from here{again}."
    if not status.left:
        return
    if status.seconds_left is None or status.per_minute is None:
        yield "Rate and time left are not known until a unit is done."
    else:
        who = _workers(status.workers) if status.drivers else "one worker"
        yield (
            f"{format_duration(status.seconds_left)} left for {who}, "
            f"{format_rate(status.per_minute)}, by what finished units took"
        )


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _outcome(status: Status) -> Iterator[str]:
    if status.left or status.drivers or not status.done:
        return
    all_done = "All but the failed units are done" if status.failed else "All units are done"
    path = status.folder / TABLE
    if status.table == status.done:
        yield f"{all_done}: {path}"
    else:
        lacks = "is missing" if status.table is None else f"has only {status.table} of them"
        yield f"{all_done}, but {path} {lacks}:"
        yield f"repsim compact {status.folder}"
