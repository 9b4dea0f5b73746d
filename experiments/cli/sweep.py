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
    count_cores,
    launch,
)
from repsim_kernels.experiments.cli.options import exit_on_errors, split_commas
from repsim_kernels.experiments.cli.signals import exit_on_signals
from repsim_kernels.experiments.errors import OptionsError
from repsim_kernels.experiments.runs.shard import parse_shard, read_shard_from_environment

_MAX_DEMO_WORKERS = 4  # each may hold 1.4 GiB, and the demo has 26 units


def sweep(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Network; repeatable. alexnet_small, mobilenet_v2_small, resnet50_small or "
            "vit_small (all four by default), a builder of torchvision.models, or "
            "package.module:callable."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Full-size study: alexnet, mobilenet_v2, mobilenet_v2_035, resnet50 or vit_b_16, "
            "or hayne2024, which runs three of these as published."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint for each --model, in the same order: .safetensors or a PyTorch state "
            "dict, also within a training checkpoint. For a preset: FILE, NAME=FILE or random; "
            "torchvision's weights by default."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder with one sub-folder of images per class; hidden files and system files "
            "are skipped. For a preset: ImageNet's validation images, in sub-folders or flat, or "
            "random."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Ground-truth file for a flat ImageNet folder, if it is not in or next to the "
            "folder. Presets only."
        ),
    ] = None,
    images_per_class: Annotated[
        int | None,
        typer.Option(help="Number of images to load per class. Presets only; 50 by default."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes to study, comma-separated or repeated; with --images, only these are "
            "loaded. ImageNet classes by name, wnid or index."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of the modules whose outputs to ablate, comma-separated or repeated."
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Cells to divide a layer's neurons into: selectivity bins x magnitude bins; 4x4 "
            "by default. Only for the cells selectivity and random."
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            help="How neurons are assigned to cells: selectivity (default); random cells of the "
            "same sizes, as a control; channels; or heads, for layers such as block.attn:heads."
        ),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            help="What ablated neurons are set to: zero (default), or mean, each neuron's mean "
            "over the images that the metrics see. Not mean with the metrics rsa_cosine, "
            "rsa_correlation and mutual_knn."
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Metrics to compute, comma-separated or repeated; by default all of centred Gram "
            "matrices. 'all' adds RSA, RBF CKA and mutual kNN."
        ),
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(
            help="Probes of linear decodability, comma-separated or repeated: ridge (default) and "
            "paper, the published study's probe, which takes longer than the rest of the study."
        ),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            help="Ridge of CCA and PWCCA, relative to the mean energy of an image; 0.1 by default."
        ),
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(help="Absolute penalty of CCA and PWCCA, in place of the relative ridge."),
    ] = None,
    metric_images: Annotated[
        int | None,
        typer.Option(help="Number of images per class to compute metrics on; all by default."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Side length in pixels to which --images are resized. Default: 32 for the small "
            "networks, 224 for torchvision's; for your own network the files keep their size, "
            "which must be the same for all."
        ),
    ] = None,
    skip_bad_images: Annotated[
        bool,
        typer.Option("--skip-bad-images", help="Skip images that can't be read, with a warning."),
    ] = False,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, …")] = "cpu",
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32",
            help="Allow TF32 for float32 products and convolutions on a GPU: faster, less exact.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory budget of each worker, such as 8GiB. Default: half of the free memory, "
            "shared between the workers."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of each worker. Default: 1 for the small networks, otherwise the "
            "available cores divided between the workers."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; an interrupted run in it is resumed. runs/NAME by default."
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="Number of target classes per unit, the smallest piece of work that is stored; "
            "10 by default."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of worker processes, each with its own GPU (--device cuda) or group of "
            "cores. Default: 1; for the demo on a CPU one per core, up to 4; with --executor ray, "
            "as many as the cluster can run."
        ),
    ] = None,
    executor: Annotated[
        ExecutorKind,
        typer.Option(help="pool: processes on this machine; ray: tasks on a Ray cluster."),
    ] = ExecutorKind.pool,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster, or auto. Default: a new cluster on this machine."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: run every N-th unit, starting with the I-th; the other shards use the same "
            "folder. Default: taken from a Slurm job array or torchrun, if any."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Run the demo on all layers, classes and images: 1,350 pairs of class and layer "
            "instead of 182.",
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what would run and its estimated time; run nothing."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only failures.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Print one line of JSON per event of a unit.")
    ] = False,
) -> None:
    """Ablate networks cell by cell, and compare representation metrics with the loss of function.

    Without options, run the demo into runs/demo: four small networks on the images shipped with
    the package, with a sample of the layers, classes and images. To resume an interrupted run,
    run the same command again. Exit codes: 0 for success, 2 if the command can't run or continue,
    3 if units failed or are missing from the table, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with exit_on_errors(), exit_on_signals():
        from repsim_kernels.experiments.cli.request import StudyFactory, SweepOptions
        from repsim_kernels.experiments.inputs.networks import SMALL

        selected_shard, shard_source = (
            read_shard_from_environment() if shard is None else (parse_shard(shard), "")
        )
        study_arguments = {
            "device": _choose_device(device, shard_source),
            "grid": None if grid is None else _parse_grid(grid),
            "cells": cells,
            "fill": fill,
            "metrics": split_commas(metrics),
            "probes": split_commas(probes),
            "ridge": ridge,
            "penalty": penalty,
            "memory": memory,
            "block": block,
            "tf32": tf32 or None,
        }
        options = SweepOptions(
            weights=weights,
            images=images,
            labels=labels,
            classes=split_commas(classes),
            layers=split_commas(layers),
            images_per_class=images_per_class,
            metric_images=metric_images,
            size=size,
            skip_bad=skip_bad_images,
            study={name: value for name, value in study_arguments.items() if value is not None},
        )
        if preset is not None and (model or full):
            raise OptionsError("preset: can't be combined with --model or --full; pass one of them")
        names = tuple(model or SMALL)
        sampled = not (full or images or preset)
        factory = StudyFactory(options, () if preset else names, preset, sampled)
        name = preset or _default_name(names if model or images else (), full)
        is_demo = not (model or images or preset or selected_shard.count > 1)
        if workers is None and is_demo and device == "cpu" and executor is ExecutorKind.pool:
            workers = max(1, min(_MAX_DEMO_WORKERS, count_cores() // (threads or 1)))
        workers = _check_workers(workers, executor, device)
        threads = _set_up_threads(threads, workers, factory.small)
        launch_options = LaunchOptions(
            executor,
            workers,
            address,
            selected_shard,
            shard_source,
            threads,
            quiet,
            log_json,
        )
        if address is not None and executor is not ExecutorKind.ray:
            raise OptionsError("address: applies only to --executor ray")
        launch(factory, out or Path("runs", name), launch_options, plan_only=plan)


def _check_workers(count: int | None, kind: ExecutorKind, device: str) -> int | None:
    import torch

    if count is None:
        return None if kind is ExecutorKind.ray else 1
    if count < 1:
        raise OptionsError(f"workers: {count}; expected 1 or more")
    if count > 1 and kind is ExecutorKind.pool and device.startswith("cuda"):
        if device != "cuda":
            raise OptionsError(
                f"workers: {count} on the single GPU {device}; expected --device cuda for all GPUs"
            )
        if count > torch.cuda.device_count():
            raise OptionsError(
                f"workers: {count} for {torch.cuda.device_count()} GPUs; expected at most one "
                "worker per GPU"
            )
    return count


def _set_up_threads(threads: int | None, workers: int | None, small: bool) -> int:
    import torch

    if threads is not None and threads < 1:
        raise OptionsError(f"threads: {threads}; expected 1 or more")
    if threads is None and small:
        # Matrices over a few hundred images are too small to divide: two threads take twice as
        # long as one, and twenty times as long on a busy machine.
        threads = 1
    if threads is None and workers is not None and workers > 1:
        threads = max(1, count_cores() // workers)
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _choose_device(device: str, shard_source: str) -> str:
    """Choose the device of this process: under torchrun, "cuda" is the GPU of its local rank."""
    if device == "cuda" and shard_source == "RANK" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _parse_grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise OptionsError(f"grid: {text!r}; expected two numbers such as 4x4")
    return int(rows), int(columns)


def _default_name(names: Sequence[str], full: bool) -> str:
    demo = "demo-full" if full else "demo"
    return "+".join(name.replace(":", ".") for name in names) or demo
