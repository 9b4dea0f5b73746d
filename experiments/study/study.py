"""The ablation study of one network: what its cells of neurons do, and what metrics see of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repsim_kernels import _arrays, _options, experiments
from repsim_kernels.experiments.columns import METRICS, PROBES
from repsim_kernels.experiments.errors import StudyError
from repsim_kernels.experiments.study import checks as check
from repsim_kernels.experiments.study.network import (
    Identity,
    fingerprint,
    hash_of,
    hash_operations,
    prepare,
    show_image,
)
from repsim_kernels.experiments.study.precision import set_tf32
from repsim_kernels.experiments.study.units import Unit, units_of
from repsim_kernels.forward import AblatedForward, Cost
from repsim_kernels.forward.memory import budget
from repsim_kernels.forward.trace import first_line

# PyTorch's switches belong to the process, and a network may belong to several studies: one study
# computes at a time.
_TURN = threading.RLock()


class Study:
    """An ablation study: a network, its layers, the images of some classes.

    Parameters
    ----------
    model : nn.Module
        Maps images to logits (n, k), and can be traced by torch.fx or torch.export. The study uses
        the model itself: while it computes the model is in evaluation mode and on ``device``;
        between units and afterwards it is as it was, also where a pass writes to its parameters or
        buffers. Otherwise its parameters, buffers and modules must not change.
    layers : sequence of str
        Names of modules of ``model``.
    images : tensor or array, (n, ...)
        As the model takes them. They are not copied: don't write to them before the run ends.
    labels : integer tensor, array or sequence, (n,)
        The model's output for each image's class; two classes or more of two images or more.
    targets : sequence of int, optional
        The labels whose function is studied; all by default. The other classes' images are what
        a target is told apart from.
    grid : (int, int)
        Strips by selectivity, and cells by magnitude in each strip.
    metrics : sequence of str
        Distances to take, some of ``repsim_kernels.experiments.columns.METRICS``.
    name : str, optional
        What the column ``model`` says; the class of the model by default.
    classes : sequence of str, optional
        Name of each label, by label.
    cells : {"selectivity", "random"}
        Which neurons make a cell: those of like selectivity and magnitude, or, as a control, ones
        drawn at random into cells of the same sizes.
    edges : {"equal", "inclusive"}
        As in ``selectivity_grid``.
    others : int, optional
        How many other classes, drawn at random for each target, it is told apart from; all by
        default.
    ridge, penalty, probe_ridge : float
        Passed on to ``ablation_distances`` (the first two) and ``ablation_decodability``.
    metric_images : int, optional
        How many images of each class, its first ones, the distances, the decodability and the
        selectivity are taken over; all by default. The network's performance is always that on
        all images of the target.
    probes : sequence of str
        Of linear decodability. "ridge": leave-one-out ridge regression, refitted and frozen, its
        balanced accuracy and its margin. "paper": the published study's logistic regressions on
        neurons drawn at random, and the standard error of what they give.
    draws : repsim_kernels.experiments.Draws, optional
        How often "paper" draws: 200 times by default.
    seed : int
        Of the others, of random cells, and of the neurons that are drawn.
    memory : int or str, optional
        Bytes, or text such as "8GiB", for all that is held beside the model and its images:
        activations of as many layers at a time as it takes, and what runs. By default half of what
        is free on the device.
    block : int
        How many target classes are measured, and stored, at a time: as many as a prefix pass of
        the images serves, and as a run that is killed loses at most.
    note : str, optional
        What the table and the report are to say of the study, such as that it is no evidence; a
        run that is gone on with keeps its first.
    device : str or torch.device, optional
        Where to compute; where the model is by default.
    tf32 : bool
        Whether CUDA may round float32 products and convolutions to TF32 while the study computes,
        whatever PyTorch's switches say otherwise.

    Raises
    ------
    StudyError
        An argument is wrong, or an array that the library refuses (masked, sparse); the message
        names it and says what is expected.
    LayerError
        A layer is not in the model, or the network can't be cut there.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        images: Tensor | NDArray[Any],
        labels: Tensor | NDArray[Any] | Sequence[int],
        targets: Sequence[int] | None = None,
        grid: tuple[int, int] = (4, 4),
        metrics: Sequence[str] = METRICS,
        *,
        name: str | None = None,
        classes: Sequence[str] | None = None,
        cells: str = "selectivity",
        edges: str = "equal",
        others: int | None = None,
        ridge: float = 0.1,
        penalty: float = 0.0,
        probe_ridge: float = 1.0,
        metric_images: int | None = None,
        probes: Sequence[str] = ("ridge",),
        draws: check.Draws | None = None,
        seed: int = 0,
        memory: int | str | None = None,
        block: int = 10,
        note: str | None = None,
        device: str | torch.device | None = None,
        tf32: bool = False,
    ) -> None:
        self.model = check.check_model(model)
        self._identity = Identity(model)
        self.device = check.check_device(model, device)
        with check.study_errors():
            self.name = check.check_text(type(model).__name__ if name is None else name, "name")
            self.note = None if note is None else check.check_text(note, "note")
            self.layers = check.check_distinct(check.check_names(layers, "layers"), "layers")
            metrics = check.check_names(metrics, "metrics", METRICS)
            self.metrics = check.check_distinct(metrics, "metrics")
            probes = check.check_names(probes, "probes", tuple(PROBES))
            self.probes = check.check_distinct(probes, "probes")
            self.draws = check.check_draws(draws)
            self.grid = _options.grid(grid)
            self.cells = _options.option(cells, "cells", ("selectivity", "random"))
            self.edges = _options.option(edges, "edges", ("equal", "inclusive"))
            self.others = check.check_optional_count(others, "others")
            self.seed = _options.count(seed, "seed", 0)
            self.block = _options.count(block, "block")
            self.tf32 = _options.flag(tf32, "tf32")
            ridge, penalty = _options.ridges(ridge, penalty)
            probe_ridge = _options.probe_ridge(probe_ridge, "probe_ridge")
            self.options = {"ridge": ridge, "penalty": penalty, "probe_ridge": probe_ridge}
            self.metric_images = check.check_optional_count(metric_images, "metric_images", 2)
            self.classes = None if classes is None else check.check_names(classes, "classes")
            self.images, self.labels = check.check_images(images), check.check_labels(labels)
            self.own_memory = memory is not None  # asked for, not what happened to be free
            self.memory = budget(memory, self.device)
            check.check_pairs(self.images, self.labels)
            present, counts = (
                a.tolist() for a in np.unique(self.labels.numpy(), return_counts=True)
            )
            self.present: list[int] = present
            self.targets = present if targets is None else check.check_targets(targets)
            self._check_classes(dict(zip(present, counts, strict=True)))
        self._held = self._changes_itself = False
        with self.hold_network():
            self._check_model()

    @property
    def units(self) -> list[Unit]:
        """The study's pieces of work, layer by layer."""
        return units_of(self.name, self.layers, len(self.targets), self.block)

    def targets_of(self, unit: Unit) -> list[int]:
        """The target classes of a unit."""
        return self.targets[(unit.block - 1) * self.block : unit.block * self.block]

    @property
    def _targets(self) -> dict[str, int]:
        return {str(self.class_name(label)): label for label in self.targets}

    @property
    def n_cells(self) -> int:
        """How many cells a layer is cut in."""
        return self.grid[0] * self.grid[1]

    @property
    def shown(self) -> int:
        """How many images the network is shown for the metrics."""
        return sum(self.counted(label) for label in self.present)

    @property
    def stimuli(self) -> int:
        """How many images the metrics are taken over, for the first of the targets."""
        if self.others is None:
            return self.shown
        target = self.targets[0]
        return sum(self.counted(label) for label in (target, *self.others_of(target)))

    def counted(self, label: int) -> int:
        """How many images of a class are stimuli."""
        count = int((self.labels == label).sum())
        return min(count, self.metric_images or count)

    def others_of(self, label: int) -> list[int]:
        """The other classes that are drawn for a target."""
        rest = [other for other in self.present if other != label]
        drawn = np.random.default_rng([self.seed, label]).permutation(rest)
        return sorted(drawn[: self.others].tolist())

    def class_name(self, label: int) -> str | int:
        """The name of a label where names are known, else the label."""
        return label if self.classes is None else self.classes[label]

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        progress: Callable[[Any], object] | None = None,
    ) -> pd.DataFrame:
        """Run the study; see `repsim_kernels.experiments.runs.driver`."""
        return experiments.run(self, out, progress)

    @contextmanager
    def hold_network(self) -> Iterator[None]:
        """Have the network in evaluation mode on the study's device, and TF32 on or off.

        At the end the network, and PyTorch's switches, are as they were before.

        Raises
        ------
        StudyError
            The network's weights or modules are not those that the study was made with.
        """
        with _TURN:
            if self._held:  # by this thread, further up
                yield
                return
            self._identity.check(self.model, self.name)
            with prepare(self.model, self.device), set_tf32(self.tf32):
                self._held = True
                try:
                    if self._changes_itself:  # a trace may lack it, and must find it done
                        show_image(self.model, (), self.images[:1].to(self.device))
                    yield
                finally:
                    self._held = False

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What the network takes before and after each layer, counted for two images."""
        with self.hold_network():
            return self.forward.costs(self.images[:2].to(self.device), timed=False)

    @cached_property
    def _operations(self) -> str:
        with self.hold_network():
            return hash_operations(self.model, self.layers, self.images[:2].to(self.device))

    def configuration(self) -> dict[str, Any]:
        """Everything that decides the rows, as JSON-able values.

        Raises
        ------
        StudyError
            The network's weights or modules are not those that the study was made with.
        """
        self._identity.check(self.model, self.name)
        return {
            "weights": self._identity.weights,
            "modules": self._identity.modules,
            "operations": self._operations,
            "layers": self.layers,
            "classes": list(self._targets),
            "grid": list(self.grid),
            "cells": self.cells,
            "edges": self.edges,
            "others": self.others,
            "seed": self.seed,
            "metrics": self.metrics,
            **self.options,
            "probes": self.probes,
            "draws": asdict(self.draws) if "paper" in self.probes else None,
            "metric_images": self.metric_images,
            "block": self.block,
            "images": hash_of(self.images, self.labels),
            "device": self.device.type,
            "tf32": self.tf32,
        }

    def _check_classes(self, counts: dict[int, int]) -> None:
        if missing := [label for label in self.targets if label not in counts]:
            raise StudyError(f"targets: {missing[0]} is not among the labels {self.present}")
        if min(self.present) < 0:
            raise StudyError(f"labels: {min(self.present)} is no output; expected 0 or more")
        if self.classes is not None and len(self.classes) <= max(self.present):
            raise StudyError(
                f"classes: {len(self.classes)} names, but labels up to {max(self.present)}; "
                "expected a name for each label"
            )
        if self.classes is not None and len(self._targets) < len(self.targets):
            raise StudyError("classes: two targets have one name; expected distinct names")
        if alone := [label for label, count in counts.items() if count < 2]:
            raise StudyError(
                f"images: class {self.class_name(alone[0])!r} has one image; expected 2 or more"
            )
        if self.others is not None and self.others >= len(counts):
            raise StudyError(
                f"others: {self.others} beside a target, of {len(counts)} classes; expected 1 or "
                "more of the other ones"
            )
        if len(counts) < 2:
            raise StudyError(f"labels: all are {self.present[0]}; expected two classes or more")

    def _check_model(self) -> None:
        """Show the model one image: its outputs fit the labels, its layers hold the grid."""
        self.forward = AblatedForward(self.model, self.layers)
        try:
            logits, self.sizes = show_image(
                self.model, self.layers, self.images[:1].to(self.device)
            )
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            form = f"shape {tuple(self.images.shape[1:])}, dtype {_arrays.dtype_name(self.images)}"
            raise StudyError(
                f"images: {self.name} can't take one of {form} ({first_line(error)})"
            ) from error
        self._changes_itself = fingerprint(self.model) != self._identity.weights
        for layer in self.layers:
            neurons = self.sizes[layer].neurons if layer in self.sizes else 0
            if neurons < self.n_cells:
                raise StudyError(
                    f"grid: {self.grid[0]} x {self.grid[1]} cells for the {neurons} neurons of "
                    f"layer {layer!r}; expected a neuron or more in each cell"
                )
        self.forward.costs(self.images[:2].to(self.device), self.layers[:1], timed=False)  # traced?
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise StudyError(f"model: {self.name} gives {what}; expected logits (n, k), k > 1")
        if logits.shape[1] <= max(self.present):
            raise StudyError(
                f"labels: go up to {max(self.present)}, but {self.name} has "
                f"{logits.shape[1]} outputs; expected a label below that"
            )
