"""The command that runs studies: ``repsim sweep``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from repsim_kernels.experiments.cli.launch import (
    ExecutorKind,
    LaunchOptions,
    cores,
    exit_on_signals,
    launch,
)
from repsim_kernels.experiments.cli.options import exit_on_errors, split_commas
from repsim_kernels.experiments.errors import OptionsError
from repsim_kernels.experiments.runs.shard import parse_shard, shard_from_environment


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
            help="Checkpoint of each --model, in their order: .safetensors, or a state dict, "
            "alone or in a training checkpoint. Of a preset NAME=FILE as well, or random; "
            "torchvision's by default."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder with a sub-folder of images for each class (hidden files and what other "
            "programs leave there are skipped); of a preset ImageNet's validation images, in "
            "sub-folders or flat, or random."
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
        typer.Option(
            help="Side of the images of --images in pixels; by default 32 for small networks, 224 "
            "for torchvision's, and for your own the files' own size, which must be the same for "
            "all."
        ),
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Go on without images that can't be read.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32",
            help="Let a GPU round float32 products and convolutions to TF32: faster, less exact.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Of each worker, for activations and what runs, as 8GiB; half of what is free "
            "otherwise, shared."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of each worker; 1 for small networks, else the cores that there are, "
            "shared."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; one that was interrupted is gone on with.")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Target classes of a unit, what is stored at a time; 10 by default."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, each with a GPU (--device cuda) or a group of cores of its own; 1 by "
            "default, of a Ray cluster all that it holds."
        ),
    ] = None,
    executor: Annotated[
        ExecutorKind, typer.Option(help="pool: processes of this machine; ray: tasks of a cluster.")
    ] = ExecutorKind.pool,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster, or auto; one on this machine by default."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: every N-th unit from the I-th on, beside other shards of the same folder; "
            "a Slurm array's or torchrun's by default."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="All layers, classes and stimuli of the demo: 1,270 classes x layers for 161.",
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would run and how long, and run nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but what fails.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="A line of JSON for all that happens to a unit.")
    ] = False,
) -> None:
    """Ablate networks cell by cell, and compare what metrics see with what function is lost.

    Without options: three small networks on the images that come with them, a sample of layers,
    classes and stimuli, into runs/demo. A run that was stopped, by whatever, is gone on with by the
    same command. Exit code: 0, 2 for what can't be done, 3 where units failed or the table lacks
    some, 130 and 143 for a run that Ctrl-C or SIGTERM stopped.
    """
    with exit_on_errors(), exit_on_signals():
        from repsim_kernels.experiments.cli.request import StudyFactory, SweepOptions
        from repsim_kernels.experiments.inputs.networks import SMALL

        own, source = shard_from_environment() if shard is None else (parse_shard(shard), "")
        chosen = {
            "device": _own_gpu(device, source),
            "grid": None if grid is None else _grid(grid),
            "cells": cells,
            "metrics": split_commas(metrics),
            "probes": split_commas(probes),
            "ridge": ridge,
            "penalty": penalty,
            "memory": memory,
            "block": block,
            "tf32": tf32 or None,
        }
        asked = SweepOptions(
            weights=weights,
            images=images,
            labels=labels,
            classes=split_commas(classes),
            layers=split_commas(layers),
            per_class=per_class,
            stimuli=stimuli,
            size=size,
            skip_bad=skip_bad_images,
            study={name: value for name, value in chosen.items() if value is not None},
        )
        if preset is not None and (model or full):
            raise OptionsError("preset: beside --model or --full; expected one of them")
        names = tuple(model or SMALL)
        sampled = not (full or images or preset)
        recipe = StudyFactory(asked, () if preset else names, preset, sampled)
        folder = out or Path("runs", preset or _folder(names if model or images else (), full))
        how = LaunchOptions(
            executor,
            _workers(workers, executor, device),
            address,
            own,
            source,
            _set_up_threads(threads, workers, recipe.small),
            quiet,
            log_json,
        )
        if address is not None and executor is not ExecutorKind.ray:
            raise OptionsError("address: only with --executor ray")
        launch(recipe, folder, how, dry=plan)


def _workers(count: int | None, kind: ExecutorKind, device: str) -> int | None:
    import torch

    if count is None:
        return None if kind is ExecutorKind.ray else 1
    if count < 1:
        raise OptionsError(f"workers: {count}; expected 1 or more")
    if count > 1 and kind is ExecutorKind.pool and device.startswith("cuda"):
        if device != "cuda":
            raise OptionsError(f"workers: {count} on {device}; expected --device cuda, all GPUs")
        if count > torch.cuda.device_count():
            raise OptionsError(
                f"workers: {count}, but {torch.cuda.device_count()} GPUs; expected one for each"
            )
    return count


def _set_up_threads(threads: int | None, workers: int | None, small: bool) -> int:
    import torch

    if threads is not None and threads < 1:
        raise OptionsError(f"threads: {threads}; expected 1 or more")
    if threads is None and small:
        # Matrices of a few hundred stimuli are too small to share: two threads take twice as long
        # as one, and twenty times on a machine that is busy with something else.
        threads = 1
    if threads is None and workers is not None and workers > 1:
        threads = max(1, cores() // workers)
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _own_gpu(device: str, source: str) -> str:
    """The GPU of one of torchrun's processes on a machine."""
    if device == "cuda" and source == "RANK" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise OptionsError(f"grid: {text!r}; expected two numbers such as 4x4")
    return int(rows), int(columns)


def _folder(names: Sequence[str], full: bool) -> str:
    demo = "demo-full" if full else "demo"
    return "+".join(name.replace(":", ".") for name in names) or demo
