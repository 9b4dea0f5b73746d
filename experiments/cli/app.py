"""The command line: ``repsim sweep | compare | status | compact | …``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repsim_kernels._files import find_write_obstacle
from repsim_kernels.experiments.cli.compare import compare
from repsim_kernels.experiments.cli.options import exit_on_errors, split_commas
from repsim_kernels.experiments.cli.sweep import sweep
from repsim_kernels.experiments.errors import OptionsError, ReportError, StatsError

# The commands import PyTorch, pandas and matplotlib when they need them, so that --help is fast.


class Figures(StrEnum):
    svg = "svg"
    pdf = "pdf"
    png = "png"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # fills paragraphs
    help="Compare the layers of networks, and test whether representation metrics track the "
    "function that ablated networks lose.",
)
app.command()(sweep)
app.command()(compare)

RUN = typer.Argument(help="Folder of a run.")


@app.command()
def status(run: Annotated[Path, RUN] = Path("runs/demo")) -> None:
    """Show a run's finished, remaining and failed units, its processes and the time left."""
    with exit_on_errors():
        from repsim_kernels.experiments.cli.tables import print_status
        from repsim_kernels.experiments.runs.status import read_status

        print_status(Console(highlight=False, markup=False), read_status(run))


@app.command()
def compact(run: Annotated[Path, RUN] = Path("runs/demo")) -> None:
    """Write a run's table and report from its finished units; exit code 3 if units are missing."""
    with exit_on_errors():
        from repsim_kernels.experiments.cli.tables import print_results
        from repsim_kernels.experiments.runs.store import Store

        store = Store(run)
        table = store.compact()
        print_results(Console(highlight=False, markup=False), table, store)
        if "missing" in table.attrs:
            print(f"{table.attrs['missing']} units are missing", file=sys.stderr)
            raise typer.Exit(3)


@app.command()
def train(
    model: Annotated[
        list[str] | None, typer.Option(help="Small network; repeatable. All four by default.")
    ] = None,
    dataset: Annotated[
        Path, typer.Option(help="Folder with Fashion-MNIST's gzipped idx files.")
    ] = Path("/usr/share/datasets/fashion-mnist"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the checkpoints. By default the shipped checkpoints are replaced."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Number of passes over the training images.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the initial weights and the order of the images.")
    ] = 0,
) -> None:
    """Train the small networks on Fashion-MNIST (Debian package dataset-fashion-mnist)."""
    with exit_on_errors():
        from repsim_kernels.experiments.inputs.networks import SMALL
        from repsim_kernels.experiments.inputs.train import train as run_training

        run_training(model or SMALL, dataset=dataset, out=out, epochs=epochs, seed=seed)


@app.command()
def report(
    run: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of finished runs; runs/demo by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; report.html in the first folder by default."),
    ] = None,
    figures: Annotated[
        Figures | None,
        typer.Option(help="Also write the figures as files, into a folder next to the report."),
    ] = None,
) -> None:
    """Write the report of a run, or one report of several runs."""
    with exit_on_errors():
        from repsim_kernels.experiments.report.page import write_report
        from repsim_kernels.experiments.runs.store import Store

        if out is not None and not out.is_dir() and out.suffix.lower() not in (".html", ".htm"):
            raise ReportError(f"out: {out}; expected the name of an .html file")
        runs = run or [Path("runs/demo")]
        for folder in runs:
            Store(folder)  # a missing run is reported before a missing folder for the report
        if out is not None and (why := find_write_obstacle(out)):
            raise ReportError(f"out: {why}")
        print(write_report(runs, out or runs[0] / "report.html", figures and figures.value))


@app.command()
def stats(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet file with one row per cell.")],
    distances: Annotated[
        list[str] | None,
        typer.Option(help="Columns with distances, comma-separated; a run's metrics by default."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(help="Columns with function changes, comma-separated; a run's by default."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Columns that identify a group, comma-separated; by default those of model, class "
            "and layer that the table has."
        ),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(
            help="Columns that identify a cell within a group, comma-separated; cell by default."
        ),
    ] = None,
    similarities: Annotated[
        list[str] | None,
        typer.Option(
            help="Which of --distances are similarities, comma-separated; they are negated."
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="The group column whose values the jackknife intervals leave out one by one; "
            "class by default."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the correlations of every group: .csv or .parquet."),
    ] = None,
) -> None:
    """Correlate distances with function changes in any table, group by group."""
    with exit_on_errors():
        from repsim_kernels.experiments.analysis.correlations import (
            change_columns,
            compute_correlations,
            distance_columns,
        )
        from repsim_kernels.experiments.analysis.tables import (
            check_output,
            find_problems,
            read_table,
            write_table,
        )
        from repsim_kernels.experiments.cli.tables import print_correlations
        from repsim_kernels.experiments.columns import GROUP_KEYS

        if out is not None:
            check_output(out)
        if table.is_dir():
            raise StatsError(f"table: {table} is a folder; expected a .csv or .parquet file")
        names = split_commas(by) or GROUP_KEYS
        rows = read_table(table, split_commas(cell) or ["cell"], names)
        sides = (
            split_commas(distances) or distance_columns(rows),
            split_commas(changes) or change_columns(rows),
        )
        keys = names if by else [name for name in names if name in rows.columns]
        negated = split_commas(similarities) or []
        groups = compute_correlations(rows, *sides, keys, similarities=negated)
        if cluster is not None and cluster not in keys:
            raise OptionsError(
                f"cluster: {cluster!r} is not a group column; expected {' or '.join(keys)}"
            )
        for remark in find_problems(rows, *sides, keys, negated):
            print(f"warning: {remark}", file=sys.stderr)
        print_correlations(Console(highlight=False, markup=False), groups, cluster or "class")
        if out is not None:
            write_table(groups, out)
            print(out)
