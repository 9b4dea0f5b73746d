"""The command that compares the layers of two networks: ``repsim compare``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from repsim_kernels import RepsimError
from repsim_kernels.experiments.cli.options import exit_on_errors, split_commas
from repsim_kernels.experiments.cli.signals import exit_on_signals
from repsim_kernels.experiments.errors import ModelError, OptionsError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn


def compare(
    model_a: Annotated[
        str,
        typer.Option(
            help="Network for ImageNet-like inputs: torchvision:NAME or package.module:callable."
        ),
    ],
    images: Annotated[
        Path,
        typer.Option(
            help="Folder of images, with its sub-folders. They are resized, cropped and normalised "
            "as for ImageNet."
        ),
    ],
    model_b: Annotated[
        str | None,
        typer.Option(help="The other network; by default --model-a is compared with itself."),
    ] = None,
    weights_a: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of --model-a: .safetensors or a state dict; required for torchvision."
        ),
    ] = None,
    weights_b: Annotated[Path | None, typer.Option(help="Checkpoint of --model-b.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, comma-separated, or one of conv, linear, attention, blocks; by default "
            "every module."
        ),
    ] = None,
    layers_b: Annotated[
        list[str] | None, typer.Option(help="Layers of --model-b, if selected differently.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="cka_debiased, or another metric of pairwise.")
    ] = "cka_debiased",
    estimator: Annotated[
        str, typer.Option(help="exact, or minibatch: one pass, with a standard error.")
    ] = "exact",
    pool: Annotated[
        str,
        typer.Option(
            help="How an output becomes a representation: flatten, mean, max, cls, last or tokens."
        ),
    ] = "flatten",
    size: Annotated[int, typer.Option(help="Height and width of the images in pixels.")] = 224,
    batch: Annotated[int, typer.Option(help="Number of images in a batch.")] = 50,
    memory: Annotated[
        str, typer.Option(help="Budget for features and Gram matrices, such as 2GiB.")
    ] = "512MiB",
    calibrate: Annotated[
        int | None,
        typer.Option(
            help="Number of permutations of the images, such as 200, to mark the pairs that are "
            "not above what chance gives anywhere in the map."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:1 and so on.")] = "cpu",
    out: Annotated[
        Path,
        typer.Option(help="File to write: .html, .png, .pdf, .svg, .csv or .parquet."),
    ] = Path("map.html"),
) -> None:
    """Compare all layers of two networks, or of one with itself, and draw the map."""
    with exit_on_errors(), exit_on_signals("no map was written"):
        import repsim_kernels as rk
        from repsim_kernels.experiments.inputs.images import load_images

        _check_out(out)
        if batch < 1:
            raise OptionsError(f"batch: {batch}; expected 1 or more images")
        if model_b is None and (weights_b or layers_b):
            raise OptionsError(
                "model_b: missing with --weights-b or --layers-b; expected a network"
            )
        networks = [_load("a", model_a, weights_a, device)]
        networks += [] if model_b is None else [_load("b", model_b, weights_b, device)]
        loader = load_images(images, size).split(batch)
        with show_passes(Console(stderr=True), loader) as calls, _report_out_of_memory():
            result = rk.compare(
                networks[0],
                networks[1] if model_b else None,
                loader,
                call=calls,
                layers=_parse_layers(layers),
                layers_b=_parse_layers(layers_b),
                metric=metric,
                estimator=estimator,
                pool=pool,
                memory=memory,
                calibrate=calibrate,
            )
        print(result)
        print(result.save(out))


def _check_out(path: Path) -> None:
    """Check that a map can be written, before it is computed."""
    from repsim_kernels.comparison.similarity_map import check_path

    check_path(path)
    packages = {".html": "json", ".csv": "pandas", ".parquet": "pyarrow"}
    try:
        importlib.import_module(packages.get(path.suffix.lower(), "matplotlib"))
    except ModuleNotFoundError as error:
        raise OptionsError(
            f"out: {path} needs {error.name}, which is not installed; run: pip install {error.name}"
        ) from None


def _load(side: str, name: str, weights: Path | None, device: str) -> nn.Module:
    """Load the network "a" or "b" on a device."""
    import torch

    from repsim_kernels.experiments.inputs import networks

    try:
        model = networks.load(name.removeprefix("torchvision:"), weights, log=print)
    except ModelError as error:
        argument, _, problem = str(error).partition(":")  # model or weights
        raise ModelError(f"{argument}_{side}:{problem}") from None
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA, or no such device
        raise OptionsError(f"device: {device!r} can't be used: {one_line(error)}") from None


def _parse_layers(values: list[str] | None) -> str | list[str] | None:
    """Return a kind of layers, names, or None for all."""
    names = split_commas(values)
    return names[0] if names and len(names) == 1 else names


@contextmanager
def _report_out_of_memory() -> Iterator[None]:
    """Turn the errors of all that allocates memory into an OptionsError."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            "can't allocate memory" in str(error)  # PyTorch's CPU allocator
        ):
            raise OptionsError(
                f"memory: not enough: {one_line(error)}; expected a smaller --memory or --batch, "
                "fewer layers or images"
            ) from error
        raise


@contextmanager
def show_passes(
    console: Console, loader: Sequence[Tensor]
) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Yield calls of both networks that show in a terminal how far their passes are."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield _Call("model_a", loader, progress), _Call("model_b", loader, progress)


class _Call:
    """Calls a network, shows how far its pass over the images is, and names it in errors."""

    def __init__(self, side: str, loader: Sequence[Tensor], progress: Progress) -> None:
        self._side, self._progress = side, progress
        self._sizes = [len(batch) for batch in loader]
        self._total = sum(self._sizes)
        self._passes = self._batches = 0
        self._has_layers = False

    def __call__(self, model: nn.Module, batch: Tensor) -> Any:
        from repsim_kernels.comparison.batches import call_on_inputs

        try:
            output = call_on_inputs(model, batch)
        except RepsimError:
            raise
        except Exception as error:  # whatever the network's code raises
            shape = " x ".join(map(str, batch.shape))
            raise ModelError(
                f"{self._side}: fails on images {shape}: {type(error).__name__}: {one_line(error)}"
            ) from error
        self._show(len(batch))
        return output

    def _show(self, count: int) -> None:
        # The first images are run to find the layers, and half a batch to measure the time; these
        # are not part of a pass. All images may be joined in one batch.
        has_layers, self._has_layers = self._has_layers, True
        if not has_layers or count not in (self._sizes[self._batches], self._total):
            return
        if self._batches == 0:
            self._passes += 1
            name = f"{self._side}, pass {self._passes}"
            if self._passes == 1:
                self._task = self._progress.add_task(name, total=self._total)
            else:
                self._progress.reset(self._task, description=name)
        self._progress.advance(self._task, count)
        self._batches = 0 if count == self._total else (self._batches + 1) % len(self._sizes)
