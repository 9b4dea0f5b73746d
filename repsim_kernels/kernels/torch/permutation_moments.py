"""The permutation null of linear CKA in closed form: its moments, and Pearson III's p.

Under a uniform permutation of the stimuli of one side, the expectation of a power of ⟨K, L⟩ is a
sum over the ways in which its indices can coincide. Source: docs/metrics.md, "Permutation moments".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

# Below this skewness the incomplete gamma function is replaced by its asymptotic expansion, whose
# error is a relative 1e-9 z there: PyTorch's series ends too early in the lower tail.
_SMALL_SKEWNESS = 0.01
# How far rounding may move the inner product of two Grams of norm 1.
_ROUNDING = 1e-12
_SERIES_TERMS = 28  # of the logarithm in that expansion, for arguments up to 1/4
# Halvings of the interval that contains a quantile.
_BISECTIONS = 70

Partition = tuple[tuple[int, ...], ...]


class Moments(NamedTuple):
    """Mean, variance and skewness of a null distribution, (L, M) each."""

    mean: Tensor
    variance: Tensor
    skewness: Tensor


def compute_invariants(k: Tensor) -> Tensor:
    """Return what the moments need of Grams k (…, n, n) whose rows sum to zero: (…, 8).

    With k scaled to ‖k‖ = 1 and K = k - tr k / (n - 1) (I - 11ᵀ / n), these are tr k, ‖K‖², Σ Kᵢᵢ²,
    Σ Kᵢᵢ³, Σ Kᵢⱼ³, tr K³, Σ Kᵢᵢ (K²)ᵢᵢ and Σ Kᵢᵢ Kᵢⱼ Kⱼⱼ. This takes n³ multiplications.
    """
    n = k.shape[-1]
    k = k / torch.linalg.matrix_norm(k)[..., None, None]
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    share = (trace / (n - 1))[..., None]
    k += share[..., None] / n
    k.diagonal(dim1=-2, dim2=-1).sub_(share)
    d, squares = k.diagonal(dim1=-2, dim2=-1), k * k
    rows = squares.sum(-1)
    values = (
        trace,
        rows.sum(-1),
        (d**2).sum(-1),
        (d**3).sum(-1),
        (squares * k).sum((-2, -1)),
        ((k @ k) * k).sum((-2, -1)),
        (d * rows).sum(-1),
        (d * (k @ d[..., None])[..., 0]).sum(-1),
    )
    return torch.stack(values, -1)


def compute_moments(left: Tensor, right: Tensor, n: int) -> Moments:
    """Return the moments of ⟨k, l⟩ / (‖k‖ ‖l‖) when the stimuli of l are permuted.

    ``left`` (L, 8) and ``right`` (M, 8) are the `compute_invariants` of Grams of n stimuli: centred
    for linear CKA, U-centred for debiased CKA.
    """
    second, third = (torch.tensor(_compute_coefficients(n, r), dtype=left.dtype) for r in (2, 3))
    second, third = second.to(left.device), third.to(left.device)
    mean = left[:, :1] * right[:, 0] / (n - 1)
    variance = (left[:, 1:3] @ second @ right[:, 1:3].T).clamp_(min=0)
    skewness = left[:, 3:] @ third @ right[:, 3:].T / variance.pow(1.5)
    return Moments(mean, variance, skewness.nan_to_num_(0.0, 0.0, 0.0))


def _find_invariant(partition: Partition, r: int) -> int | None:
    """Return which invariant the unrestricted sum of a partition is; None if the sum is zero.

    Slots 2e and 2e + 1 are the row and column index of factor e; slots in one block are equal. The
    sum is zero if an index occurs once (rows sum to zero), or if a factor is alone (no trace).
    """
    if any(len(block) == 1 for block in partition):
        return None
    place = {slot: b for b, block in enumerate(partition) for slot in block}
    edges = [(place[2 * e], place[2 * e + 1]) for e in range(r)]
    loops = [e for e in edges if e[0] == e[1]]
    if any(len(partition[b]) == 2 for b, _ in loops):
        return None
    if r == 2:
        return 1 if loops else 0
    if len(partition) == 3:
        return 2  # a triangle
    return {0: 1, 1: 3, 2: 4, 3: 0}[len(loops)]


def _iter_partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield every partition of the items into blocks."""
    if not items:
        yield []
        return
    first, *others = items
    for blocks in _iter_partitions(others):
        yield [[first], *blocks]
        for i, block in enumerate(blocks):
            yield [*blocks[:i], [first, *block], *blocks[i + 1 :]]


@functools.cache
def _count_terms(r: int) -> dict[int, list[list[int]]]:
    """Return, by number of blocks, Σ over partitions of 2r slots of m mᵀ.

    m expresses the sum over distinct indices with the pattern of a partition as a combination of
    the invariants (2 for r = 2, 5 for r = 3), by Möbius inversion over the coarser partitions.
    """
    size = {2: 2, 3: 5}[r]
    terms: dict[int, list[list[int]]] = {}
    for blocks in _iter_partitions(range(2 * r)):
        m = [0] * size
        for merged in _iter_partitions(range(len(blocks))):
            coarser = tuple(tuple(slot for b in group for slot in blocks[b]) for group in merged)
            kind = _find_invariant(coarser, r)
            if kind is not None:
                m[kind] += math.prod(
                    (-1) ** (len(group) - 1) * math.factorial(len(group) - 1) for group in merged
                )
        total = terms.setdefault(len(blocks), [[0] * size for _ in range(size)])
        for s in range(size):
            for t in range(size):
                total[s][t] += m[s] * m[t]
    return terms


@functools.cache
def _compute_coefficients(n: int, r: int) -> list[list[float]]:
    """Return the matrix C of E⟨K, L⟩ʳ = xᵀ C y, x and y the invariants of K and L.

    A pattern of b distinct indices has n (n - 1) … (n - b + 1) places, all equally likely.
    """
    terms = _count_terms(r)
    indices = range(len(terms[1]))

    def sum_patterns(s: int, t: int) -> float:
        patterns = (Fraction(m[s][t], math.perm(n, b)) for b, m in terms.items() if b <= n)
        return float(sum(patterns))

    return [[sum_patterns(s, t) for t in indices] for s in indices]


def compute_p_value(observed: Tensor, moments: Moments) -> Tensor:
    """Return the probability (L, M) that the null is at least the observed values, by Pearson III.

    It is 1 where the null has no variance, since every permutation then gives the same value.
    """
    mean, variance, skewness = moments
    tail = compute_pearson_iii_tail((observed - mean) / variance.sqrt(), skewness)
    return torch.where(variance > _ROUNDING**2, tail, 1.0)


def compute_threshold(observed: Tensor, alpha: float, moments: Moments) -> Tensor:
    """Return the values (L, M) that the null exceeds with probability alpha, by Pearson III.

    It is the observed value where the null has no variance.
    """
    mean, variance, skewness = moments
    threshold = mean + variance.sqrt() * find_pearson_iii_quantile(alpha, skewness)
    return torch.where(variance > _ROUNDING**2, threshold, observed)


def compute_pearson_iii_tail(z: Tensor, skewness: Tensor) -> Tensor:
    """Return P(Z >= z) for Pearson III of mean 0, variance 1 and a skewness.

    That is a gamma distribution, mirrored if the skewness is negative. Small probabilities keep
    their relative precision.
    """
    z, skewness = torch.broadcast_tensors(z, skewness)
    is_small, is_mirrored = skewness.abs() < _SMALL_SKEWNESS, skewness < 0
    scale = torch.where(is_small, 1.0, skewness.abs()) / 2
    shape = scale**-2
    x = (shape + torch.where(is_mirrored, -z, z) / scale).clamp(min=0)
    upper, lower = torch.special.gammaincc(shape, x), torch.special.gammainc(shape, x)
    tail = torch.where(is_mirrored, lower, upper)
    return torch.where(is_small, _expand_tail(z, skewness), tail) if is_small.any() else tail


def _expand_tail(z: Tensor, skewness: Tensor) -> Tensor:
    """Return the tail for a small skewness, from the first two terms of Temme's expansion.

    Source: Temme 1979, "The Asymptotic Expansion of the Incomplete Gamma Functions", SIAM Journal
    on Mathematical Analysis 10.
    """
    mu = (z * skewness / 2).clamp(-0.25, 0.25)  # beyond it the tail is 0 or 1
    rest = torch.zeros_like(mu)  # (s² - 1) / mu, where s² = 2 (mu - log(1 + mu)) / mu²
    for k in reversed(range(_SERIES_TERMS)):
        rest = -2 / (k + 3) - mu * rest
    s = (1 + mu * rest).sqrt()
    density = (-((z * s) ** 2) / 2).exp() / math.sqrt(2 * math.pi)
    normal = torch.special.erfc(z * s * math.sqrt(0.5)) / 2
    return normal + density * skewness / 2 * rest / (s * (s + 1))


def find_pearson_iii_quantile(alpha: float, skewness: Tensor) -> Tensor:
    """Return the z with `compute_pearson_iii_tail` alpha, 0 < alpha < 1, for each skewness."""
    # Cantelli's inequality bounds it.
    low = torch.full_like(skewness, -math.sqrt(alpha / (1 - alpha)))
    high = torch.full_like(skewness, math.sqrt((1 - alpha) / alpha))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_low = compute_pearson_iii_tail(middle, skewness) > alpha
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (low + high) / 2
