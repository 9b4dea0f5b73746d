"""The command line: ``python -m bench model``, ``coverage``, ``scaling`` and ``sheet``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def bench() -> None:
    """What the kernels cost."""


@app.command()
def model(
    out: Annotated[Path, typer.Option(help="The page.")] = Path(__file__).parent / "MODEL.md",
) -> None:
    """Write what the kernels should cost on an H100; needs no GPU."""
    from bench.model import page

    out.write_text(page(), encoding="utf-8")
    print(out)


@app.command()
def coverage(
    out: Annotated[Path, typer.Option(help="The page.")] = Path(__file__).parent / "COVERAGE.md",
) -> None:
    """Write how often the study's intervals hold the truth, by simulation; needs no GPU."""
    from bench.coverage import page

    out.write_text(page(), encoding="utf-8")
    print(out)


@app.command()
def scaling(run: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Model how long a run takes by more workers, from what its units took; without start-up."""
    from bench.scaling import table
    from experiments.store import StoreError

    try:
        print(table(run))
    except StoreError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="The JSON file.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Tiny shapes; a rehearsal.")] = False,
) -> None:
    """Measure a card: ceilings, GPU tests, each kernel's error and time (under 8 minutes)."""
    from bench.sheet import sheet as run

    try:
        run(out, device, quick)
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    app()
