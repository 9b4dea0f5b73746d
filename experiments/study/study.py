"""An ablation study of one network: its checked arguments, and the network it computes with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repsim_kernels import _options, experiments
from repsim_kernels.experiments.columns import METRICS, PROBES
from repsim_kernels.experiments.study import checks as check
from repsim_kernels.experiments.study.cells import (
    GRIDS,
    CellsOption,
    check_grid,
    check_kind,
    describe_kind,
    fix_cells,
)
from repsim_kernels.experiments.study.configuration import shorten_list
from repsim_kernels.experiments.study.network import (
    HeldNetwork,
    describe_modules,
    fingerprint,
    hash_operations,
    hash_parts,
    pass_one_image,
    read_layer,
)
from repsim_kernels.experiments.study.units import Unit, units_of
from repsim_kernels.forward import AblatedForward, Cost
from repsim_kernels.forward.memory import resolve_budget

# Attributes that a configuration records unchanged.
_RECORDED = (
    *("layers", "fill", "others", "seed", "metrics", "probes", "metric_images", "block", "tf32"),
)


class Study:
    """An ablation study of one network: some of its layers, and images of some classes.

    For each layer and target class the study groups the neurons into cells and ablates one cell
    after another. It measures the distance of each ablated representation from the intact one, and
    the function that is lost.

    Parameters
    ----------
    model : nn.Module
        Maps images to logits (n, k); torch.fx or torch.export must be able to trace it. The study
        works on the model itself: while it computes, the model is in evaluation mode and on
        ``device``. Between units and at the end everything is restored, including parameters and
        buffers that a pass writes to. Apart from that, the model's parameters, buffers and modules
        must not change.
    layers : sequence of str
        Names of modules of ``model``.
    images : tensor or array, (n, ...), or a Dataset or DataLoader of pairs (image, label)
        The model's input. Images are not copied: don't write to them before the run ends. Pairs
        are read into memory; to resume a run, they must come in the same order, unchanged.
    labels : integer tensor, array or sequence, (n,)
        The index of the model's output for each image's class; at least two classes, each with at
        least two images. None if `images` yields pairs.
    targets : sequence of int, optional
        Labels of the classes whose function is studied; all by default. Images of the other
        classes are the negatives that a target is compared with.
    grid : (int, int)
        Number of strips by selectivity, and of cells by magnitude within each strip. Only for the
        cells "selectivity" and "random".
    metrics : sequence of str, or "all"
        Distances to compute, by default those of ``repsim_kernels.experiments.columns.METRICS``.
    name : str, optional
        Value of the table's column ``model``; the model's class name by default.
    classes : sequence of str, optional
        Class names, indexed by label.
    cells : {"selectivity", "random", "channels", "heads"}, function, or dict
        How a layer's neurons are grouped into cells. "selectivity": a grid by selectivity for each
        target and magnitude. "random": as a control, at random into cells of the same sizes.
        "channels": as ``rk.cells.channels``; "heads": as ``rk.cells.heads``, for layers named
        "module:heads". A function gets the shape of the layer's activation for one image, the
        activations (n, p) of the metrics' images, and their labels (n,); it returns cells as
        ``AblatedForward.logits`` takes them. A dict has such cells for each layer. Apart from the
        grids, all targets share a layer's cells.
    fill : {"zero", "mean"}
        What ablated neurons are set to: zero, or each neuron's mean over the metrics' images. With
        "mean" performance and the frozen probes differ; the distances and the refitted probes do
        not, because they see only differences between stimuli. The metrics "rsa_cosine",
        "rsa_correlation" and "mutual_knn" would differ, and are refused with "mean".
    edges : {"equal", "inclusive"}
        As in ``selectivity_grid``; only for the cells "selectivity" and "random".
    others : int, optional
        Number of other classes, drawn at random for each target, that the target is compared
        with; all by default.
    ridge, penalty : float
        Passed to ``ablation_distances``.
    probe_ridge : float
        Passed to ``ablation_decodability`` as its ``ridge``.
    metric_images : int, optional
        Images of each class that the metrics see, its first ones; all by default. Distances,
        decodability and selectivity are computed from these. The network's performance is always
        computed from all images of the target.
    probes : sequence of str
        Probes of linear decodability. "ridge": leave-one-out ridge regression, refitted and
        frozen, scored by balanced accuracy and by margin. "paper": the published study's logistic
        regressions on randomly drawn neurons, with the standard error over the draws.
    draws : repsim_kernels.experiments.Draws, optional
        How many draws the probe "paper" makes, and how; 200 draws by default.
    seed : int
        Seed of the drawn classes (``others``), the random cells and the drawn neurons.
    memory : int or str, optional
        Bytes, or a string such as "8GiB", for everything that the study holds in addition to the
        model and its images: the activations of as many layers as fit, and the computation.
        Half of the device's free memory by default.
    block : int
        Target classes per unit of work. A unit is measured from one pass over the images and
        stored as a whole, so it is the most that a killed run loses.
    note : str, optional
        A remark for the table and the report, for example that the study is not evidence; a
        resumed run keeps its first note.
    device : str or torch.device, optional
        Where to compute; the model's device by default.
    tf32 : bool
        Whether CUDA may round float32 products and convolutions to TF32 while the study computes.
        PyTorch's own switches are ignored.

    Raises
    ------
    StudyError
        An argument is wrong or not supported (masked, sparse); the message names it.
    LayerError
        A layer is not in the model, or the network can't be cut there.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from repsim_kernels.experiments import Study
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2))
    >>> images, labels = torch.randn(20, 3, 2, 2), torch.arange(2).repeat(10)
    >>> study = Study(model, ["2"], images, labels, grid=(2, 2), metrics=["cka"], device="cpu")
    >>> study  # doctest: +NORMALIZE_WHITESPACE
    Study(model=Sequential, name='Sequential', layers=['2'], images=(20, 3, 2, 2), classes=2,
          targets=[0, 1], grid=(2, 2), metrics=['cka'], probes=['ridge'], device='cpu')
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        images: Tensor | NDArray[Any] | Dataset[Any] | DataLoader[Any],
        labels: Tensor | NDArray[Any] | Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
        grid: tuple[int, int] = (4, 4),
        metrics: Sequence[str] | Literal["all"] = METRICS,
        *,
        name: str | None = None,
        classes: Sequence[str] | None = None,
        cells: CellsOption = "selectivity",
        fill: str = "zero",
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
        weights, modules = fingerprint(model), describe_modules(model)
        self.device = check.check_device(model, device)
        with check.raise_study_errors():
            self.name = check.check_string(type(model).__name__ if name is None else name, "name")
            self.note = None if note is None else check.check_string(note, "note")
            self.layers = check.check_distinct(check.check_names(layers, "layers"), "layers")
            self.metrics = check.check_metrics(metrics)
            probes = check.check_names(probes, "probes", tuple(PROBES))
            self.probes = check.check_distinct(probes, "probes")
            self.draws = check.check_draws(draws)
            self.grid = _options.check_grid(grid)
            self.cells = check_kind(cells, self.layers)
            self.fill = check.check_fill(fill, self.metrics)
            self.edges = _options.check_choice(edges, "edges", ("equal", "inclusive"))
            self.others = check.check_optional_count(others, "others")
            self.seed = _options.check_count(seed, "seed", 0)
            self.block = _options.check_count(block, "block")
            self.tf32 = _options.check_flag(tf32, "tf32")
            ridge, penalty = _options.check_ridge_and_penalty(ridge, penalty)
            probe_ridge = _options.check_probe_ridge(probe_ridge, "probe_ridge")
            self.options = {"ridge": ridge, "penalty": penalty, "probe_ridge": probe_ridge}
            self.metric_images = check.check_optional_count(metric_images, "metric_images", 2)
            self.classes = None if classes is None else check.check_names(classes, "classes")
            self.images, self.labels = check.read_images(images, labels)
            self.memory_is_explicit = memory is not None  # rather than half of what was free
            self.memory = resolve_budget(memory, self.device)
            check.check_pairs(self.images, self.labels)
            unique, counts = np.unique(self.labels.numpy(), return_counts=True)
            self.unique_labels: list[int] = unique.tolist()
            self.targets = self.unique_labels if targets is None else check.check_targets(targets)
            by_label = dict(zip(self.unique_labels, counts.tolist(), strict=True))
            check.check_classes(by_label, self.targets, self.classes, self.others)
            check.check_neighbours(self.metrics, counts.tolist(), self.metric_images, self.others)
        self._network = HeldNetwork(self.model, self.name, weights, modules)
        with self.hold_network():
            self._check_model()

    def __repr__(self) -> str:
        """Summarise the study in one line."""
        facts = {
            "model": type(self.model).__name__,
            "name": repr(self.name),
            "layers": shorten_list(self.layers),
            "images": tuple(self.images.shape),
            "classes": len(self.unique_labels),
            "targets": self.targets if len(self.targets) <= 4 else f"{len(self.targets)} classes",
            "metric_images": self.metric_images,
            "others": self.others,
            "grid": None if self.fixed_cells else self.grid,
            "cells": None if self.cells == "selectivity" else describe_kind(self.cells),
            "fill": None if self.fill == "zero" else repr(self.fill),
            "metrics": shorten_list(self.metrics),
            "probes": self.probes,
            "device": repr(str(self.device)),
        }
        shown = (f"{key}={value}" for key, value in facts.items() if value is not None)
        return f"Study({', '.join(shown)})"

    @property
    def units(self) -> list[Unit]:
        """The study's units of work, layer by layer."""
        return units_of(self.name, self.layers, len(self.targets), self.block)

    def targets_of(self, unit: Unit) -> list[int]:
        """The target classes of a unit."""
        return self.targets[(unit.block - 1) * self.block : unit.block * self.block]

    def count_cells(self, layer: str) -> int:
        """The number of cells that a layer's neurons are grouped into."""
        return self.fixed_cells[layer].count if self.fixed_cells else self.grid[0] * self.grid[1]

    @property
    def n_metric_images(self) -> int:
        """Number of images, over all classes, that the metrics see."""
        return sum(self.count_metric_images(label) for label in self.unique_labels)

    @property
    def n_stimuli(self) -> int:
        """Number of images that the metrics of the first target see."""
        if self.others is None:
            return self.n_metric_images
        target = self.targets[0]
        return sum(
            self.count_metric_images(label) for label in (target, *self.draw_other_classes(target))
        )

    def count_metric_images(self, label: int) -> int:
        """Count the images of a class that the metrics see."""
        count = int((self.labels == label).sum())
        return min(count, self.metric_images or count)

    def draw_other_classes(self, label: int) -> list[int]:
        """Draw the other classes that a target is compared with, sorted."""
        rest = [other for other in self.unique_labels if other != label]
        drawn = np.random.default_rng([self.seed, label]).permutation(rest)
        return sorted(drawn[: self.others].tolist())

    def class_name(self, label: int) -> str | int:
        """The name of a class, or its label if classes have no names."""
        return label if self.classes is None else self.classes[label]

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        progress: Callable[[Any], object] | None = None,
    ) -> experiments.Results:
        """Run the study in this process.

        Parameters
        ----------
        out : path, optional
            A folder: stores each finished unit at once, and ``results.parquet`` at the end. Units
            that are stored already are not computed again.
        progress : callable, optional
            Called with a `RunProgress` when a unit starts, is done, or has failed.

        Returns
        -------
        Results
            ``table``, ``summary()`` and ``report()``; the table has one row per class, layer and
            cell. For its columns, and the errors raised, see ``repsim_kernels.experiments.run``.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> from repsim_kernels.experiments import Study
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> images, labels = torch.randn(20, 3, 2, 2), torch.arange(2).repeat(10)
        >>> study = Study(model, ["2"], images, labels, grid=(2, 2), metrics=["cka"])
        >>> table = study.run().table
        >>> table[["class", "layer", "cell", "size"]].head(2)
           class layer  cell  size
        0      0     2     0     4
        1      0     2     1     4
        >>> len(table)  # 2 classes x 1 layer x 4 cells
        8
        """
        return experiments.run(self, out, progress)

    @contextmanager
    def hold_network(self) -> Iterator[None]:
        """Put the network in evaluation mode on the study's device, and set the TF32 switches.

        The network and PyTorch's switches are restored at the end.

        Raises
        ------
        StudyError
            The network's weights or modules have changed since the study was made.
        """
        with self._network.hold(self.device, self.tf32):
            yield

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Cost of the network before and after each layer, counted on two images."""
        with self.hold_network():
            return self.forward.costs(self.images[:2].to(self.device), timed=False)

    @cached_property
    def _operations(self) -> str:
        with self.hold_network():
            return hash_operations(self.model, self.layers, self.images[:2].to(self.device))

    def configuration(self) -> dict[str, Any]:
        """Collect everything that determines the rows, as values that JSON can hold.

        Raises
        ------
        StudyError
            The network's weights or modules have changed since the study was made.
        """
        self._network.check()
        own = self.fixed_cells
        hashes = {layer: hash_parts(*cells.tensors)[:16] for layer, cells in own.items()}
        return {
            "weights": self._network.weights,
            "modules": self._network.modules,
            "operations": self._operations,
            "classes": [str(self.class_name(label)) for label in self.targets],
            "cells": self.cells if isinstance(self.cells, str) else hashes,
            **({} if own else {"grid": list(self.grid), "edges": self.edges}),
            **{name: getattr(self, name) for name in _RECORDED},
            **self.options,
            "draws": asdict(self.draws) if "paper" in self.probes else None,
            "images": hash_parts(self.images, self.labels),
            "device": self.device.type,
        }

    def _check_model(self) -> None:
        """Pass one image: check that the outputs fit the labels and the layers fit the cells."""
        self.forward = AblatedForward(self.model, self.layers)
        with check.explain_rejection(self.images, self.model, self.name):
            image = self.images[:1].to(self.device)
            logits, self.sizes = pass_one_image(self.model, self.layers, image)
        self._network.note_changes(self.images[:1].to(self.device))
        # Raises if the network can't be traced, or a layer does not return a tensor.
        missing = [layer for layer in self.layers if layer not in self.sizes]
        two = self.images[:2].to(self.device)
        self.forward.costs(two, missing or self.layers[:1], timed=False)
        check.check_logits(logits, self.name, max(self.unique_labels))
        if self.cells in GRIDS:
            check_grid(self.grid, self.sizes)
        with torch.no_grad():
            self.fixed_cells = fix_cells(self.cells, self.forward, self.sizes, self._read_layer)

    def _read_layer(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's activations (n, p) for the metrics' images, and their labels."""
        rows = ((self.labels == label).nonzero()[:, 0] for label in self.unique_labels)
        index = torch.cat([each[: self.metric_images] for each in rows])
        x = read_layer(self.forward, layer, self.images, index, self.device)
        return x, self.labels[index]
