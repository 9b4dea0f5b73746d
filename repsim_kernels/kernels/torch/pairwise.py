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
    neighbours,
    panels,
    predictivity,
    procrustes,
    rsa,
)
from repsim_kernels.kernels.torch.nearest import Find
from repsim_kernels.kernels.torch.representation import Representation


def pairwise(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    *,
    metrics: dict[str, dict[str, Any]],
    precision: str = "float64",
    find: Find | None = None,
) -> dict[str, Any]:
    """Return metrics of all pairs, from names and options; ``precision`` is that of CKA.

    ``find`` replaces `nearest.find_candidates`.
    """
    left = [Representation(x) for x in xs]
    right = left if ys is None else [Representation(y) for y in ys]
    of_neighbours = {name: own for name, own in metrics.items() if name in neighbours.METRICS}
    # CKA takes the Grams that other metrics need too; RSA and metrics of neighbours need none. With
    # fewer neurons than stimuli, products of features are cheaper.
    with_grams = metrics.keys() - {"rsa", *of_neighbours}
    shares_grams = len(with_grams) > 1 and all(r.p >= r.n for r in [*left, *right])
    overlaps = neighbours.all_pairs(xs, ys, of_neighbours, find)
    values: dict[str, Any] = {}
    for name, options in metrics.items():
        if name in overlaps:
            values[name] = overlaps[name]
        elif name in ("cka", "cka_debiased"):
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


def _cka(
    xs: list[Tensor],
    ys: list[Tensor] | None,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    precision: str,
    chance: bool = False,
) -> Tensor | dict[str, Tensor]:
    both = [*xs, *(ys or [])]
    n, dtype = len(xs[0]), cka.product_dtype(both, kernel, precision)
    comparison = None
    if kernel == "linear" and features.are_cheaper(both, len(xs) * len(ys or xs)):
        comparison = features.compare(both, debiased, dtype)
    if comparison is not None:
        products, traces = comparison
        left, right = slice(len(xs)), slice(len(xs) if ys else 0, None)
        xy = (np.triu(products) + np.triu(products, 1).T)[left, right]
        (xx, yy), (trace_x, trace_y) = ((a[left], a[right]) for a in (products.diagonal(), traces))
    else:
        sides = [xs] if ys is None else [xs, ys]
        kernels = [cka.kernel_vectors(side, debiased, kernel, sigma, dtype) for side in sides]
        (h, xx, trace_x), (k, yy, trace_y) = kernels[0], kernels[-1]
        xy = panels.multiply(h, k).cpu().numpy()
    chances = np.outer(trace_x, trace_y) / (n - 1) if chance else None
    return cka.finish(xy, xx[:, None], yy, chances, xs[0].device)
