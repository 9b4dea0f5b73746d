"""COVERAGE.md: how often intervals contain the truth and tests reject, in simulated studies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench import significance
from repsim_kernels.experiments.analysis.correlations import centred_ranks, correlate
from repsim_kernels.experiments.analysis.resampling import fisher_z, jackknife, sign_flips
from repsim_kernels.experiments.analysis.shuffles import PERCENT, SHUFFLES, take_quantile

SEED = 20241124  # of the studies; the truth uses the next integer
STUDIES = 2_000
_TRUTH = 20_000  # studies whose mean is used as the truth
_BATCH = 500  # studies per batch
CLASSES, LAYERS, CELLS = 10, 7, 16
LEVEL = 0.95
MEAN = 0.4  # of the latent z; the next three are its standard deviations
CLASS, METRIC, NOISE = 0.2, 0.1, 0.2
RAMP = 0.3  # the layers' effects go from -RAMP to RAMP
SHARED = 0.5  # of the metrics' variance that the function change does not explain
MISSING = 0.05  # share of the groups without a correlation
EFFECT = 0.2  # added to the z of one metric in the simulation of power
TABLES = 5_000  # whose cells are shuffled, for each share of COMMON
COMMON = 0.25, 0.81  # shares of the variance of a table's columns that all groups have in common
DISTANCES, CHANGES = ["distance 1", "distance 2"], ["change 1", "change 2"]


@dataclass(frozen=True)
class Row:
    """A share of the studies and, for a coverage, the mean width of the interval."""

    name: str
    hits: np.ndarray
    width: float | None = None

    @property
    def share(self) -> float:
        return float(self.hits.mean())

    @property
    def error(self) -> float:
        return float(np.sqrt(self.share * (1 - self.share) / len(self.hits)))


def draw_correlations(rng: np.random.Generator, studies: int, effect: float = 0.0) -> np.ndarray:
    """Draw Spearman's correlations of F with two metrics, NaN if missing: (studies, c, l, 2)."""
    shape = studies, CLASSES, LAYERS
    z = MEAN + CLASS * rng.standard_normal((studies, CLASSES, 1))
    z = z + np.linspace(-RAMP, RAMP, LAYERS) + NOISE * rng.standard_normal(shape)
    z = z[..., None] + METRIC * rng.standard_normal((studies, CLASSES, 1, 2))
    rho = np.tanh(z + np.array([effect, 0.0])).reshape(-1, 1, 2)
    function = rng.standard_normal((len(rho), CELLS, 1))
    other = np.sqrt(SHARED) * rng.standard_normal((len(rho), CELLS, 1))
    other = other + np.sqrt(1 - SHARED) * rng.standard_normal((len(rho), CELLS, 2))
    metrics = rho * function + np.sqrt(1 - rho**2) * other
    rank_rho = correlate(centred_ranks(metrics), centred_ranks(function))[..., 0]
    rank_rho[rng.random(len(rank_rho)) < MISSING] = np.nan
    return rank_rho.reshape(*shape, 2)


def compute_truth(studies: int = _TRUTH) -> float:
    """Return the mean correlation of the first metric in studies that no interval uses."""
    rng = np.random.default_rng(SEED + 1)
    batches = [
        np.nanmean(draw_correlations(rng, _BATCH)[..., 0]) for _ in range(-(-studies // _BATCH))
    ]
    return float(np.mean(batches))


def compute_bootstrap(
    sums: np.ndarray, counts: np.ndarray, seed: int, level: float = LEVEL, resamples: int = 10_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Like `jackknife`, with the percentile interval of resampled clusters, (rows, k).

    Rows with the same clusters are resampled together.
    """
    ends = np.full((2, len(sums)), np.nan)
    patterns, row_pattern = np.unique(counts > 0, axis=0, return_inverse=True)
    for i, known in enumerate(patterns):
        k = int(known.sum())
        (rows,) = np.nonzero(row_pattern == i)
        rng = np.random.default_rng(seed)
        times = rng.multinomial(k, np.full(k, 1 / k), size=resamples).T.astype(np.float64)
        means = (sums[np.ix_(rows, known)] @ times) / (counts[np.ix_(rows, known)] @ times)
        ends[:, rows] = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return sums.sum(-1) / counts.sum(-1), ends[0], ends[1]


def compute_rows(studies: int, expected: float) -> list[Row]:
    """Return the coverage of the intervals, and the size and power of the test."""
    rng = np.random.default_rng(SEED)
    names = "coverage, jackknife-t", "coverage, bootstrap of classes"
    hits: dict[str, list[np.ndarray]] = {}
    widths: dict[str, list[np.ndarray]] = {}

    def add(name: str, low: np.ndarray, high: np.ndarray, value: float) -> None:
        hits.setdefault(name, []).append((low <= value) & (value <= high))
        widths.setdefault(name, []).append(high - low)

    for start in range(0, studies, _BATCH):
        size = min(_BATCH, studies - start)
        same, ahead = draw_correlations(rng, size), draw_correlations(rng, size, EFFECT)
        first = same[..., 0]
        counts = np.isfinite(first).sum(-1).astype(np.float64)
        sums = np.nansum(first, axis=-1)
        for name, ends in (
            (names[0], jackknife(sums, counts, LEVEL)),
            (names[1], compute_bootstrap(sums, counts, SEED + start)),
        ):
            add(name, ends[1], ends[2], expected)
        for name, studies_rho in (("size, permutation test", same), ("power", ahead)):
            gain = np.diff(fisher_z(studies_rho, CELLS)[..., ::-1], axis=-1)[..., 0]
            values = np.nanmean(gain, axis=-1)
            hits.setdefault(name, []).append(sign_flips(values) < 1 - LEVEL)
            if studies_rho is same:
                ends = jackknife(values, np.ones_like(values), LEVEL)
                add("coverage of the difference, jackknife-t", ends[1], ends[2], 0.0)
    return [
        Row(
            name,
            np.concatenate(batches),
            float(np.concatenate(widths[name]).mean()) if name in widths else None,
        )
        for name, batches in hits.items()
    ]


class Beyond(NamedTuple):
    """How many tables, in percent, have a correlation above the threshold of each shuffle."""

    common: float
    separate: float
    shared: float


def draw_unrelated(rng: np.random.Generator, tables: int, common: float) -> np.ndarray:
    """Draw distances and unrelated changes of the cells of each group: (tables, g, cells, 4)."""
    shape = tables, CLASSES * LAYERS, CELLS, len(DISTANCES + CHANGES)
    profiles = rng.standard_normal((tables, 1, *shape[2:]))
    return np.sqrt(common) * profiles + np.sqrt(1 - common) * rng.standard_normal(shape)


def rank_cells(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of distances and of changes, centred and of length 1."""
    ranks = centred_ranks(values)
    ranks /= np.linalg.norm(ranks, axis=-2, keepdims=True)
    return ranks[..., : len(DISTANCES)], ranks[..., len(DISTANCES) :]


def draw_shuffles(groups: int, seed: int) -> np.ndarray:
    """Draw shuffles of the cells of each group, (1 + shuffles, g, cells); the first one is none."""
    orders = np.tile(np.arange(CELLS), (1 + SHUFFLES, groups, 1))
    orders[1:] = np.random.default_rng(seed).permuted(orders[1:], axis=-1)
    return orders


def find_thresholds(x: np.ndarray, y: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Do what `find_threshold` does, for many tables of ranks (tables, g, cells, columns) at once.

    Shuffles of one group (shuffles, 1, cells) are shared by all.
    """
    products = np.einsum("tgia,tgjb->tabgij", x, y) / x.shape[1]
    if orders.shape[1] == 1:
        products = products.sum(3)
    moves = np.eye(CELLS)[orders].reshape(len(orders), -1)  # 1 where cell i takes change j
    means = products.reshape(-1, moves.shape[1]) @ moves.T
    return take_quantile(np.abs(means).reshape(len(x), -1, len(orders)).max(1))


def iter_beyond(tables: int) -> Iterator[Beyond]:
    """Yield how many unrelated tables have a correlation above each threshold, by COMMON."""
    rng = np.random.default_rng(SEED)
    shared = draw_shuffles(1, 0)
    for common in COMMON:
        hits = []
        for start in range(0, tables, _BATCH):
            x, y = rank_cells(draw_unrelated(rng, min(_BATCH, tables - start), common))
            largest = np.abs((x.mT @ y).mean(1)).max((1, 2))
            separate = draw_shuffles(x.shape[1], SEED + start)
            hits.append([largest > find_thresholds(x, y, orders) for orders in (separate, shared)])
        yield Beyond(common, *(100 * np.concatenate(hits, axis=1).mean(1)))


def render_shuffles(tables: int = TABLES) -> str:
    """Return the section on shuffled cells in Markdown."""
    lines = "\n".join(
        f"| {100 * row.common:.0f} | {row.separate:.1f} | {row.shared:.1f} |"
        for row in iter_beyond(tables)
    )
    return f"""\
## Shuffles of the study's cells

The report marks mean correlations above a threshold: the {PERCENT} % quantile, over {SHUFFLES}
shuffles of the cells, of the largest value in the table. Here no distance is related to any change:
{tables:,} tables, seed {SEED}, of {CLASSES} classes, {LAYERS} layers and {CELLS} cells, with two
distances and two changes drawn from normal distributions. A share of their variance is common to
all groups, that is, classes and layers. At most {100 - PERCENT} % of the tables should have a mean
correlation above the threshold. This holds for the report's shuffles, which are the same in all
groups, but not if shuffles are drawn for each group. The standard error is 0.3 at 5 %, and 0.7 at
most.

| common variance, % | above, shuffles for each group, % | above, shared shuffles, % |
|---|---|---|
{lines}
"""


def render_page(
    studies: int = STUDIES, pairs: int = significance.PAIRS, tables: int = TABLES
) -> str:
    """Return the page in Markdown, from numbers of studies, pairs of representations and tables."""
    expected = compute_truth()
    lines = "\n".join(
        f"| {row.name} | {100 * row.share:.1f} | {100 * row.error:.1f} | "
        f"{'' if row.width is None else f'{row.width:.3f}'} |"
        for row in compute_rows(studies, expected)
    )
    return f"""\
# How often the intervals contain the truth

Results from simulations with a known truth: of [studies](#the-study), of the
[shuffles](#shuffles-of-the-studys-cells) of their cells, and of
[intervals](#intervals-of-similarities) and [tests](#tests-of-similarities) of similarities. To
regenerate the page, in about 15 minutes on two cores (estimated):

```
.venv/bin/python -m bench coverage
```

## The study

{studies:,} studies of {CLASSES} classes, {LAYERS} layers and {CELLS} cells, seed {SEED}, fixed in
advance. In each study, a function change F is drawn per cell from a normal distribution, together
with two metrics that correlate with it; the metrics share half of their remaining variance. For
class c, layer l and metric m the latent correlation is tanh z, with

z = {MEAN} + layer l (a ramp from -{RAMP} to {RAMP}) + class c (sd {CLASS}) +
metric m of class c (sd {METRIC}) + class c, layer l (sd {NOISE}).

The layers are the same in every study, because a network's layers are fixed; the interval
generalises to other classes. {100 * MISSING:.0f} % of the groups, chosen at random, have no
correlation. The code of `experiments` computes Spearman's correlations, intervals and tests.

* **truth**: the mean correlation of {_TRUTH:,} studies with seed {SEED + 1}: {expected:.4f}.
* **coverage**: the share of studies whose 95 % interval contains it. The jackknife-t should reach
  93 to 97 %. The difference is that of the metrics' z; its truth is 0. The bootstrap's percentile
  intervals are too narrow for {CLASSES} classes, and are shown for comparison.
* **size**, **power**: the share of studies in which the paired permutation test has p < 0.05 if the
  metrics differ only by chance (size), and if the z of one is {EFFECT} larger (power). The p of an
  exact test of {CLASSES} classes has steps of 2/{2**CLASSES:,}.
* **standard error**: the uncertainty of the simulation.

| | share, % | standard error, % | mean width |
|---|---|---|---|
{lines}

{render_shuffles(tables)}
{significance.render_section(pairs)}"""
