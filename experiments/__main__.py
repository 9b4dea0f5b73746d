"""The command line: ``python -m experiments sweep | train | report | stats``."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from repsim_kernels import RepsimError

if TYPE_CHECKING:
    from .jobs import Job

OURS = ("experiments", "repsim_kernels", "__main__")
# PyTorch, pandas and matplotlib are imported by the commands that need them: --help is quick.


class OptionsError(ValueError):
    """Options of the command line that can't be read, or don't go together."""


class Figures(StrEnum):
    svg = "svg"
    pdf = "pdf"
    png = "png"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Do representation metrics follow what happens to a network's function?",
)


@app.command()
def sweep(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Network, repeatable: alexnet_small, mobilenet_v2_small, resnet50_small (all "
            "three by default), a builder of torchvision.models, or package.module:callable."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A study at full size: alexnet, mobilenet_v2, mobilenet_v2_035, resnet50, or "
            "hayne2024, which is three of them as published."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint of each --model, in their order: .safetensors, or a state dict. Of a "
            "preset NAME=FILE as well, or random; torchvision's by default."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder with a sub-folder of images for each class; of a preset ImageNet's "
            "validation images, in sub-folders or flat, or random."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Ground truth of a flat ImageNet folder, if not in or beside it."),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(help="Images of each class that are read; a preset has 50.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes to study, by commas or repeated; only these of --images are read. Of "
            "ImageNet by name, wnid or index."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Modules to cut at, separated by commas or repeated.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Strips by selectivity x cells by magnitude; 4x4 by default.")
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(help="selectivity (the default), or random, of the same sizes: a control."),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help="Distances, separated by commas; all by default.")
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(
            help="Of linear decodability, by commas: ridge (the default), and paper, the "
            "published study's, which takes longer than all else."
        ),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            help="Ridge of CCA and PWCCA, relative to a stimulus's mean energy; 0.1 by default."
        ),
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Absolute penalty instead of the ridge.")
    ] = None,
    stimuli: Annotated[
        int | None, typer.Option(help="Images of each class that the metrics see; all by default.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side of the images in pixels; 32 for small networks, else 224."),
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Go on without images that can't be read.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    memory: Annotated[
        str | None,
        typer.Option(
            help="For activations and what runs, as 8GiB; half of what is free otherwise."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; 1 for small networks, else PyTorch's choice."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; one that was interrupted is gone on with.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="All layers, classes and stimuli of the demo: 1,270 units for 161."
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would run and how long, and run nothing.")
    ] = False,
) -> None:
    """Ablate networks cell by cell, and compare what metrics see with what function is lost.

    Without options: three small networks on the images that come with them, a sample of layers,
    classes and stimuli, into runs/demo.
    """
    with _one_line_errors():
        from .jobs import Asked, of_models, of_preset
        from .models import SMALL

        chosen = {
            "device": device,
            "grid": None if grid is None else _grid(grid),
            "cells": cells,
            "metrics": _split(metrics),
            "probes": _split(probes),
            "ridge": ridge,
            "penalty": penalty,
            "memory": memory,
        }
        asked = Asked(
            weights=weights,
            images=images,
            labels=labels,
            classes=_split(classes),
            layers=_split(layers),
            per_class=per_class,
            stimuli=stimuli,
            size=size,
            skip_bad=skip_bad_images,
            study={name: value for name, value in chosen.items() if value is not None},
        )
        if preset is not None:
            if model or full:
                raise OptionsError("preset: beside --model or --full; expected one of them")
            _set_up_torch(threads, small=False)
            job, name, sampled = of_preset(preset, asked), preset, False
        else:
            names = model or list(SMALL)
            _set_up_torch(threads, small=all(name in SMALL for name in names))
            sampled = not (full or images)
            job = of_models(names, asked, sampled)
            name = _folder(names if model or images else (), full)
        _run(job, out or Path("runs", name), sampled, estimate=preset is not None, dry=plan)


def _run(job: Job, folder: Path, sampled: bool, estimate: bool, dry: bool) -> None:
    """Run studies into a folder; with an estimate before it, or (dry) that alone."""
    from .plan import plan
    from .run import run, run_folder
    from .store import CONFIGURATION
    from .terminal import announce, finish, progress_of, show_plans, took

    console = Console(highlight=False, markup=False)
    units = [unit for study in job.studies for unit in study.units]
    if dry and not (folder / CONFIGURATION).exists():
        announce(job.source, job.studies, sampled)
        show_plans(console, [plan(study) for study in job.studies])
        return
    store = run_folder(job.studies, folder, {"images": job.source})
    announce(job.source, job.studies, sampled)
    print(f"Into {folder}")
    left = store.left(units)
    if not left:
        print(f"All {len(units)} units are done already.")
    todo = [[unit for unit in left if unit.model == study.name] for study in job.studies]
    pairs = [(study, mine) for study, mine in zip(job.studies, todo, strict=True) if mine]
    try:
        plans = [plan(study, mine) for study, mine in pairs] if estimate or dry else []
        if plans:
            show_plans(console, plans)
        if dry:
            return
        start = time.perf_counter()
        with progress_of(console) as progress:
            table = run(job.studies, store, progress)
    except KeyboardInterrupt:
        done = len(units) - len(store.left(units))
        print(
            f"interrupted: {done} of {len(units)} units are finished and kept in {folder}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    finish(console, table, folder)
    if plans:
        took(time.perf_counter() - start, plans)


@app.command()
def train(
    model: Annotated[
        list[str] | None, typer.Option(help="Small network, repeatable; all three by default.")
    ] = None,
    dataset: Annotated[
        Path, typer.Option(help="Folder of Fashion-MNIST's gzipped idx files.")
    ] = Path("/usr/share/datasets/fashion-mnist"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the checkpoints; the shipped ones by default.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order.")] = 0,
) -> None:
    """Train the small networks on Fashion-MNIST (Debian's dataset-fashion-mnist)."""
    with _one_line_errors():
        from .models import SMALL
        from .train import train as run_training

        run_training(model or SMALL, dataset=dataset, out=out, epochs=epochs, seed=seed)


@app.command()
def report(
    run: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of finished runs, on one page; runs/demo by default."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the first folder by default.")
    ] = None,
    figures: Annotated[
        Figures | None, typer.Option(help="The figures as files as well, in a folder beside it.")
    ] = None,
) -> None:
    """Write the report of a run again, or one of several runs."""
    with _one_line_errors():
        from .report import write_report

        runs = run or [Path("runs/demo")]
        print(write_report(runs, out or runs[0] / "report.html", figures and figures.value))


@app.command()
def stats(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet, one row per cell.")],
    distances: Annotated[
        list[str] | None, typer.Option(help="Columns, by commas; a run's metrics by default.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(help="Columns, by commas; a run's function changes by default."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Columns that name a group; of model, class, layer those there are."),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(help="Columns that tell a group's cells apart; cell by default."),
    ] = None,
    similarities: Annotated[
        list[str] | None,
        typer.Option(help="Of the distances those that are similarities: negated."),
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Column that intervals leave one out of at a time.")
    ] = "class",
    out: Annotated[
        Path | None, typer.Option(help="The correlations of every group: .csv or .parquet.")
    ] = None,
) -> None:
    """Correlate any table's distances with its function changes, group by group."""
    with _one_line_errors():
        from .stats import changes_of, correlations, distances_of
        from .tables import check_suffix, read, remarks, write
        from .terminal import show_correlations

        if out is not None:
            check_suffix("out", out)
        rows = read(table, _split(cell) or ["cell"])
        sides = _split(distances) or distances_of(rows), _split(changes) or changes_of(rows)
        keys = _split(by) or [name for name in ("model", "class", "layer") if name in rows.columns]
        turned = _split(similarities) or []
        groups = correlations(rows, *sides, keys, similarities=turned)
        for remark in remarks(rows, *sides, keys, turned):
            print(f"warning: {remark}", file=sys.stderr)
        show_correlations(Console(highlight=False, markup=False), groups, cluster)
        if out is not None:
            write(groups, out)
            print(out)


def _set_up_torch(threads: int | None, small: bool) -> None:
    import torch

    torch.set_flush_denormal(True)  # tiny activations are slow on a CPU otherwise
    if threads is None and small:
        # Matrices of a few hundred stimuli are too small to share: two threads take twice as long
        # as one, and twenty times on a machine that is busy with something else.
        threads = 1
    if threads is not None:
        if threads < 1:
            raise OptionsError(f"threads: {threads}; expected 1 or more")
        torch.set_num_threads(threads)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the command with one line and exit code 2 where what was asked for can't be done."""
    try:
        with _plain_warnings():
            yield
    except (RepsimError, ValueError, OSError) as error:
        # A ValueError from elsewhere is a bug, whose traceback is wanted.
        package = type(error).__module__.partition(".")[0]
        if package not in OURS and not isinstance(error, OSError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as a line for the person who runs the command, without a place in the code."""

    def show(message: Warning | str, *_: object) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _split(values: Sequence[str] | None) -> list[str] | None:
    if not values:
        return None
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise OptionsError(f"grid: {text!r}; expected two numbers such as 4x4")
    return int(rows), int(columns)


def _folder(names: Sequence[str], full: bool) -> str:
    demo = "demo-full" if full else "demo"
    return "+".join(name.replace(":", ".") for name in names) or demo


if __name__ == "__main__":
    app()
