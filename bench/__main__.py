"""The command line, ``python -m bench``; bench/README.md explains each command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bench.common import machine
from bench.common.machine import Json
from repsim_kernels.experiments.cli.signals import handle_termination

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
BENCH = Path(__file__).parent
Out = Annotated[Path, typer.Option(help="Path of the page.")]


@app.callback()
def bench() -> None:
    """Measure or predict the speed and accuracy of the kernels, and compare them with others."""


@contextmanager
def report_usage_errors() -> Iterator[None]:
    """Report wrong arguments in one line instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None


def write_page(out: Path, page: str) -> None:
    out.write_text(page, encoding="utf-8")
    print(out)


def show_record(
    kind: str, measure: Callable[[bool], Json], describe: Callable[[Json], str], quick: bool
) -> None:
    """Measure a record, print its description and, unless ``quick``, save it."""
    with report_usage_errors():
        record = measure(quick)
    print(describe(record))
    if not quick:
        out = machine.RESULTS / f"{kind}-{machine.slugify_device('cpu')}.json"
        machine.save(out, record)
        print(out)


@app.command()
def model(out: Out = BENCH / "MODEL.md") -> None:
    """Write the predicted cost of the kernels on an H200; needs no GPU."""
    from bench.predict.model import render_page

    write_page(out, render_page())


@app.command()
def coverage(out: Out = BENCH / "COVERAGE.md") -> None:
    """Write how often the study's intervals contain the truth, by simulation; needs no GPU."""
    from bench.coverage import render_page

    write_page(out, render_page())


@app.command()
def scaling(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a finished run; by default, run the demo.")
    ] = None,
) -> None:
    """Predict the run time with more workers from the seconds per unit, without start-up."""
    from bench.scaling import format_table, load_unit_seconds, measure_demo
    from repsim_kernels.experiments.errors import StoreError

    if run is None:
        record = measure_demo()
        out = machine.RESULTS / f"scaling-{machine.slugify_device('cpu')}.json"
        machine.save(out, record)
        print(format_table(record["runs"][-1]["units"]), out, sep="\n")
        return
    try:
        print(format_table(load_unit_seconds(run)))
    except StoreError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def gpu_report(
    out: Annotated[Path, typer.Option(help="Path of the JSON report.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Use tiny shapes, as a rehearsal.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Compiled kernels, from `make gpu-report`.")
    ] = None,
) -> None:
    """Measure a GPU in 8 minutes: ceilings, kernels, the study, other packages, tests."""
    from bench.gpu_report import measure_gpu

    with report_usage_errors():
        measure_gpu(out, device, quick, cache=cache)


@app.command()
def prepare_gpu_report() -> None:
    """Compile the report's kernels, rehearse the report, and print the command for a GPU."""
    from bench.gpu_report.prepare import prepare

    with report_usage_errors():
        prepare()


@app.command()
def peers(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option(help="Run small jobs, in a minute; write no results.")
    ] = False,
    job: Annotated[str | None, typer.Option(help="ablations, pairs or pair; default: all.")] = None,
) -> None:
    """Compare this package with others on three jobs: time, memory and results."""
    from bench.peers.run import compare_packages

    out = None if quick else machine.RESULTS / f"peers-{machine.slugify_device(device)}.json"
    with report_usage_errors():
        record = compare_packages(out, device, quick, job)
    if unexpected := [row for row in record["rows"] if row["status"] in ("wrong", "failed")]:
        typer.echo(f"{len(unexpected)} rows are wrong or failed", err=True)
        raise typer.Exit(1 if quick else 0)


@app.command()
def networks(
    quick: Annotated[
        bool, typer.Option(help="Use small sizes, in a minute; write no results.")
    ] = False,
) -> None:
    """Measure maps of two networks, by this package and by others: time, memory and values."""
    from bench.bench_compare import compare_networks

    out = None if quick else machine.RESULTS / f"networks-{machine.slugify_device('cpu')}.json"
    compare_networks(out, quick)


@app.command()
def maps() -> None:
    """Measure maps of two trained networks, and the errors of estimates from batches."""
    from bench.maps import measure_maps

    out = machine.RESULTS / f"maps-{machine.slugify_device('cpu')}.json"
    machine.save(out, measure_maps())
    print(out)


@app.command()
def calibrate(
    quick: Annotated[
        bool, typer.Option(help="Use small sizes, in seconds; write no results.")
    ] = False,
) -> None:
    """Measure calibrated similarities, by this package and by a loop: time, memory and values."""
    from bench.bench_calibrate import describe_calibration, measure_calibration

    show_record("calibrate", measure_calibration, describe_calibration, quick)


@app.command()
def patching(
    quick: Annotated[
        bool, typer.Option(help="Use a small network, in seconds; write no results.")
    ] = False,
) -> None:
    """Measure patches of every attention head of a GPT-2, by this package and by hooks."""
    from bench.bench_patching import describe_patching, measure_patching

    show_record("patching", measure_patching, describe_patching, quick)


@app.command()
def searchlight(
    quick: Annotated[
        bool, typer.Option(help="Use small sizes, in seconds; write no results.")
    ] = False,
) -> None:
    """Measure RDMs of searchlights, by this package and by rsatoolbox: time, memory and values."""
    from bench.bench_searchlight import describe_searchlight, measure_searchlight

    show_record("searchlight", measure_searchlight, describe_searchlight, quick)


@app.command()
def gradients(
    quick: Annotated[
        bool, typer.Option(help="Use small sizes, in seconds; write no results.")
    ] = False,
) -> None:
    """Measure training steps with a similarity as the loss, and by plain PyTorch."""
    from bench.bench_gradients import describe_gradients, measure_gradients

    show_record("gradients", measure_gradients, describe_gradients, quick)


@app.command()
def render_docs() -> None:
    """Regenerate the figures and tables of the documentation from the committed results."""
    from bench.render_docs import draw_figures, render_pages

    print(*draw_figures(), sep="\n")
    for path, text in render_pages().items():
        write_page(path, text)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Record of the first run, JSON.")],
    b: Annotated[Path, typer.Argument(help="Record of the second run.")],
) -> None:
    """Print the ratio of B's times to A's with its interval, largest change first."""
    from bench.compare import BadRecord, compare_records

    try:
        print(compare_records(a, b))
    except BadRecord as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None


@app.command()
def accuracy(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Run a few small cases, as a rehearsal.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Path of the JSON record; the figure is written next to it.")
    ] = None,
) -> None:
    """Measure the accuracy of each package, and whether it ranks many ablations correctly."""
    from bench.accuracy import measure_accuracy, summarize
    from bench.accuracy_figure import draw_figure

    with report_usage_errors():
        record = measure_accuracy(device, quick)
    out = out or machine.RESULTS / f"accuracy-{machine.slugify_device(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    machine.save(out, record)
    draw_figure(record, out.with_suffix(".png"))
    for row in summarize(record):
        print(" | ".join(row))
    print(out, out.with_suffix(".png"), sep="\n")


@app.command()
def roofline(
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON of a GPU report or of `make bench`; default: all committed GPU reports."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Path of the figure, PNG.")] = None,
) -> None:
    """Draw the rates that kernels can reach on a device, and the measured ones; needs no GPU."""
    from bench.roofline import draw_rooflines

    with report_usage_errors():
        print(*draw_rooflines(report, out), sep="\n")


if __name__ == "__main__":
    # An exception, so that shared memory is removed and child processes end.
    with handle_termination(SystemExit(143)):
        app()
