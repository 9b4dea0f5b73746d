"""Time the study at the paper's scale, with random weights, stage by stage on a sample."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import repsim_kernels as rk
from bench.common.machine import Json
from bench.gpu_report.cache import run_logged
from bench.gpu_report.processes import watch
from bench.gpu_report.rows import describe_error
from repsim_kernels.experiments.inputs import imagenet
from repsim_kernels.experiments.inputs.images import load_demo
from repsim_kernels.experiments.inputs.networks import list_default_layers, load
from repsim_kernels.experiments.inputs.presets import PRESETS, Network, load_network
from repsim_kernels.experiments.study import measure, memory
from repsim_kernels.experiments.study.checks import Draws
from repsim_kernels.experiments.study.study import Study

_PRESET = PRESETS["hayne2024"]
_DRAWS = {"cuda": 256, "cpu": 8}  # of the paper's probe, per timed layer

# The quantity by which the seconds of each stage are interpolated between layers.
STAGES = {
    "cells": "neurons",
    "metrics": "neurons",
    "suffix": "tail_flops",
    "paper": "neurons",
    "ridge": "neurons",
}
RULES = """\
prefix: one pass of all images up to the layers, times the number of passes.
cells, metrics, ridge: interpolated linearly by neurons between the sampled layers; below the
  smallest constant, above the largest proportional; times the number of classes.
suffix: the same, by the FLOPs after a layer.
paper: the same for one draw, times each layer's draws.
together: prefix, cells, metrics, suffix, paper; without ridge, this package's own probe,
  start-up and files."""


class StageClock:
    """Measures the seconds of each stage by wrapping the functions that the study calls."""

    def __init__(self, study: Study) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = ""  # the current stage, to name it in errors
        self._cuda = study.device.type == "cuda"
        self._calls: tuple[tuple[Any, str, str], ...] = (
            (measure, "collect_activations", "prefix"),
            (rk, "selectivity_grid", "cells"),
            (rk, "cell_grams", "metrics"),
            (rk, "ablation_distances", "metrics"),
            (rk, "ablation_decodability", "ridge"),
            (rk, "probe_paper", "paper"),
            (study.forward, "logits", "suffix"),
        )

    @contextmanager
    def time_stages(self) -> Iterator[None]:
        """Time the stages that run inside the ``with`` block."""
        self.running = "rows"
        with ExitStack() as stack:
            for owner, name, stage in self._calls:
                timed = partial(self._call_timed, getattr(owner, name), stage)
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _call_timed(
        self, call: Callable[..., Any], stage: str, *arguments: Any, **options: Any
    ) -> Any:
        self.running = stage
        start = self._now()
        result = call(*arguments, **options)
        self.seconds[stage] += self._now() - start
        self.running = "rows"
        return result

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure_study(
    study: Json, keep: Callable[[], None], device: str, quick: bool, end: float
) -> Json:
    """Time the study in a separate process, then extrapolate from the measurements."""
    study |= {"preset": None if quick else "hayne2024", "networks": [], "rules": RULES}
    try:
        for networks in watch(run_logged, time_networks, device, quick, end, end=end):
            study["networks"] = networks
            keep()
    except RuntimeError as error:
        study["why"] = str(error)
    for network in study["networks"]:
        network |= extrapolate(network)
    seconds = [network.get("seconds") for network in study["networks"]]
    if seconds and None not in seconds:
        study["seconds"] = sum(seconds)
    return study


def time_networks(send: Callable[[list[Json]], None], device: str, quick: bool, end: float) -> None:
    """Time a sample of layers of each network; the networks share the remaining time equally."""
    torch.set_flush_denormal(True)  # as in the study
    if quick:  # too small for several threads, which would wait for each other
        torch.set_num_threads(1)
    makers = {n.name: partial(_make_full_study, n, device) for n in _PRESET.networks}
    if quick:
        makers = {"alexnet_small": partial(_make_small_study, device)}
    networks: list[Json] = [{"name": name, "failed": []} for name in makers]
    keep = partial(send, networks)
    keep()
    for i, (network, make) in enumerate(zip(networks, makers.values(), strict=True)):
        late = time.time() + (end - time.time()) / (len(networks) - i)
        try:
            study, draws = make()
            with study.hold_network():
                _time_network(network, study, draws, quick, late, keep)
        except Exception as error:
            network["failed"].append(describe_error(error))
        keep()


def _time_network(
    network: Json, study: Study, draws: Draws, quick: bool, late: float, keep: Callable[[], None]
) -> None:
    layers = [
        {
            "layer": name,
            "neurons": study.sizes[name].neurons,
            "tail_flops": study.costs[name].tail_flops,
            "draws": draws.count_for(study.sizes[name].neurons),
        }
        for name in study.layers
    ]
    ordered = sorted(layers, key=lambda layer: layer["neurons"])
    middle = ordered[len(ordered) // 2]
    # The last layer is included so that the pass runs through the whole network.
    chosen = [middle, layers[-1]] if quick else [ordered[0], middle, ordered[-1], layers[-1]]
    network |= {
        "layers": layers,
        "targets": len(study.targets),
        "images": len(study.labels),
        "stimuli": study.n_stimuli,
        "cells": study.count_cells(middle["layer"]),
        "passes": len(memory.group_layers(study, study.layers)),
        "draws": study.draws.least,
        "prefix": {},
        "sample": [layer | {"stages": {}} for layer in layers if layer in chosen],
    }
    units = {unit.layer: unit for unit in study.units if unit.block == 1}
    failed: list[Json] = []
    for which in ("first_seconds", "seconds"):  # kernels are compiled in the first pass
        remaining = [layer for layer in network["sample"] if layer not in failed]
        clock, rows = StageClock(study), None
        while remaining:
            if time.time() > late:
                raise TimeoutError("no time remained")
            rows = rows or measure.rows(study, [units[layer["layer"]] for layer in remaining])
            layer = remaining.pop(0)
            try:
                with clock.time_stages():
                    next(rows)
            except Exception as error:
                rows = None  # continue with the remaining layers
                failed.append(layer)
                network["failed"].append(
                    f"{layer['layer']}, {clock.running}: {describe_error(error)}"
                )
            _record_seconds(network, layer, clock, which)
            keep()


def _record_seconds(network: Json, layer: Json, clock: StageClock, which: str) -> None:
    """Move the clock's seconds to the record of the network."""
    if "prefix" in clock.seconds:  # with several groups of layers, keep the longest pass
        prefix = clock.seconds.pop("prefix"), network["prefix"].get(which, 0.0)
        network["prefix"][which] = max(prefix)
    for stage, seconds in clock.seconds.items():
        layer["stages"].setdefault(stage, {})[which] = seconds
    clock.seconds.clear()


def extrapolate(network: Json) -> Json:
    """Return ``extrapolated``, the seconds of each stage (None if not timed), and their sum."""
    prefix = _pick_seconds(network.get("prefix", {}))
    stages: dict[str, float | None] = {
        "prefix": None if prefix is None else network["passes"] * prefix,
        **{stage: _extrapolate_stage(network, stage, key) for stage, key in STAGES.items()},
    }
    parts = [seconds for stage, seconds in stages.items() if stage != "ridge"]
    known = [seconds for seconds in parts if seconds is not None]
    return {"extrapolated": stages} | ({"seconds": sum(known)} if known == parts else {})


def _pick_seconds(timed: Json) -> float | None:
    """Return the seconds of the second call, without compilation, if there was one."""
    return timed.get("seconds", timed.get("first_seconds"))


def _extrapolate_stage(network: Json, stage: str, key: str) -> float | None:
    """Extrapolate a stage from the sampled layers and one class to all layers and classes."""
    points: dict[float, list[float]] = {}
    for layer in network.get("sample", []):
        seconds = _pick_seconds(layer["stages"].get(stage, {}))
        if seconds is not None:
            points.setdefault(layer[key], []).append(seconds)
    if not points:
        return None
    sizes = sorted(points)
    layers = np.array([layer[key] for layer in network["layers"]], dtype=float)
    each = np.interp(layers, sizes, [np.mean(points[size]) for size in sizes])
    each *= np.maximum(1, layers / sizes[-1])
    if stage == "paper":
        each *= np.array([layer["draws"] for layer in network["layers"]]) / network["draws"]
    return float(network["targets"] * each.sum())


def _make_full_study(network: Network, device: str) -> tuple[Study, Draws]:
    """Return the preset's study on noise with random weights, and its draws."""
    model = load_network(network, "random").model
    if device == "cpu":  # as in the study
        model = model.to(memory_format=torch.channels_last)
    noise = imagenet.make_noise(imagenet.find_outputs(network.classes), network.images_per_class)
    options = {"name": network.name, "others": network.others}
    draws = Draws(network.draws, network.neurons_per_draw, _PRESET.paired)
    return _make_study(model, noise.images, noise.labels, device, **options), draws


def _make_small_study(device: str) -> tuple[Study, Draws]:
    """Return a rehearsal's study: a few images and a network that comes with the package."""
    demo = load_demo()
    few = torch.cat([(demo.labels == c).nonzero()[:8, 0] for c in range(4)])
    model = load("alexnet_small")
    draws = Draws(200, None, _PRESET.paired)
    images, labels = demo.images[few], demo.labels[few]
    return _make_study(model, images, labels, device, name="alexnet_small"), draws


def _make_study(
    model: nn.Module, images: Tensor, labels: Tensor, device: str, **options: Any
) -> Study:
    return Study(
        model,
        list_default_layers(model),
        images,
        labels,
        draws=Draws(_DRAWS[device], None, _PRESET.paired),
        block=1,
        device=device,
        **_PRESET.options | {"probes": (*_PRESET.options["probes"], "ridge")},
        **options,
    )
