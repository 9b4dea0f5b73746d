"""Sections of COVERAGE.md: how often `interval` contains the truth and `calibrate` rejects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import repsim_kernels as rk

SEED = 20261130
PAIRS = 1_000
STIMULI = {50: 1.0, 200: 1.0, 1_000: 0.5}  # and the share of PAIRS that they have
TRUTHS = 0.0, 0.3, 0.9
NEURONS = 20
SPECTRA = {"equal": np.ones(NEURONS), "decaying": 1 / np.arange(1, NEURONS + 1)}
LEVEL = 0.95
PERMUTATIONS = 199
TEST_STIMULI = 20, 50, 100
ALPHAS = 0.05, 0.01
METRICS = {"cka_debiased": "debiased CKA", "cka": "CKA"}
NULLS = "permutations", "moments", "normal"


class Coverage(NamedTuple):
    """How often intervals contain the truth, in percent, and their mean width, by spectrum."""

    n: int
    truth: float
    pairs: int
    shares: list[float]
    widths: list[float]


def draw_pair(
    rng: np.random.Generator, n: int, truth: float, spectrum: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two representations of n stimuli from a population with a known CKA.

    Σ_xx = Σ_yy = Λ is diagonal and Σ_xy = √truth Λ: the population's CKA, which is
    ‖Σ_xy‖² / (‖Σ_xx‖ ‖Σ_yy‖), is the truth.
    """
    x, noise = rng.standard_normal((2, n, len(spectrum))) * np.sqrt(spectrum)
    return x, math.sqrt(truth) * x + math.sqrt(1 - truth) * noise


def iter_coverages(pairs: int) -> Iterator[Coverage]:
    """Yield the coverage of the intervals of debiased CKA for each number of stimuli and truth."""
    for n, part in STIMULI.items():
        rng = np.random.default_rng((SEED, n))
        for truth in TRUTHS:
            count = max(1, round(pairs * part))
            shares, widths = [], []
            for spectrum in SPECTRA.values():
                draws = (draw_pair(rng, n, truth, spectrum) for _ in range(count))
                results = [rk.interval(x, y, level=LEVEL) for x, y in draws]
                shares.append(100 * float(np.mean([r.low <= truth <= r.high for r in results])))
                widths.append(float(np.mean([r.high - r.low for r in results])))
            yield Coverage(n, truth, count, shares, widths)


def compute_p_values(x: np.ndarray, y: np.ndarray, metric: str) -> list[float]:
    """Return the p-values of two representations by each of the `NULLS`."""
    drawn = rk.calibrate(x, y, metric=metric, permutations=PERMUTATIONS)
    moments = rk.calibrate(x, y, metric=metric, null="moments")
    mean, variance, _ = moments.null
    z = (moments.score - mean) / math.sqrt(variance)
    return [float(drawn.p_value), float(moments.p_value), math.erfc(z / math.sqrt(2)) / 2]


def compute_sizes(pairs: int) -> dict[int, np.ndarray]:
    """Return how often unrelated pairs are significant, in percent, by the number of stimuli.

    The shares are (metrics, nulls, alphas). Their spectra decay.
    """
    sizes = {}
    for n in TEST_STIMULI:
        rng = np.random.default_rng((SEED, n))
        draws = [draw_pair(rng, n, 0.0, SPECTRA["decaying"]) for _ in range(pairs)]
        p_values = np.array([[compute_p_values(x, y, m) for m in METRICS] for x, y in draws])
        sizes[n] = 100 * (p_values[..., None] <= ALPHAS).mean(0)
    return sizes


def render_section(pairs: int = PAIRS) -> str:
    """Return the sections in Markdown."""
    coverages = "\n".join(
        f"| {row.n:,} | {row.truth:g} | {row.pairs:,} | "
        + " | ".join(f"{s:.1f} | {w:.3f}" for s, w in zip(row.shares, row.widths, strict=True))
        + " |"
        for row in iter_coverages(pairs)
    )
    titles = [f"{label}, {100 * alpha:g} %" for label in METRICS.values() for alpha in ALPHAS]
    sizes = "\n".join(
        f"| {n} | {null} | " + " | ".join(f"{share:.1f}" for share in shares[:, i].flat) + " |"
        for n, shares in compute_sizes(pairs).items()
        for i, null in enumerate(NULLS)
    )
    widths = " | ".join(f"{name}: share, % | mean width" for name in SPECTRA)
    return f"""\
## Intervals of similarities

`interval(x, y)`: 95 % intervals of debiased CKA by the jackknife, with seeds ({SEED}, n). Each
sample has n stimuli of two representations with {NEURONS} neurons, from normal distributions with
the same diagonal covariance Λ and the cross-covariance √c Λ: the population's CKA is c. The
variances of the neurons are equal, or decay as 1/k. The share of samples whose interval contains c
should be 92 to 97 % for c = 0.3 and 0.9; its standard error is 0.7 for 1,000 samples, and 1.0 for
500. At c = 0 the intervals are too wide: whether one contains 0 is not a test.

| n | c | samples | {widths} |
|---|---|---|{"---|" * 2 * len(SPECTRA)}
{coverages}

## Tests of similarities

`calibrate(x, y)`: how often unrelated representations (c = 0, decaying variances) have p ≤ 5 % and
p ≤ 1 %, in {pairs:,} samples with seeds ({SEED}, n); the standard errors are about 0.7 and 0.3. The
nulls are {PERMUTATIONS} random permutations, the Pearson III distribution with the exact first
three moments (`null="moments"`), and the normal distribution with two, which nothing here uses.

| n | null | {" | ".join(titles)} |
|---|---|{"---|" * len(titles)}
{sizes}
"""
