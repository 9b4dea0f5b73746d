"""The command line, ``python -m bench``: bench/README.md says what each command is for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bench.common import machine

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
BENCH = Path(__file__).parent
Out = Annotated[Path, typer.Option(help="The page.")]


@app.callback()
def bench() -> None:
    """What the kernels cost, how right they are, and beside what."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Let what is wrong with the arguments be said in a line."""
    try:
        yield
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None


def write(out: Path, page: str) -> None:
    out.write_text(page, encoding="utf-8")
    print(out)


@app.command()
def model(out: Out = BENCH / "MODEL.md") -> None:
    """Write the predicted cost of the kernels on an H200; needs no GPU."""
    from bench.predict.model import page

    write(out, page())


@app.command()
def coverage(out: Out = BENCH / "COVERAGE.md") -> None:
    """Write how often the study's intervals hold the truth, by simulation; needs no GPU."""
    from bench.coverage import page

    write(out, page())


@app.command()
def scaling(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a finished run; the demo, run here, if none.")
    ] = None,
) -> None:
    """Model how long a run takes by more workers, from what its units took; without start-up."""
    from bench.scaling import demo, table, unit_seconds
    from repsim_kernels.experiments.errors import StoreError

    if run is None:
        record = demo()
        out = machine.RESULTS / f"scaling-{machine.slug('cpu')}.json"
        machine.save(out, record)
        print(table(record["runs"][-1]["units"]), out, sep="\n")
        return
    try:
        print(table(unit_seconds(run)))
    except StoreError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def gpu_report(
    out: Annotated[Path, typer.Option(help="The JSON file.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Tiny shapes; a rehearsal.")] = False,
) -> None:
    """Measure a card in 8 minutes: ceilings, kernels, GPU tests, the study, compute-sanitizer."""
    from bench.gpu_report import gpu_report as measure

    with usage_errors():
        measure(out, device, quick)


@app.command()
def peers(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option(help="Small jobs, in a minute; writes no results.")
    ] = False,
    job: Annotated[str | None, typer.Option(help="ablations, pairs or pair; all if none.")] = None,
) -> None:
    """Compare other packages with this one at three jobs: time, memory, and what comes out."""
    from bench.peers.run import peers as measure

    out = None if quick else machine.RESULTS / f"peers-{machine.slug(device)}.json"
    with usage_errors():
        record = measure(out, device, quick, job)
    if unexpected := [row for row in record["rows"] if row["status"] in ("wrong", "failed")]:
        typer.echo(f"{len(unexpected)} rows are wrong or failed", err=True)
        raise typer.Exit(1 if quick else 0)


@app.command()
def render_docs() -> None:
    """Make the figures and tables of README.md and bench/README.md of the committed results."""
    from bench.render_docs import draw, pages

    print(*draw(), sep="\n")
    for path, text in pages().items():
        write(path, text)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results of a run, JSON.")],
    b: Annotated[Path, typer.Argument(help="Those of another.")],
) -> None:
    """Print the ratio of B's times to A's with their spread, largest change first."""
    from bench.compare import BadRecord
    from bench.compare import compare as page

    try:
        print(page(a, b))
    except BadRecord as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None


@app.command()
def accuracy(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Few and small cases; a rehearsal.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The JSON; the figure is put beside it as PNG.")
    ] = None,
) -> None:
    """Measure how right the numbers of each package are, and the order of many ablations."""
    from bench.accuracy import accuracy as measure
    from bench.accuracy import summary
    from bench.accuracy_figure import figure

    with usage_errors():
        record = measure(device, quick)
    out = out or machine.RESULTS / f"accuracy-{machine.slug(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    machine.save(out, record)
    figure(record, out.with_suffix(".png"))
    for row in summary(record):
        print(" | ".join(row))
    print(out, out.with_suffix(".png"), sep="\n")


@app.command()
def roofline(
    report: Annotated[
        Path | None,
        typer.Option(help="JSON of a GPU report or a benchmark run; all GPU reports by default."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The figure, PNG.")] = None,
) -> None:
    """Draw what the kernels can reach on a device beside what was measured; needs no GPU."""
    from bench.roofline import roofline as draw

    with usage_errors():
        print(*draw(report, out), sep="\n")


if __name__ == "__main__":
    # By the usual way out, which removes shared memory and ends the processes that were started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()
