"""The command line: ``repsim sweep | status | compact | …``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repsim_kernels.experiments.cli.options import exit_on_errors, split_commas
from repsim_kernels.experiments.cli.sweep import sweep
from repsim_kernels.experiments.errors import OptionsError

# PyTorch, pandas and matplotlib are imported by the commands that need them: --help is quick.


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
app.command()(sweep)


RUN = typer.Argument(help="Folder of a run; runs/demo by default.")


@app.command()
def status(run: Annotated[Path, RUN] = Path("runs/demo")) -> None:
    """Say what of a run is done, left and failed, who works on it, and how long it will take."""
    with exit_on_errors():
        from repsim_kernels.experiments.cli.tables import print_status
        from repsim_kernels.experiments.runs.status import status as status_of

        print_status(Console(highlight=False, markup=False), status_of(run))


@app.command()
def compact(run: Annotated[Path, RUN] = Path("runs/demo")) -> None:
    """Make a run's table and report of what is finished; exit code 3 where units are missing."""
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
    with exit_on_errors():
        from repsim_kernels.experiments.inputs.networks import SMALL
        from repsim_kernels.experiments.inputs.train import train as run_training

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
    with exit_on_errors():
        from repsim_kernels.experiments.report.page import write_report

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
        str | None,
        typer.Option(
            help="Of the columns that name a group, the one that intervals leave one out of at a "
            "time; class by default."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The correlations of every group: .csv or .parquet.")
    ] = None,
) -> None:
    """Correlate any table's distances with its function changes, group by group."""
    with exit_on_errors():
        from repsim_kernels.experiments.analysis.correlations import (
            changes_of,
            correlations,
            distances_of,
        )
        from repsim_kernels.experiments.analysis.tables import check_output, read, remarks, write
        from repsim_kernels.experiments.cli.tables import print_correlations
        from repsim_kernels.experiments.columns import GROUP_KEYS

        if out is not None:
            check_output(out)
        names = split_commas(by) or GROUP_KEYS
        rows = read(table, split_commas(cell) or ["cell"], names)
        sides = (
            split_commas(distances) or distances_of(rows),
            split_commas(changes) or changes_of(rows),
        )
        keys = names if by else [name for name in names if name in rows.columns]
        turned = split_commas(similarities) or []
        groups = correlations(rows, *sides, keys, similarities=turned)
        if cluster is not None and cluster not in keys:
            raise OptionsError(f"cluster: {cluster!r} names no group; expected {' or '.join(keys)}")
        for remark in remarks(rows, *sides, keys, turned):
            print(f"warning: {remark}", file=sys.stderr)
        print_correlations(Console(highlight=False, markup=False), groups, cluster or "class")
        if out is not None:
            write(groups, out)
            print(out)


if __name__ == "__main__":
    app()
