"""Exact CKA from the Gram matrices of layers, which are additive over neurons."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.comparison import batches, features, ranks, thresholds
from repsim_kernels.comparison.extract import LayerSize, check_width
from repsim_kernels.comparison.features import Metrics
from repsim_kernels.comparison.grams import MIN_STIMULI, GramTable, Products, compute_cosines
from repsim_kernels.comparison.side import Side, check_devices, is_on_gpu
from repsim_kernels.comparison.similarity_map import SimilarityMap
from repsim_kernels.comparison.thresholds import Calibrate
from repsim_kernels.errors import OptionError, ShapeError
from repsim_kernels.forward.memory import format_bytes, trim_heap
from repsim_kernels.ops import pairwise

# Bytes of a pass over all stimuli at once, in units of its largest output: input and output of the
# layer that runs, what a convolution unfolds, and what waits for a residual connection.
_LIVE_OUTPUTS = 4

# Neurons of the Gram whose time is measured to estimate that of all.
_SAMPLE = 1024

NeuronSlice = tuple[str, slice]
"""A layer and some of its neurons."""


def compare_grams(
    sides: list[Side], n: int, metrics: Metrics, budget: int, folder: Path,
    calibrate: Calibrate | None = None,
) -> dict[str, SimilarityMap]:  # fmt: skip
    """Compute CKA of networks from the Grams of their layers, for n stimuli on all ranks."""
    debiased = {name: pairwise.is_debiased(name, own) for name, own in metrics.items()}
    if n < MIN_STIMULI and any(debiased.values()):
        raise ShapeError(f"loader: {n} stimuli; expected at least {MIN_STIMULI} for debiased CKA")
    check_devices([side.model for side in sides])
    on_gpu = is_on_gpu(sides[0].model)
    if calibrate is not None and on_gpu:
        raise OptionError(
            f"memory: {format_bytes(budget)} is less than the features of all layers, which "
            "calibrate needs on a GPU; expected more, or fewer layers or stimuli"
        )
    itemsize = max(size.itemsize for side in sides for size in side.sizes.values())
    # On a GPU, the format of a backend may need all digits.
    is_single = (
        itemsize <= 4
        and not on_gpu
        and all(own["precision"] == "float32" for own in metrics.values())
    )
    dtype = torch.float32 if is_single else torch.float64
    needed = sum(len(side.sizes) for side in sides) * len(metrics) * n * n // 2 * dtype.itemsize
    in_files = needed > budget // 2
    if in_files and on_gpu:
        raise OptionError(
            f"memory: {format_bytes(budget)}, but the Gram matrices of all layers take "
            f"{format_bytes(needed)} on the GPU; expected twice that, fewer layers or stimuli, or "
            "estimator='minibatch'"
        )
    # While a Gram is made, it takes 8 n² bytes at most.
    budget = max(budget - 8 * n * n - (0 if in_files else needed), budget // 4)
    tables = {
        name: [
            GramTable(
                side.sizes, debiased[name], own["precision"], dtype, folder if in_files else None,
                budget // 4,
            )
            for side in sides
        ]
        for name, own in metrics.items()
    }  # fmt: skip
    plans = [_plan(side, n, budget) for side in sides]
    lines = [
        describe_passes(side, len(plan))
        for side, plan in zip(sides, plans, strict=True)
        if plan is not None and len(plan) > 1
    ]
    if in_files:
        lines.append(f"{format_bytes(needed)} of Gram matrices are written to {folder.parent}")
    if lines:
        lines.append(f"Gram matrices take about {_estimate_products(sides, n, on_gpu)}")
    print_plan(lines)
    if all(plan is None for plan in plans):
        for side in sides:
            side.stimuli.release()
    for i, (side, plan) in enumerate(zip(sides, plans, strict=True)):
        _fill([own[i] for own in tables.values()], side, plan)
    return {
        name: _compare_tables(tables[name][0], tables[name][-1], name, own, calibrate)
        for name, own in metrics.items()
    }


def _compare_tables(
    rows: GramTable, columns: GramTable, name: str, options: dict[str, Any],
    calibrate: Calibrate | None,
) -> SimilarityMap:  # fmt: skip
    """Return the map of one kind of CKA."""
    products = rows.multiply(columns)
    values = compute_cosines(products.xy, products.xx[:, None], products.yy)
    if rows is columns:
        is_undefined = ~(products.xx > 0)
        values = pairwise.compare_with_itself(values, name, options)
        values[is_undefined] = values[:, is_undefined] = np.nan
    if not pairwise.is_debiased(name, options):
        _warn_of_chance(products, rows.n, rows is columns)
    m = features.make_map(values, rows.names, columns.names, name, options, rows.n)
    if calibrate is None:
        return m
    xs = rows.unpack(products.xx > 0)
    ys = None if rows is columns else columns.unpack(products.yy > 0)
    return thresholds.add_threshold(m, xs, ys, options | {"kernel": "precomputed"}, calibrate)


def _warn_of_chance(products: Products, n: int, of_one_network: bool) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        norms = np.sqrt(np.outer(products.xx, products.yy))
        chances = np.outer(products.trace_x, products.trace_y) / (n - 1) / norms
    features.warn_if_high_by_chance(chances, of_one_network)


def _plan(side: Side, n: int, budget: int) -> list[list[NeuronSlice]] | None:
    """Return the blocks of neurons of each pass; None if all stimuli fit one pass as one batch."""
    largest = max(size.largest_bytes for size in side.sizes.values())
    is_joined = (
        largest * side.stimuli.n * _LIVE_OUTPUTS <= budget and side.stimuli.joined is not None
    )
    return None if all(ranks.gather(is_joined)) else list(plan_passes(side.sizes, n, budget))


def plan_passes(sizes: dict[str, LayerSize], n: int, budget: int) -> Iterator[list[NeuronSlice]]:
    """Group the neurons of all layers into passes whose features fit the budget of bytes."""
    blocks: list[NeuronSlice] = []
    free = budget
    for name, size in sizes.items():
        column = n * size.itemsize
        start = 0
        while start < size.p:
            if free < column and blocks:
                yield blocks
                blocks, free = [], budget
            stop = min(size.p, start + max(1, free // column))
            blocks.append((name, slice(start, stop)))
            free -= (stop - start) * column
            start = stop
    if blocks:
        yield blocks


def describe_passes(side: Side, count: int) -> str:
    """Say how often a network runs, for how many bytes of features, and how long that takes."""
    half = batches.take_stimuli(
        side.stimuli.sample, max(1, batches.count_stimuli(side.stimuli.sample) // 2)
    )
    start = time.perf_counter()
    side.model.run(half, lambda _name, _output: None)
    if is_on_gpu(side.model):
        torch.cuda.synchronize()
    running = (time.perf_counter() - start) * side.stimuli.n / batches.count_stimuli(half)
    seconds = count * (running + side.stimuli.seconds)
    return (
        f"{count} {'pass' if count == 1 else 'passes'} of {type(side.model.model).__name__} over "
        f"{side.stimuli.n:,} stimuli, about {_format_seconds(seconds)}, for "
        f"{format_bytes(side.stimuli.n * side.row_bytes)} of features"
    )


def _estimate_products(sides: list[Side], n: int, on_gpu: bool) -> str:
    """Say how long the Grams of all layers take, from that of some random features."""
    generator = torch.Generator().manual_seed(0)  # the user's stays as it is
    x = torch.randn(n, _SAMPLE, generator=generator).to("cuda" if on_gpu else "cpu")
    start = time.perf_counter()
    table = GramTable(["sample"], n >= MIN_STIMULI, "float32")
    table.add("sample", x)
    table.multiply(table)
    seconds = time.perf_counter() - start
    p = sum(size.p for side in sides for size in side.sizes.values())
    return _format_seconds(seconds * p / _SAMPLE)


def _format_seconds(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 120 else f"{max(1.0, seconds):.0f} s"


def print_plan(lines: list[str]) -> None:
    if ranks.is_first():
        for line in lines:
            print(f"compare: {line}", file=sys.stderr)


def _fill(tables: list[GramTable], side: Side, plan: list[list[NeuronSlice]] | None) -> None:
    """Compute the Grams of a network's layers."""

    def add(name: str, x: Tensor) -> None:
        x = ranks.gather_stimuli(x)
        for table in tables:
            table.add(name, x)

    if plan is None:
        trim_heap()
        side.visit(side.stimuli.joined, side.sizes, lambda name, x: add(name, side.put_in_order(x)))
    for blocks in plan or ():
        stored = _store(side, dict(blocks))
        for name in list(stored):
            add(name, stored.pop(name))
    for table in tables:
        table.flush()


def _store(side: Side, columns: dict[str, slice]) -> dict[str, Tensor]:
    """Return some neurons of some layers, from one pass over the stimuli."""
    stored: dict[str, Tensor] = {}
    start = 0

    def store(name: str, x: Tensor) -> None:
        check_width(name, x, side.sizes[name].p)
        x = x[:, columns[name]]
        if name not in stored:
            stored[name] = x.new_empty(side.stimuli.n, x.shape[1])
        rows: Any = slice(start, start + len(x))
        stored[name][rows if side.positions is None else side.positions[rows]] = x

    for batch in side.stimuli:
        side.visit(batch, columns, store)
        start += batches.count_stimuli(batch)
    return stored
