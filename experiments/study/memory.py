"""How much of a study fits in its memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repsim_kernels.experiments.errors import StudyError

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

BATCH = 64  # images that go through the network together, at most
_HELD = 0.7  # of the memory, for activations; the rest is for what runs
_GRID = 190  # bytes a neuron that it takes to sort them into cells, measured


def choose_batch_size(study: Study) -> int:
    """Images that go through the network together."""
    room = (1 - _HELD) / 2 * study.memory  # products have workspaces of their tensors' size
    return max(1, min(BATCH, int(room // study.costs[study.layers[0]].pass_bytes)))


def bytes_held(study: Study) -> dict[str, int]:
    """Bytes that each layer's activations, and what its ablated passes start from, take."""
    targets = sum(int((study.labels == label).sum()) for label in study.targets)
    found = {}
    for name, layer in study.sizes.items():
        beside = study.costs[name].held_bytes - layer.bytes  # the activation is in x
        copies = 0 if study.others is None else study.n_stimuli * layer.bytes
        if "paper" in study.probes:  # its copy, neuron by neuron
            copies += study.n_stimuli * layer.bytes
        found[name] = (
            study.n_metric_images * layer.bytes
            + targets * max(0, beside)
            + copies
            + _GRID * layer.neurons
        )
    return found


def group_layers(study: Study, layers: Sequence[str]) -> list[list[str]]:
    """Layers that one pass of the images serves: as many as the memory holds, at least one."""
    sizes, found, size = bytes_held(study), [list[str]()], 0
    room = int(_HELD * study.memory)
    for layer in layers:
        if sizes[layer] > room:
            least = math.ceil(sizes[layer] / _HELD / 2**20)
            raise StudyError(
                f"memory: {study.memory / 2**20:.0f} MiB; expected {least} MiB or more, for what "
                f"layer {layer!r} of {study.name} gives for these images"
            )
        if found[-1] and size + sizes[layer] > room:
            found.append([])
            size = 0
        found[-1].append(layer)
        size += sizes[layer]
    return found
