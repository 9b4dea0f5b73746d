"""The study at the paper's scale, with random weights: timed stage by stage on a sample."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import repsim_kernels as rk
from bench.common.machine import Json, load, save
from bench.gpu_report import supervise
from bench.gpu_report.extrapolate import RULES, extrapolate
from bench.gpu_report.rows import said

if TYPE_CHECKING:
    from bench.gpu_report.subjects import Subject

_LATE = "no time was left"
_STEADY = 0.3  # seconds of repetitions of a stage, at least one
_DRAWS = {"cuda": 256, "cpu": 16}  # of the paper's probe that are timed

Keep = Callable[[], None]


def supervised(out: Path, device: str, quick: bool, end: float) -> None:
    """Have it timed in a process of its own, and extrapolate from what there is at the end."""
    record = load(out)
    record["study"] = {}
    save(out, record)
    why = supervise.in_a_process(work, out, end, device, quick, row=math.inf)
    record = load(out)
    study = record["study"]
    if why is not None:
        study.setdefault("why", why)
    study["rules"] = RULES
    for network in study.get("networks", []):
        network |= extrapolate(network)
    parts = [network.get("seconds") for network in study.get("networks", [])]
    if parts and None not in parts:
        study["seconds"] = sum(parts)
    save(out, record)


def work(out: Path, device: str, quick: bool, end: float) -> None:
    """Time a sample of layers of each network; each has an equal share of the time that is left."""
    record = load(out)
    study = record["study"]

    def keep() -> None:
        save(out, record)

    try:
        from bench.gpu_report.subjects import subjects

        torch.set_flush_denormal(True)  # as the study does
        if quick:  # too small to share; threads would wait for each other
            torch.set_num_threads(1)
        chosen = subjects(device, quick)
    except Exception as error:
        study["why"] = said(error)
        return keep()
    study["preset"] = None if quick else "hayne2024"
    study["networks"] = [{"name": name, "failed": []} for name in chosen]
    keep()
    for i, (network, make) in enumerate(zip(study["networks"], chosen.values(), strict=True)):
        share = (end - time.time()) / (len(chosen) - i)
        try:
            subject = make()
            with subject.study.hold_network(), torch.no_grad():
                _network(network, subject, quick, time.time() + share, keep)
        except Exception as error:
            network["failed"].append(said(error))
        keep()
    return None


def _network(network: Json, subject: Subject, quick: bool, end: float, keep: Keep) -> None:
    from repsim_kernels.experiments.study.memory import groups, held

    study = subject.study
    sizes, target = held(study), study.targets[0]
    grouped = groups(study, study.layers)
    costs = study.costs
    network |= {
        "layers": [
            {
                "layer": name,
                "neurons": study.sizes[name].neurons,
                "tail_flops": costs[name].tail_flops,
                "draws": study.draws.of(study.sizes[name].neurons),
            }
            for name in study.layers
        ],
        "targets": len(study.targets),
        "images": len(study.labels),
        "stimuli": study.stimuli,
        "cells": study.n_cells,
        "passes": len(grouped),
        "sample": [],
    }
    ordered = sorted(network["layers"], key=lambda layer: layer["neurons"])
    middle = ordered[len(ordered) // 2]
    sample = [middle] if quick else [ordered[0], middle, ordered[-1]]
    classes = study.present if study.others is None else sorted([target, *study.others_of(target)])
    kept = max(sum(sizes[name] for name in group) for group in grouped)
    shown = _Shown(subject, target, classes, [layer["layer"] for layer in sample])
    if time.time() > end:
        raise TimeoutError(_LATE)
    network["prefix"] = shown.prefix()
    keep()
    for layer in sample:
        network["sample"].append(layer | {"stages": {}})
        into = network["sample"][-1]["stages"]
        _stages(shown, layer, quick, max(1, (study.memory - kept) // 2), end, into, keep)
        network["failed"] += [
            f"{layer['layer']}, {stage}: {found['why']}"
            for stage, found in into.items()
            if "why" in found
        ]
        keep()


class _Shown:
    """A network that is shown a target's stimuli, and what some of its layers gave."""

    def __init__(
        self, subject: Subject, target: int, classes: Sequence[int], layers: Sequence[str]
    ) -> None:
        self.study, self.target, self.classes = subject.study, target, classes
        self.images = subject.images(classes)
        per_class = len(self.images) // len(classes)
        self.labels = torch.tensor(classes).repeat_interleave(per_class)
        device, n = self.study.device, len(self.images)
        neurons = {name: self.study.sizes[name].neurons for name in layers}
        self.x = {name: torch.empty(n, p, device=device) for name, p in neurons.items()}
        self.states: dict[str, list[Any]] = {}

    def prefix(self) -> Json:
        """Time the pass that gives all layers' activations, as the study makes it."""
        from repsim_kernels.experiments.study.memory import batch_size

        size = batch_size(self.study)
        first = self._clock(lambda: self._pass(self.classes[:1], size))
        seconds = self._clock(lambda: self._pass(self.classes, size))
        return {"first_seconds": first, "seconds": seconds, "images": len(self.images)}

    def _pass(self, classes: Sequence[int], size: int) -> None:
        study, row = self.study, 0
        most = max(layer.neurons for layer in study.sizes.values())
        scratch = torch.empty(size * most, device=study.device)
        self.states = {name: [] for name in self.x}
        for label in classes:
            for batch in torch.split(self.images[self.labels == label], size):
                n = len(batch)
                found = study.forward.prefixes(batch.to(study.device), study.layers)
                for name, state in found.items():
                    if name in self.x:
                        state.move(self.x[name][row : row + n])
                        if label == self.target:
                            self.states[name].append(state)
                    else:
                        p = study.sizes[name].neurons
                        state.move(scratch[: n * p].view(n, p))
                row += n

    def timed(self, call: Callable[[], Any]) -> Json:
        """The first call, which may compile, and the median of further ones."""
        first = self._clock(call)
        # On a CPU nothing is compiled, and a second call of what takes long tells nothing.
        once = first > 10 * _STEADY and self.study.device.type == "cpu"
        times = [first if once else self._clock(call)]
        while sum(times) < _STEADY:
            times.append(self._clock(call))
        seconds = statistics.median(times)
        return {"first_seconds": first, "seconds": seconds, "repeats": len(times)}

    def _clock(self, call: Callable[[], Any]) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.study.device.type == "cuda":
            torch.cuda.synchronize()


class _Found(dict[str, Any]):
    """What stages leave for those after them."""

    def __missing__(self, stage: str) -> Any:
        raise RuntimeError(f"{stage} failed before")


def _stages(
    shown: _Shown, layer: Json, quick: bool, room: int, end: float, into: Json, keep: Keep
) -> None:
    """Time what the study does with a layer for a target; a stage that fails says why."""
    from repsim_kernels.experiments.study import probes

    study, target, name = shown.study, shown.target, layer["layer"]
    x, y, found = shown.x.pop(name), shown.labels, _Found()
    states = shown.states.pop(name)
    most = 8 if quick else _DRAWS[study.device.type]
    draws = min(most, layer["draws"])
    options: dict[str, Any] = {key: study.options[key] for key in ("ridge", "penalty")}
    by_gram = [metric for metric in study.metrics if metric != "pwcca"]

    def cells() -> None:
        found["cells"] = rk.selectivity_grid(x, y, target, grid=study.grid, edges=study.edges)

    def gram() -> None:
        grams = rk.cell_grams(x, found["cells"], n_cells=study.n_cells)
        found["gram"] = rk.centered_gram(x), grams

    def spectral() -> None:
        rk.gram_ablation_distances(*found["gram"], metrics=by_gram, neurons=x.shape[1], **options)

    def pwcca() -> None:
        rk.ablation_distances(x, found["cells"], metrics=("pwcca",), memory=room, **options)

    def metrics() -> None:
        rk.ablation_distances(x, found["cells"], metrics=study.metrics, memory=room, **options)

    def suffix() -> None:
        for state in states:
            study.forward.logits(state, found["cells"], study.n_cells, memory=room)

    def ridge() -> None:
        probes.decodability(study, ("ridge",), name, target, x, y, found["cells"])

    def paper() -> None:
        probes.paper(study, name, target, x, y, found["cells"], draws)

    for stage in (cells, gram, spectral, pwcca, metrics, suffix, ridge, paper):
        try:
            late = time.time() > end
            into[stage.__name__] = {"why": _LATE} if late else shown.timed(stage)
        except Exception as error:
            into[stage.__name__] = {"why": said(error)}
        keep()
    if "seconds" in into["paper"]:
        into["paper"]["draws"] = draws
