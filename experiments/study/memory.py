"""How many images and layers of a study fit in its memory budget together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repsim_kernels.experiments.errors import StudyError

if TYPE_CHECKING:
    from repsim_kernels.experiments.study.study import Study

BATCH = 64  # maximum number of images in one pass
_ACTIVATION_SHARE = 0.7  # of the memory budget; the rest is for the computation
_SORTING_BYTES = 190  # bytes per neuron for sorting neurons into cells, measured


def choose_batch_size(study: Study) -> int:
    """Number of images per pass through the network."""
    # Half of the computation's share: matrix products have workspaces as large as their tensors.
    free_bytes = (1 - _ACTIVATION_SHARE) / 2 * study.memory
    return max(1, min(BATCH, int(free_bytes // study.costs[study.layers[0]].pass_bytes)))


def bytes_held(study: Study) -> dict[str, int]:
    """Bytes that a study holds for each layer: activations, and the states of ablated passes."""
    n_target_images = sum(int((study.labels == label).sum()) for label in study.targets)
    sizes = {}
    for name, layer in study.sizes.items():
        rest = study.costs[name].held_bytes - layer.bytes  # the activation itself is in x
        copies = 0 if study.others is None else study.n_stimuli * layer.bytes
        if "paper" in study.probes:  # it copies the activations, neuron by neuron
            copies += study.n_stimuli * layer.bytes
        if study.fill == "mean" and "ridge" in study.probes:  # a shifted copy
            copies += study.n_stimuli * layer.bytes
        sizes[name] = (
            study.n_metric_images * layer.bytes
            + n_target_images * max(0, rest)
            + copies
            + _SORTING_BYTES * layer.neurons
        )
    return sizes


def group_layers(study: Study, layers: Sequence[str]) -> list[list[str]]:
    """Split layers into consecutive groups that share a pass: as many as fit, at least one."""
    sizes, result, size = bytes_held(study), [list[str]()], 0
    limit = int(_ACTIVATION_SHARE * study.memory)
    for layer in layers:
        if sizes[layer] > limit:
            least = math.ceil(sizes[layer] / _ACTIVATION_SHARE / 2**20)
            raise StudyError(
                f"memory: {study.memory / 2**20:.0f} MiB; expected {least} MiB or more, to hold "
                f"layer {layer!r} of {study.name} for these images"
            )
        if result[-1] and size + sizes[layer] > limit:
            result.append([])
            size = 0
        result[-1].append(layer)
        size += sizes[layer]
    return result
