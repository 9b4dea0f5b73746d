"""The activations of a study's layers, from one pass over the images per group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repsim_kernels.experiments.study.memory import choose_batch_size
from repsim_kernels.forward import State

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study


@dataclass
class LayerActivations:
    """A layer's activations (n, p), sorted by class, and where ablated passes resume.

    ``states`` holds, for each target class, the network's state at the layer, batch by batch.
    """

    x: Tensor
    labels: Tensor
    states: dict[int, list[State]] = field(default_factory=dict)


def collect_activations(
    study: Study, layers: Sequence[str], targets: set[int]
) -> dict[str, LayerActivations]:
    """Pass all images once, and keep the layers' activations and the targets' states."""
    y = torch.cat(
        [torch.full((study.count_metric_images(label),), label) for label in study.unique_labels]
    )
    by_layer: dict[str, LayerActivations] = {}
    if not layers:
        return by_layer
    row, size = 0, choose_batch_size(study)
    for label in study.unique_labels:
        images = study.images[study.labels == label]
        remaining = study.count_metric_images(label)
        # Batches don't depend on the layers and targets: a resumed run gives bit-identical rows.
        for batch in torch.split(images, size):
            if not remaining and label not in targets:
                break
            states = study.forward.prefixes(batch.to(study.device), layers)
            count = min(remaining, len(batch))
            for layer in layers:
                state = states.pop(layer)
                if layer not in by_layer:
                    p = study.sizes[layer].neurons
                    by_layer[layer] = LayerActivations(state.activation.new_empty(len(y), p), y)
                activations = by_layer[layer]
                if count == len(state):
                    state.move(activations.x[row : row + count])
                else:
                    activations.x[row : row + count] = state.activation[:count].flatten(1)
                if label in targets:
                    activations.states.setdefault(label, []).append(state)
            remaining -= count
            row += count
    return by_layer
