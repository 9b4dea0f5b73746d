"""The command line: ``python -m experiments sweep | train | report``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from repsim_kernels import RepsimError

if TYPE_CHECKING:
    from .data import Stimuli
    from .study import Study

OURS = ("experiments", "repsim_kernels", "__main__")
# PyTorch, pandas and matplotlib are imported by the commands that need them: --help is quick.


class OptionsError(ValueError):
    """Options of the command line that don't go together."""


class Sample(NamedTuple):
    """What the demo takes of a network, evenly spaced, unless ``--full`` is given."""

    layers: int
    targets: int
    stimuli: int  # of each class, for the metrics


# Chosen to take two minutes on two cores, all three together.
SAMPLE = {
    "alexnet_small": Sample(layers=7, targets=7, stimuli=20),
    "mobilenet_v2_small": Sample(layers=8, targets=7, stimuli=20),
    "resnet50_small": Sample(layers=8, targets=7, stimuli=20),
}

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
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint of each --model, in their order: .safetensors, or a state dict."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder with a sub-folder of images for each class.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes to study, by commas or repeated; only these of --images are read."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Modules to cut at, separated by commas or repeated.")
    ] = None,
    grid: Annotated[str, typer.Option(help="Strips by selectivity x cells by magnitude.")] = "4x4",
    metrics: Annotated[
        list[str] | None, typer.Option(help="Distances, separated by commas; all by default.")
    ] = None,
    ridge: Annotated[
        float,
        typer.Option(help="Ridge of CCA and PWCCA, relative to the mean energy of a stimulus."),
    ] = 0.1,
    penalty: Annotated[float, typer.Option(help="Absolute penalty instead of the ridge.")] = 0.0,
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
) -> None:
    """Ablate networks cell by cell, and compare what metrics see with what function is lost.

    Without options: three small networks on the images that come with them, a sample of layers,
    classes and stimuli, into runs/demo.
    """
    with _one_line_errors():
        from .models import SMALL
        from .run import run, run_folder
        from .terminal import announce, finish, progress_of

        names = model or list(SMALL)
        _set_up_torch(threads, small=all(name in SMALL for name in names))
        sampled = not (full or images)
        shown = _stimuli(names, images, classes, size, skip_bad_images)
        studies = [
            _study(
                name,
                path,
                shown,
                SAMPLE.get(name) if sampled else None,
                classes=_split(classes),
                layers=_split(layers),
                stimuli=stimuli,
                device=device,
                grid=_grid(grid),
                metrics=_split(metrics),
                ridge=ridge,
                penalty=penalty,
            )
            for name, path in zip(names, _weights(names, weights), strict=True)
        ]
        folder = out or Path("runs", _folder(names if model or images else (), full))
        console = Console(highlight=False, markup=False)
        store = run_folder(studies, folder, {"images": shown.source})
        announce(shown.source, studies, folder, sampled)
        units = [unit for study in studies for unit in study.units]
        if not store.left(units):
            print(f"All {len(units)} units are done already.")
        try:
            with progress_of(console) as progress:
                table = run(studies, store, progress)
        except KeyboardInterrupt:
            done = len(units) - len(store.left(units))
            print(
                f"interrupted: {done} of {len(units)} units are finished and kept in {folder}; "
                "the same command goes on from there",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None
        finish(console, table, folder)


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
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = Path("runs/demo"),
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html by default.")] = None,
) -> None:
    """Write a run's report again."""
    with _one_line_errors():
        from .report import write_report

        print(write_report(run, out or run / "report.html"))


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


def _stimuli(
    names: Sequence[str],
    images: Path | None,
    classes: Sequence[str] | None,
    size: int | None,
    skip_bad: bool,
) -> Stimuli:
    from . import data
    from .models import SMALL

    small = all(name in SMALL for name in names)
    if images is not None:
        side = size or (32 if small else 224)
        return data.image_folder(images, _split(classes), side, skip_bad)
    if not small:
        other = next(name for name in names if name not in SMALL)
        raise OptionsError(f"images: {other!r} needs some; expected a folder, --images")
    return data.demo()


def _study(
    name: str,
    weights: str | None,
    shown: Stimuli,
    sample: Sample | None,
    *,
    classes: list[str] | None,
    layers: list[str] | None,
    stimuli: int | None,
    metrics: list[str] | None,
    **options: Any,
) -> Study:
    from .models import load, study_layers
    from .stats import METRICS
    from .study import Study, StudyError

    network = load(name, weights)
    if unknown := [c for c in classes or () if c not in shown.classes]:
        known = ", ".join(shown.classes)
        raise StudyError(f"classes: {unknown[0]!r} is unknown; expected some of {known}")
    targets = sorted(set(shown.labels.tolist()))
    if classes is not None:
        targets = [label for label in targets if shown.classes[label] in classes]
    elif sample is not None:
        targets = _spaced(targets, sample.targets)
    if layers is None:
        layers = study_layers(network)
        layers = layers if sample is None else _spaced(layers, sample.layers)
    if stimuli is None and sample is not None:
        stimuli = sample.stimuli
    return Study(
        network,
        layers,
        shown.images,
        shown.labels,
        targets,
        name=name,
        classes=shown.classes,
        metrics=METRICS if metrics is None else metrics,
        stimuli_per_class=stimuli,
        **options,
    )


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


def _weights(names: Sequence[str], weights: Sequence[str] | None) -> list[str | None]:
    if weights is None:
        return [None] * len(names)
    if len(weights) != len(names):
        raise OptionsError(
            f"weights: {len(weights)} for {len(names)} models; expected one for each --model"
        )
    return list(weights)


def _split(values: Sequence[str] | None) -> list[str] | None:
    if not values:
        return None
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise OptionsError(f"grid: {text!r}; expected two numbers such as 4x4")
    return int(rows), int(columns)


def _spaced(values: list[Any], count: int) -> list[Any]:
    """The first, the last, and what is evenly spaced between."""
    if count >= len(values):
        return values
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]


def _folder(names: Sequence[str], full: bool) -> str:
    demo = "demo-full" if full else "demo"
    return "+".join(name.replace(":", ".") for name in names) or demo


if __name__ == "__main__":
    app()
