"""All pairs of two lists of representations; each Gram and each spectrum is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import cca, cka, gram, panels, predictivity, procrustes, rsa
from repsim_kernels.kernels.torch.representation import Representation


def pairwise(
    xs: list[Tensor], ys: list[Tensor] | None, *, metric: str, **options: Any
) -> Tensor | dict[str, Tensor]:
    if metric == "rsa":
        u = rsa.all_dissimilarities(xs, **options)
        v = u if ys is None else rsa.all_dissimilarities(ys, **options)
        return panels.multiply(u, v).clamp(-1, 1)
    if metric == "linear_predictivity":
        return predictivity.all_pairs(xs, ys, **options)
    if metric == "cka":
        return _cka(xs, ys, **options)
    left = [Representation(x) for x in xs]
    right = left if ys is None else [Representation(y) for y in ys]
    function, symmetric = _COMPARE[metric]
    out = torch.empty(len(left), len(right), dtype=torch.float64, device=xs[0].device)
    for i, a in enumerate(left):
        columns = range(i if ys is None and symmetric else 0, len(right))
        for js in _iter_stackable(columns, right):
            out[i, js] = function(a, _Stack([right[j] for j in js]), **options)
        if ys is None and symmetric:
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
    chance: bool = False,
) -> Tensor | dict[str, Tensor]:
    n, sides = xs[0].shape[0], [xs] if ys is None else [xs, ys]
    p, q = ([x.shape[1] for x in side] for side in (sides[0], sides[-1]))
    by_features = kernel == "linear" and cka.features_are_cheaper(p, q, n)
    if by_features:
        runs = [gram.centre_all(side, for_products=not debiased) for side in sides]
        norms = [torch.cat([cka.feature_norm(c, debiased) for c in side]) for side in runs]
        by_features = not debiased or not any(bool(norm.isnan().any()) for norm in norms)
    if by_features:
        left, right = ([c for run in side for c in run] for side in (runs[0], runs[-1]))
        xx, yy = norms[0], norms[-1]
        products = xx.new_zeros(len(left), len(right))
        for i, a in enumerate(left):
            for j in range(len(right) if ys is not None else i):
                products[i, j] = cka.feature_product(a, right[j], debiased)
        if ys is None:
            products = products + products.mT + xx.diag()
        traces = [torch.cat([cka.feature_trace(c) for c in side]) for side in runs if chance]
    else:
        kernels = [cka.packed_kernels(side, debiased, kernel, sigma) for side in sides]
        (rows, floor_x), (columns, floor_y) = kernels[0], kernels[-1]
        products = panels.inner_of_all(rows, columns)
        xx = products.diagonal() if ys is None else panels.inner(rows, rows)
        yy = xx if ys is None else panels.inner(columns, columns)
        xx, yy = cka.nan_if_not_above(xx, floor_x), cka.nan_if_not_above(yy, floor_y)
        # Diagonals are scaled by √½, and xx and yy by ½, so the ratios below are right.
        traces = [panels.diagonal(packed).sum(-1) for packed, _ in kernels if chance]
    values = cka.cosine(products, xx[:, None], yy)
    if not chance:
        return values
    shares = traces[0] / xx.sqrt(), traces[-1] / yy.sqrt()
    return {"similarity": values, "chance": torch.outer(*shares) / (n - 1)}
