"""The delete-one jackknife of CKA and RSA, all n deletions of a pair in O(n²)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram, memory, pair_matrices

_EPS = torch.finfo(torch.float64).eps
# A squared norm that falls below this share without one stimulus has lost digits in the difference.
_LOST_DIGITS = 1e-6
# Most of the jackknife's variance that the correction removes.
_MAX_CORRECTION = 0.75


class _Form(NamedTuple):
    """How matrices of pairs of n stimuli are centred, and what one stimulus adds to their products.

    Without stimulus i the inner product of two matrices is smaller by c tᵢ - f vᵢ wᵢ, where tᵢ is
    a row sum of their elementwise product, and v and w are the ``vector`` (n,) of each.
    Source: docs/metrics.md, "Intervals".
    """

    centre: Callable[[Tensor], Tensor]
    vector: Callable[[Tensor], Tensor]
    c: float
    f: float


class _Layer(NamedTuple):
    """A matrix of norm 1, its vector, its rows' sums of squares, its squared norm without each."""

    matrix: Tensor
    vector: Tensor
    sums: Tensor
    remaining: Tensor


def interval(
    xs: list[Tensor], ys: list[Tensor], *, metric: str, **options: Any
) -> dict[str, Tensor]:
    """Return similarities, their jackknife variances, and corrections of these: (L, M) each.

    The correction is the variance of pairs of stimuli that the jackknife counts twice, limited to
    three quarters of the variance. NaN where a similarity is not defined.
    """
    form = _choose_form(len(xs[0]), metric, options)
    left, right = (
        [_prepare(m, form) for m in _iter_matrices(side, metric, options)] for side in (xs, ys)
    )
    values = torch.stack([_jackknife(a, b, form) for a in left for b in right])
    names = "estimate", "variance", "correction"
    shape = len(left), len(right)
    return {name: v.reshape(shape) for name, v in zip(names, values.unbind(1), strict=True)}


def _choose_form(n: int, metric: str, options: dict[str, Any]) -> _Form:
    if metric == "rsa" and options["compare"] == "pearson":
        return _Form(_subtract_mean, lambda m: m.sum(1), 2, -4 / ((n - 1) * (n - 2)))
    if metric == "rsa":
        return _Form(lambda m: m, torch.diagonal, 2, 0)
    if options.get("debiased", True):
        return _Form(_u_centre, torch.diagonal, 2 * (n - 2) / (n - 3), 0)
    share = n / (n - 1)
    return _Form(gram.double_centre, torch.diagonal, 2 * share, share**2)


def _iter_matrices(xs: list[Tensor], metric: str, options: dict[str, Any]) -> Iterator[Tensor]:
    """Return an iterator over the centred matrix (n, n) of each x, NaN if the metric has none."""
    if metric == "rsa":
        return pair_matrices.iter_distances(xs, **options)
    return pair_matrices.iter_kernels(xs, **({"debiased": True} | options), dtype=torch.float64)


def _u_centre(k: Tensor) -> Tensor:
    """U-centre a symmetric matrix (n, n): a zero diagonal, and rows that sum to zero."""
    packed = [(slice(0, len(k)), gram.double_centre(k))]
    gram.u_centre(packed, out=packed)
    return packed[0][1]


def _subtract_mean(d: Tensor) -> Tensor:
    """Subtract the mean distance from a matrix of distances (n, n), except from its diagonal."""
    n = len(d)
    d = d - d.sum() / (n * (n - 1))
    d.diagonal().zero_()
    return d


def _prepare(matrix: Tensor, form: _Form) -> _Layer:
    matrix /= torch.linalg.matrix_norm(matrix)
    vector, sums = form.vector(matrix), _multiply_rows(matrix, matrix)
    return _Layer(matrix, vector, sums, sums.sum() - form.c * sums + form.f * (vector * vector))


def _jackknife(a: _Layer, b: _Layer, form: _Form) -> Tensor:
    """Return the similarity of two layers, its jackknife variance, and the correction: (3,)."""
    n = len(a.matrix)
    t = _multiply_rows(a.matrix, b.matrix)
    aa, bb = a.sums.sum(), b.sums.sum()
    r = _compute_cosine(t.sum(), aa, bb)
    without = t.sum() - form.c * t + form.f * (a.vector * b.vector)
    rs = _compute_cosine(without, a.remaining, b.remaining)
    lost = (a.remaining <= _LOST_DIGITS * aa) | (b.remaining <= _LOST_DIGITS * bb)
    for i in lost.nonzero()[:, 0].tolist():
        rs[i] = _compare_without(i, a, b, form)
    variance = (n - 1) / n * (rs - rs.mean()).square().sum()
    # How much each pair of stimuli moves the similarity.
    moves, squares = memory.empty_buffer(a.matrix, 2, n, n)
    torch.mul(a.matrix, b.matrix, out=moves)
    torch.mul(a.matrix, a.matrix, out=squares).addcmul_(b.matrix, b.matrix)
    moves.sub_(squares, alpha=float(r) / 2).diagonal().zero_()
    counted_twice = 2 * torch.dot(moves.flatten(), moves.flatten())
    correction = torch.minimum(counted_twice, _MAX_CORRECTION * variance)
    return torch.stack([r, variance, correction])


def _multiply_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of a (n, m) with that of b: (n,)."""
    return (a[:, None] @ b[:, :, None]).flatten()


def _compute_cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Return xy / √(xx yy): exactly 1 if all three are equal, and without overflow."""
    return (xy.sign() * ((xy / xx) * (xy / yy)).sqrt()).clamp(-1, 1)


def _compare_without(i: int, a: _Layer, b: _Layer, form: _Form) -> Tensor:
    """Return the similarity without stimulus i, NaN if only rounding errors remain of a layer."""
    keep = torch.arange(len(a.matrix), device=a.matrix.device) != i
    k, m = (form.centre(layer.matrix[keep][:, keep]) for layer in (a, b))
    kk, mm = (k * k).sum(), (m * m).sum()
    floor = (len(a.matrix) * _EPS) ** 2
    r = _compute_cosine((k * m).sum(), kk, mm)
    return r.masked_fill((kk <= floor) | (mm <= floor), torch.nan)
