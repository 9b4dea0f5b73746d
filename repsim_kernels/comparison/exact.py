"""Exact maps: from the features of all layers, or from their Gram matrices."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.comparison import features, ranks, thresholds
from repsim_kernels.comparison.extract import FeatureBuffer, extract_to_files
from repsim_kernels.comparison.features import Metrics
from repsim_kernels.comparison.layers import Network
from repsim_kernels.comparison.passes import (
    compare_grams,
    describe_passes,
    print_plan,
)
from repsim_kernels.comparison.pooling import Pool
from repsim_kernels.comparison.side import Side
from repsim_kernels.comparison.similarity_map import SimilarityMap
from repsim_kernels.comparison.stimuli import Stimuli, align
from repsim_kernels.comparison.thresholds import Calibrate
from repsim_kernels.errors import OptionError


def compare_exactly(
    models: list[Network | dict[str, Tensor]], stimuli: list[Stimuli], pool: Pool,
    metrics: Metrics, budget: int, calibrate: Calibrate | None = None,
) -> dict[str, SimilarityMap]:  # fmt: skip
    """Compare networks, or a network and arrays, over all stimuli."""
    sides, kept = ranks.run_on_all(lambda: _read(models, stimuli, pool, budget))
    if not all(ranks.gather(kept is not None)):
        kept = None
    n = sum(ranks.gather(stimuli[0].n))
    total, grams = _count_bytes(sides, n)
    have_grams = all(side.sizes and side.keeps_stimuli for side in sides) and all(
        name in ("cka", "cka_debiased") and own["kernel"] == "linear"
        for name, own in metrics.items()
    )
    from_grams = have_grams and kept is None and total > grams
    if calibrate is not None:
        counts = [len(side.sizes or side.model) for side in sides]
        thresholds.check_memory(metrics, counts[0], counts[-1], n, budget, from_grams)
    in_blocks = have_grams and total <= grams and 2 * grams > budget
    if kept is not None:
        for one in stimuli:
            one.release()
        return features.compare_features(kept, metrics, in_blocks, calibrate)
    with _make_folder() as folder:
        if from_grams:
            return compare_grams(sides, n, metrics, budget, folder, calibrate)
        passes = [describe_passes(side, 1) for side in sides if side.sizes]
        print_plan([*passes, f"features are written to {folder.parent}"])
        kept = [_extract(side, folder / str(i)) for i, side in enumerate(sides)]
        return features.compare_features(kept, metrics, in_blocks, calibrate)


@contextmanager
def _make_folder() -> Iterator[Path]:
    """Make a temporary folder, and delete it on exit."""
    with ExitStack() as stack:
        try:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="repsim-"))
        except OSError as error:
            raise OptionError(
                f"memory: too little without a temporary folder, which can't be made in "
                f"{tempfile.gettempdir()}: {error.strerror}; expected more, or another TMPDIR"
            ) from None
        yield Path(name)


def _count_bytes(sides: list[Side], n: int) -> tuple[int, int]:
    """Return the bytes of all features of n stimuli, and of all Grams, packed and in float32."""
    count = sum(len(side.sizes) for side in sides)
    return n * sum(side.row_bytes for side in sides), count * n * n * 2


def _fits(sides: list[Side], n: int, budget: int) -> bool:
    """Whether features can be kept, with the Grams that `pairwise` makes of them, in float64.

    Features that are narrower than Grams are compared without, in blocks.
    """
    total, grams = _count_bytes(sides, n)
    return total + (2 * grams if total > grams else 0) <= budget


def _read(
    models: list[Network | dict[str, Tensor]], stimuli: list[Stimuli], pool: Pool, budget: int,
) -> tuple[list[Side], list[dict[str, Tensor]] | None]:  # fmt: skip
    """Read the loaders for the first time; return the features of all layers if they fit."""
    sides = [
        Side.observe(model, one, pool)
        for model, one in zip(models, (stimuli[0], stimuli[-1]), strict=False)
    ]
    if stimuli[1:] and not all(side.keeps_stimuli for side in sides):
        raise OptionError(f"pool: {pool!r} with two loaders; expected one that keeps the stimuli")
    # Each rank holds the features of all of them in the end.
    budget //= ranks.count()
    fits = _fits(sides, stimuli[0].estimate_count(), budget)
    buffers = [FeatureBuffer(side.sizes) for side in sides]
    for one in stimuli:
        for batch in one:
            for side, buffer in zip(sides, buffers, strict=True):
                if fits and side.sizes and side.stimuli is one:
                    side.visit(batch, side.sizes, buffer.add)
                    fits = sum(each.nbytes for each in buffers) <= budget
            if not fits:
                buffers = [FeatureBuffer(side.sizes) for side in sides]
    if stimuli[1:]:
        sides[1].positions = torch.from_numpy(align(*stimuli))
    if not (fits and _fits(sides, stimuli[0].n, budget)):
        return sides, None
    kept = [
        buffer.join() if side.sizes else side.model
        for side, buffer in zip(sides, buffers, strict=True)
    ]
    return sides, [
        {name: side.put_in_order(x) for name, x in layers.items()}
        for side, layers in zip(sides, kept, strict=True)
    ]


def _extract(side: Side, folder: Path) -> dict[str, Tensor]:
    """Return the representations of a side, in files of a folder if they are of a network."""
    if not side.sizes:
        return {name: side.put_in_order(x) for name, x in side.model.items()}
    layers: dict[str, Any] = extract_to_files(side.model, side.stimuli, side.pool, folder)
    if side.positions is not None:
        for name, x in layers.items():
            layers[name] = np.load(x.filename, mmap_mode="r+")
            layers[name][:] = side.put_in_order(x)
    return features.convert_arrays(layers, str(folder))
