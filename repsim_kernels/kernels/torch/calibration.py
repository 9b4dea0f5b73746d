"""Similarities under permutations of the stimuli, from what is made once for each representation.

Permuting the stimuli of y permutes the rows and columns of its kernel matrix together, and leaves
the norm unchanged.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import (
    cca,
    cka,
    distances,
    gram,
    memory,
    neighbours,
    pair_matrices,
    panels,
    permutation_moments,
)
from repsim_kernels.kernels.torch.nearest import Find
from repsim_kernels.kernels.torch.representation import Representation, from_complement

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`permuted_products`, of this or another backend."""

# Entries of a block of the lower triangle, and the most permutations that are gathered together:
# the fastest for 1 to 32 layers of 50 to 1,024 stimuli. What is gathered stays in the cache.
_ENTRIES, _PERMUTATIONS = 2**13, 32


def calibrate(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    *,
    metric: str,
    options: dict[str, Any],
    indices: np.ndarray,
    multiply: Multiply | None = None,
    find: Find | None = None,
    precision: str = "float64",
) -> tuple[Tensor, Tensor]:
    """Return metric(x, y) for all pairs (L, M), and metric(x, y[indices[a]]), (K, L, M).

    ``multiply`` replaces `permuted_products`, and ``find`` `nearest.find_candidates`; ``precision``
    is that of CKA.
    """
    if metric in ("cka", "cka_debiased"):
        options = {"debiased": True, "precision": precision} | options
    if metric in neighbours.METRICS:
        own: dict[str, Any] = {"metric": metric, "find": find}
    elif metric == "procrustes":
        own = {}
    else:
        own = {"multiply": multiply}
    same = np.arange(indices.shape[1])[None]
    with_same = torch.from_numpy(np.concatenate([same, indices])).to(xs[0].device)
    values = _VALUES[metric](xs, ys, with_same, **own, **options)
    observed, null = values[0], values[1:]
    if metric not in neighbours.METRICS:  # these count equal stimuli in the order of their indices
        _copy_unchanged(observed, null, xs, ys, indices)
    return observed, null


def calibrate_by_moments(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    *,
    metric: str,
    options: dict[str, Any],
    alpha: float,
    multiply: Multiply | None = None,
    precision: str = "float64",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return CKA of all pairs (L, M), and the p-values, thresholds and moments of its null.

    The p-values and thresholds are those of the Pearson III distribution with the mean, variance
    and skewness (3, L, M) over all permutations of the stimuli.
    """
    n = len(xs[0])
    own: dict[str, Any] = {"debiased": True, "precision": precision} | options
    make = _choose_kernels(xs, ys, **own)
    sides: list[list[Tensor]] = []

    def make_and_record(side: list[Tensor]) -> Iterator[Tensor]:
        sides.append([])
        for g in make(side):
            sides[-1].append(permutation_moments.compute_invariants(g))
            yield g

    same = torch.arange(n, device=xs[0].device)[None]
    observed = _multiply_all(make_and_record, xs, ys, same, multiply)[0]
    left, right = (torch.stack(side) for side in (sides[0], sides[-1]))
    if len(left) != len(xs):  # the sides were exchanged
        left, right = right, left
    moments = permutation_moments.compute_moments(left, right, n)
    observed = observed.clamp(-1, 1)
    return (
        observed,
        permutation_moments.compute_p_value(observed, moments),
        permutation_moments.compute_threshold(observed, alpha, moments),
        torch.stack(list(moments)),
    )


def permuted_products(h: Tensor, k: Tensor, indices: Tensor) -> Tensor:
    """Return the inner products of matrices with permuted ones, (K, L, M) float64.

    Parameters
    ----------
    h : tensor, (L, n(n + 1)/2)
        The lower triangles of symmetric matrices, row by row, with doubled entries below the
        diagonal.
    k : tensor, (n², M)
        Symmetric matrices, of which entry (i, j) is in row i n + j.
    indices : tensor, (K, n), int64
        ``result[a, l, m]`` is the inner product of matrix l with matrix m whose rows and columns
        are those at ``indices[a]``.
    """
    (count, n), m = indices.shape, k.shape[1]
    out = torch.zeros(len(h), count, m, dtype=torch.float64, device=h.device)
    runs = [*_split_triangle(n)]
    size = max(_count_entries(run.stop) - _count_entries(run.start) for run in runs)
    together = min(count, _PERMUTATIONS, max(1, memory.BLOCK // (size * m)))
    buffer = memory.empty_buffer(k, size * together * m)
    places = indices.mT.contiguous()
    for run in runs:
        entries = slice(_count_entries(run.start), _count_entries(run.stop))
        lengths = torch.arange(run.start + 1, run.stop + 1, device=h.device)
        i = torch.arange(run.start, run.stop, device=h.device).repeat_interleave(lengths)
        j = torch.arange(entries.start, entries.stop, device=h.device) - i * (i + 1) // 2
        for batch in panels.split(count, together):
            place = places[:, batch]
            source = torch.add(place[j], place[i], alpha=n).view(-1)
            permuted = buffer[: len(source) * m].view(-1, m)
            torch.index_select(k, 0, source, out=permuted)
            product = h[:, entries] @ permuted.view(len(i), -1)
            out[:, batch] += product.view(len(h), -1, m)
    return out.transpose(0, 1).contiguous()


def _count_entries(i: int) -> int:
    """Return the number of entries in the first i rows of a lower triangle."""
    return i * (i + 1) // 2


def _split_triangle(n: int) -> Iterator[slice]:
    """Split the rows of a lower triangle into runs of at most `_ENTRIES` entries, or one row."""
    start = 0
    while start < n:
        # The largest stop with stop (stop + 1) / 2 at most the limit.
        limit = _count_entries(start) + _ENTRIES
        stop = min(n, max(start + 1, (math.isqrt(8 * limit + 1) - 1) // 2))
        yield slice(start, stop)
        start = stop


def _multiply_all(
    make: Callable[[list[Any]], Iterator[Tensor]],
    xs: list[Any],
    ys: list[Any] | None,
    indices: Tensor,
    multiply: Multiply | None,
) -> Tensor:
    """Return the inner products of the matrices of all xs with permuted ones of all ys, (K, L, M).

    ``make`` yields a symmetric matrix (n, n) for each representation; ys default to xs.
    """
    if ys is not None and len(ys) > len(xs):  # gather for the side with fewer matrices
        return _multiply_all(make, ys, xs, indices.argsort(1), multiply).mT
    n, m, device = indices.shape[1], len(xs if ys is None else ys), indices.device
    like = torch.empty(0, dtype=torch.float64, device=device)
    shapes = (len(xs), _count_entries(n)), (n * n, m)
    h, k = (memory.empty_buffer(like, *shape) for shape in shapes)
    lower = torch.ones(n, n, dtype=torch.bool, device=device).tril_().view(-1).nonzero()[:, 0]
    diagonal = torch.arange(1, n + 1, device=device).cumsum(0) - 1
    for i, g in enumerate(make(xs)):
        torch.index_select(g.view(-1), 0, lower, out=h[i])
        h[i].mul_(2)[diagonal] /= 2
        if ys is None:
            k[:, i] = g.view(-1)
    for j, g in enumerate(() if ys is None else make(ys)):
        k[:, j] = g.view(-1)
    return (multiply or permuted_products)(h, k, indices)


def _from_kernels(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    indices: Tensor,
    multiply: Multiply | None,
    **options: Any,
) -> Tensor:
    make = _choose_kernels(xs, ys, **options)
    return _multiply_all(make, xs, ys, indices, multiply).clamp_(-1, 1)


def _choose_kernels(
    xs: list[Tensor], ys: list[Tensor] | None, kernel: str, precision: str, **options: Any
) -> Callable[[list[Tensor]], Iterator[Tensor]]:
    """Return a function that yields the centred kernel matrices of representations."""
    dtype = cka.product_dtype([*xs, *(ys or ())], kernel, precision)
    return functools.partial(pair_matrices.iter_kernels, kernel=kernel, dtype=dtype, **options)


def _from_distances(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    indices: Tensor,
    multiply: Multiply | None,
    **options: Any,
) -> Tensor:
    make = functools.partial(pair_matrices.iter_distances, **options)
    return _multiply_all(make, xs, ys, indices, multiply).clamp_(-1, 1)


def _from_projections(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    indices: Tensor,
    multiply: Multiply | None,
    squared: bool,
    ridge: float,
    penalty: float,
) -> Tensor:
    """Return mean squared CCA, for which only inner products of two projections are needed.

    Σρ² = ‖Uᵀ V‖² = ⟨U Uᵀ, V Vᵀ⟩, U and V the canonical bases, shrunk by the ridge.
    """
    assert squared
    left = [Representation(x) for x in xs]
    right = None if ys is None else [Representation(y) for y in ys]

    def make(rs: list[Representation]) -> Iterator[Tensor]:
        for r in rs:
            u = from_complement(r.spectrum[0] * cca.shrink(r, ridge, penalty))
            yield u @ u.mT

    def count(rs: list[Representation]) -> Tensor:
        if ridge or penalty:
            return indices.new_tensor([min(r.n - 1, r.p) for r in rs])
        return torch.stack([r.rank for r in rs])

    total = _multiply_all(make, left, right, indices, multiply)
    sizes = torch.minimum(count(left)[:, None], count(left if right is None else right))
    return total.div_(sizes).clamp_(0, 1)


def _from_factors(xs: list[Tensor], ys: list[Tensor] | None, indices: Tensor) -> Tensor:
    """Return the Procrustes similarity: one product and one nuclear norm for each."""
    left = [_make_unit_factor(x) for x in xs]
    right = left if ys is None else [_make_unit_factor(y) for y in ys]
    shape = len(indices), len(left), len(right)
    out = torch.empty(shape, dtype=torch.float64, device=indices.device)
    for (i, a), (j, b) in itertools.product(enumerate(left), enumerate(right)):
        largest = max(a, b, key=torch.numel)  # the product is no larger
        for batch in gram.iter_batches([*range(len(indices))], largest):
            out[batch, i, j] = torch.linalg.svdvals(a.mT @ b[indices[batch]]).sum(-1)
    return out.clamp_(max=1)


def _make_unit_factor(x: Tensor) -> Tensor:
    """Return T (n, r) with the Gram T Tᵀ, scaled to norm 1."""
    factor = Representation(x).factor
    return from_complement(factor / torch.linalg.matrix_norm(factor))


def _from_neighbours(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    indices: Tensor,
    find: Find | None,
    metric: str,
    k: int,
    distance: str = "cosine",
) -> Tensor:
    left, right = (
        [neighbours.find_neighbours(x, k, distance, metric == "cknna", find, True) for x in side]
        for side in (xs, ys or ())
    )
    return neighbours.compare_permuted(left, left if ys is None else right, indices, metric)


_VALUES: dict[str, Callable[..., Tensor]] = {
    "cka": _from_kernels,
    "cka_debiased": _from_kernels,
    "rsa": _from_distances,
    "cca": _from_projections,
    "procrustes": _from_factors,
    **dict.fromkeys(neighbours.METRICS, _from_neighbours),
}
"""How each metric is computed for all permutations."""


def _copy_unchanged(
    observed: Tensor,
    null: Tensor,
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None,
    indices: np.ndarray,
) -> None:
    """Copy the observed values to the null where a permutation exchanges only equal stimuli.

    Both are then of the same pairs of stimuli, and must not differ by rounding.
    """
    n, left = indices.shape[1], _group_layers(xs)
    right = left if ys is None else _group_layers(ys)
    for (a, rows), (b, columns) in itertools.product(left, right):
        if len(np.unique(a)) == len(np.unique(b)) == n:
            continue
        pairs = np.sort(a * n + b[indices], axis=1)
        unchanged = np.flatnonzero((pairs == np.sort(a * n + b)).all(1))
        block = np.array(rows)[:, None], np.array(columns)
        null[unchanged[:, None, None], *block] = observed[block]


def _group_layers(xs: Sequence[Tensor]) -> list[tuple[np.ndarray, list[int]]]:
    """Return which stimuli are equal, as labels (n,), and the representations that share them."""
    groups: dict[bytes, tuple[np.ndarray, list[int]]] = {}
    for i, x in enumerate(xs):
        try:
            distances.check_distinct(x)
            labels = np.arange(len(x))
        except distances.EqualRows as equal:
            labels = equal.args[1].cpu().numpy()
        groups.setdefault(labels.tobytes(), (labels, []))[1].append(i)
    return list(groups.values())
