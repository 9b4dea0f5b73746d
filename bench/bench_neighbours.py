"""Metrics of neighbours: of many stimuli with their peak memory, and of all pairs of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.bench_pairwise import make_layers
from bench.common.inputs import DEVICE, count_bytes, make_pair
from bench.common.memory import read_peak, start_peak
from bench.common.timing import make_inputs
from bench.common.tolerances import SAME, assert_close
from bench.conftest import Timer

N, P, K = 1_000, 2_000, 10
MANY, FEW = 20_000, 512  # stimuli, neurons
_MAX_BYTES = 400e6  # in addition to the inputs
_ROWS = 500  # stimuli whose distances from all others are made together


def find_nearest(x: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """Return the k nearest others of each row and their centred products, by definition.

    From all n² cosine distances in float64; without a rule for ties, which random features lack.
    """
    units = torch.nn.functional.normalize(x.cpu().double(), dim=1)
    centred = units - units.mean(0)
    indices, products = [], []
    for i, rows in enumerate(units.split(_ROWS)):
        similarity = rows @ units.mT
        itself = torch.arange(len(rows))
        similarity[itself, i * _ROWS + itself] = -torch.inf
        indices.append(similarity.topk(k, dim=1).indices)
        products.append((rows @ centred.mT).gather(1, indices[-1]))
    return torch.cat(indices), torch.cat(products)


def compute_by_definition(x: Tensor, y: Tensor, metric: str) -> float:
    (near_x, products_x), (near_y, products_y) = find_nearest(x), find_nearest(y)
    in_both = near_x[:, :, None] == near_y[:, None, :]
    shared = in_both.sum((1, 2))
    if metric == "mutual_knn":
        return float(shared.double().mean() / K)
    if metric == "jaccard_knn":
        return float((shared.double() / (2 * K - shared)).mean())
    products = products_x[:, :, None] * products_y[:, None, :] * in_both
    return float(products.sum() / (products_x.norm() * products_y.norm()))


def define(metric: str) -> Callable[..., float]:
    return partial(compute_by_definition, metric=metric)


@pytest.mark.parametrize("metric", ["mutual_knn", "cknna", "jaccard_knn"])
def test_layers(timed: Timer, metric: str) -> None:
    """Neighbours are made once for each layer, 12 times for 144 pairs."""
    timed(
        "pairwise",
        make_layers,
        call=lambda *xs: rk.pairwise(xs, metric=metric)[0, 1],
        oracle=lambda *xs: define(metric)(*xs[:2]),
        check=partial(assert_close, tol=SAME),
        label=metric,
        shape={"L": 12, "n": 100, "p": 5_000},
        bytes=12 * count_bytes(100, 5_000, torch.float32),
    )


check = partial(assert_close, tol=SAME)
PAIR = make_pair(N, P, torch.float32)
SIZES = {"n": N, "p": P}
BYTES = 2 * count_bytes(N, P, torch.float32)


def test_mutual_knn(timed: Timer) -> None:
    oracle = define("mutual_knn")
    timed("mutual_knn", PAIR, oracle=oracle, check=check, shape=SIZES, bytes=BYTES)


def test_cknna(timed: Timer) -> None:
    timed("cknna", PAIR, oracle=define("cknna"), check=check, shape=SIZES, bytes=BYTES)


def test_jaccard_knn(timed: Timer) -> None:
    oracle = define("jaccard_knn")
    timed("jaccard_knn", PAIR, oracle=oracle, check=check, shape=SIZES, bytes=BYTES)


@pytest.mark.parametrize("metric", ["mutual_knn", "cknna"])
def test_many_stimuli(timed: Timer, metric: str) -> None:
    """A distance matrix of these stimuli is 3.2 GB; two float32 masks are as large."""
    make = make_pair(MANY, FEW, torch.float32)
    peak = 0
    if DEVICE == "cpu":
        x, y = make_inputs(make, DEVICE)[0]
        start = start_peak()
        getattr(rk, metric)(x, y)
        peak = read_peak() - start
        del x, y
        assert peak < _MAX_BYTES, f"{peak / 1e6:.0f} MB in addition to the inputs"
        line = f"\n{metric}, n={MANY:,} p={FEW}: {peak / 1e6:.0f} MB in addition to the inputs"
        timed.request.config.get_terminal_writer().line(line)
    timed(
        metric,
        make,
        oracle=define(metric),
        check=check,
        shape={"n": MANY, "p": FEW},
        bytes=2 * count_bytes(MANY, FEW, torch.float32),
        operations={"ieee": 2 * MANY * (MANY + 1) * FEW},
    )
    timed.benchmark.extra_info["peak_bytes"] = peak
