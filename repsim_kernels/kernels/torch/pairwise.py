"""All pairs of two lists of representations; each Gram and each spectrum is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import (
    cca,
    cka,
    features,
    gram,
    panels,
    predictivity,
    procrustes,
    rsa,
)
from repsim_kernels.kernels.torch.representation import Representation


def pairwise(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    *,
    metrics: dict[str, dict[str, Any]],
    precision: str = "float64",
) -> dict[str, Any]:
    """Return metrics of all pairs, from names and options; ``precision`` is that of CKA."""
    left = [Representation(x) for x in xs]
    right = left if ys is None else [Representation(y) for y in ys]
    # CKA takes the Grams that other metrics need too. RSA makes its own; and with fewer neurons
    # than stimuli, products of features are cheaper.
    with_grams = metrics.keys() - {"rsa"}
    shares_grams = len(with_grams) > 1 and all(r.p >= r.n for r in [*left, *right])
    values: dict[str, Any] = {}
    for name, options in metrics.items():
        if name in ("cka", "cka_debiased"):
            cka_options: dict[str, Any] = {"debiased": True, "precision": precision} | options
            sides = xs, ys
            if shares_grams and options["kernel"] == "linear":
                cka_options["kernel"] = "precomputed"
                sides = [r.gram for r in left], ys and [r.gram for r in right]
            values[name] = _cka(*sides, **cka_options)
        elif name == "rsa":
            values[name] = _rsa(xs, ys, **options)
        elif name == "linear_predictivity":
            values[name] = predictivity.all_pairs(left, right, **options)
        else:
            values[name] = _compare(left, right, *_COMPARE[name], options)
    return values


def _rsa(xs: list[Tensor], ys: list[Tensor] | None, **options: str) -> Tensor:
    u = rsa.all_dissimilarities(xs, **options)
    v = u if ys is None else rsa.all_dissimilarities(ys, **options)
    return panels.multiply(u, v).clamp(-1, 1)


def _compare(
    left: list[Representation],
    right: list[Representation],
    function: Callable[..., Tensor],
    symmetric: bool,
    options: dict[str, Any],
) -> Tensor:
    """Return a metric of representations for all pairs; of equal lists only half if symmetric."""
    half = symmetric and left is right
    out = torch.empty(len(left), len(right), dtype=torch.float64, device=left[0].x.device)
    for i, a in enumerate(left):
        columns = range(i if half else 0, len(right))
        for js in _iter_stackable(columns, right):
            out[i, js] = function(a, _Stack([right[j] for j in js]), **options)
        if half:
            out[i:, i] = out[i, i:].clone()
    return out


def _iter_stackable(indices: range, rs: list[Representation]) -> Iterator[list[int]]:
    """Split indices into batches of representations whose spectra have the same shape."""
    by_rank: dict[int, list[int]] = {}
    for j in indices:
        by_rank.setdefault(min(rs[j].n, rs[j].p), []).append(j)
    for js in by_rank.values():
        yield from gram.iter_batches(js, rs[js[0]].factor)


class _Stack(Representation):
    """Several representations as a batch, for the second argument of a metric.

    ``x`` is that of the first; metrics read only its sizes.
    """

    def __init__(self, members: list[Representation]) -> None:
        super().__init__(members[0].x)
        self._members = members

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        vectors, values = zip(*(r.spectrum for r in self._members), strict=True)
        return torch.stack(vectors), torch.stack(values)

    @cached_property
    def factor(self) -> Tensor:
        return torch.stack([r.factor for r in self._members])


_COMPARE: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "cca": (cca.mean_cca, True),
    "svcca": (cca.mean_svcca, True),
    "pwcca": (cca.weighted_cca, False),
    "procrustes": (procrustes.similarity, True),
    "procrustes_distance": (procrustes.distance, True),
}


# HSIC₁ whose squares, and sums of these, fit float64.
_RANGE = 1e-140, 1e140


def _cka(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    precision: str,
    chance: bool = False,
) -> Tensor | dict[str, Tensor]:
    dtype = cka.product_dtype([*xs, *(ys or [])], kernel, precision)
    xy, (xx, yy), (trace_x, trace_y), _ = _compare_kernels(xs, ys, debiased, kernel, sigma, dtype)
    chances = np.outer(trace_x, trace_y) / (len(xs[0]) - 1) if chance else None
    return cka.finish(xy, xx[:, None], yy, chances, xs[0].device)


_Sides = tuple[np.ndarray, np.ndarray]


def _compare_kernels(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    dtype: torch.dtype,
) -> tuple[np.ndarray, _Sides, _Sides, float]:
    """Return inner products (L, M), squared norms and traces of both sides' kernel matrices.

    The products and norms are those of the matrices divided by the number that comes last, and the
    traces those divided by its root.
    """
    both = [*xs, *(ys or [])]
    comparison = None
    if kernel == "linear" and features.are_cheaper(both, len(xs) * len(ys or xs)):
        comparison = features.compare(both, debiased, dtype)
    if comparison is not None:
        products, traces = comparison
        left, right = slice(len(xs)), slice(len(xs) if ys else 0, None)
        xy = (np.triu(products) + np.triu(products, 1).T)[left, right]
        norms = products.diagonal()
        return xy, (norms[left], norms[right]), (traces[left], traces[right]), 1.0
    sides = [xs] if ys is None else [xs, ys]
    kernels = [cka.kernel_vectors(side, debiased, kernel, sigma, dtype) for side in sides]
    (h, xx, trace_x), (k, yy, trace_y) = kernels[0], kernels[-1]
    return panels.multiply(h, k).cpu().numpy(), (xx, yy), (trace_x, trace_y), 2.0


def hsic(
    xs: list[Tensor], ys: list[Tensor] | None, *, precision: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return HSIC₁ of every x (n, p_i) with every y (n, q_j), (L, M), and of each with itself.

    Bounds of the rounding errors of the latter, (L,) and (M,), come last; an HSIC₁ that does not
    exceed its bound is zero. NaN for representations with values that are not finite, or whose
    HSIC₁ has no square in float64.
    Source: Song et al. 2012.
    """
    n, dtype = len(xs[0]), cka.product_dtype([*xs, *(ys or [])], "linear", precision)
    xy, norms, traces, factor = _compare_kernels(xs, ys, True, "linear", None, dtype)
    scale = factor / (n * (n - 3))
    floors = [cka.rounding_floor_of_trace(trace, n) * scale for trace in traces]
    xx, yy = (_clear(a * scale, floor) for a, floor in zip(norms, floors, strict=True))
    product = xx[:, None] * yy  # zero or NaN where either is
    return np.where(product > 0, xy * scale, product), xx, yy, *floors


def _clear(squares: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Replace squared norms that are only rounding by 0, and those out of range by NaN."""
    squares = np.where(np.isnan(squares) & np.isfinite(floors), 0.0, squares)
    low, high = _RANGE
    return np.where((squares == 0) | ((low < squares) & (squares < high)), squares, np.nan)
