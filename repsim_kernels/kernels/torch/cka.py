"""Centred kernel alignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import distances, gram, panels

_EPS = torch.finfo(torch.float64).eps
_MIN_SHARE = 1e-4  # least share of a product over features that must remain after U-centring


def cka(
    x: Tensor,
    y: Tensor,
    *,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    chance: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Return the similarity and, for ``chance``, its mean over permutations of the stimuli."""
    by_features = kernel == "linear" and features_are_cheaper(
        [x.shape[-1]], [y.shape[-1]], x.shape[-2]
    )
    if by_features:
        runs = gram.centre_all([x, y], for_products=not debiased)
        a, b = (c for run in runs for c in run)
        xy = feature_product(a, b, debiased)
        xx, yy = (norm for run in runs for norm in feature_norm(run, debiased))
        traces = [feature_trace(c) for c in (a, b)] if chance else []
        by_features = not debiased or not bool((xx.isnan() | yy.isnan()).any())
    if not by_features:
        groups = [[x, y]] if x.shape[:-2] == y.shape[:-2] else [[x], [y]]
        (h, floor_x), (k, floor_y) = (
            (panels.select(kernels, i), floor)
            for kernels, floors in (packed_kernels(xs, debiased, kernel, sigma) for xs in groups)
            for i, floor in enumerate(floors)
        )
        xy, xx, yy = (panels.inner(u, v) for u, v in ((h, k), (h, h), (k, k)))
        xx, yy = nan_if_not_above(xx, floor_x), nan_if_not_above(yy, floor_y)
        # Diagonals are scaled by √½, and xx and yy by ½, so the ratios below are right.
        traces = [panels.diagonal(packed).sum(-1) for packed in (h, k)] if chance else []
    value = cosine(xy, xx, yy)
    if not chance:
        return value
    shares = (trace / norm.sqrt() for trace, norm in zip(traces, (xx, yy), strict=True))
    return {"similarity": value, "chance": math.prod(shares) / (x.shape[-2] - 1)}


def cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Return xy / √(xx yy) without overflow: at most 1, and exactly 1 if all three are equal."""
    return (xy.sign() * ((xy / xx) * (xy / yy)).sqrt()).clamp(-1, 1)


def features_are_cheaper(p: list[int], q: list[int], n: int) -> bool:
    """Return whether products over features cost less than Grams, for all pairs of p and q.

    In operations divided by n: Σ pᵢqⱼ and half of the squares of each side, against n Σ pᵢ / 2 on
    each side for the Grams and n for the inner product of each pair.
    """
    by_features = sum(p) * sum(q) + (sum(k * k for k in p) + sum(k * k for k in q)) / 2
    return by_features < n * (sum(p) + sum(q)) / 2 + n * len(p) * len(q)


def feature_product(a: Tensor, b: Tensor, debiased: bool) -> Tensor:
    """Return ⟨K, L⟩ for the Grams of centred features a (…, n, p) and b (…, n, q).

    The Grams are not formed. ``debiased`` gives the product of the U-centred Grams, n(n - 3) HSIC₁.
    """
    product = panels.multiply(a.mT, b.mT).square().sum((-2, -1))
    return product - _u_centring_term(a, b) if debiased else product


def feature_norm(a: Tensor, debiased: bool) -> Tensor:
    """Return `feature_product` of a (…, n, p) with itself.

    NaN if U-centring cancels nearly all of it, as with one outlying stimulus: the caller then uses
    the Grams, which keep more digits.
    """
    packed = panels.empty_panels(a, a.shape[-1], *a.shape[:-2])
    panels.add_product(packed, a.mT, first=True)
    panels.scale_for_inner(packed)
    product = 2 * panels.inner(packed, packed)
    if not debiased:
        return product
    return nan_if_not_above(product - _u_centring_term(a, a), _MIN_SHARE * product)


def feature_trace(a: Tensor) -> Tensor:
    """Return the trace of the Gram of centred features a (…, n, p)."""
    return squared_norm(a.flatten(-2))


def _u_centring_term(a: Tensor, b: Tensor) -> Tensor:
    """Return what U-centring subtracts from the inner product of two Grams."""
    n = a.shape[-2]
    d, e = squared_norm(a), squared_norm(b)
    return (d * e).sum(-1) * n / (n - 2) - d.sum(-1) * e.sum(-1) / ((n - 1) * (n - 2))


def packed_kernels(
    xs: list[Tensor], debiased: bool, kernel: str, sigma: float | None
) -> tuple[panels.Panels, Tensor]:
    """Return the centred kernel matrices of xs, each (…, n, p), packed: (L, …, n, n).

    They are scaled for `inner`, and their cosines are CKA. Also returns floors (L, …): a squared
    norm that is not above its floor is only rounding error.
    """
    batch, n = xs[0].shape[:-2], xs[0].shape[-2]
    kernels = panels.empty_panels(xs[0], n, len(xs), *batch)
    floors = xs[0].new_zeros(len(xs), *batch, dtype=torch.float64)
    buffer = panels.block_buffer(xs) if kernel == "linear" else None
    for run in panels.shape_runs_per_core(xs):
        packed = panels.select(kernels, run)
        if buffer is not None:
            gram.gram_into(packed, xs[run], buffer)
        else:
            assert sigma is not None
            k = torch.stack([gram.double_centre(distances.rbf_kernel(x, sigma)) for x in xs[run]])
            for columns, panel in packed:
                panel.copy_(k[..., columns.start :, columns])
        if debiased:
            floors[run] = _rounding_floor(gram.u_centre(packed, out=packed), n) / 2
        panels.scale_for_inner(packed)
    return kernels, floors


def squared_norm(v: Tensor) -> Tensor:
    """Return the squared norms of vectors v (…, m), without a temporary of their size."""
    return torch.linalg.vector_norm(v, dim=-1).square()


def rounding_floor(k: Tensor) -> Tensor:
    """Bound the rounding error in ‖U-centred K‖², which is 0 if all stimuli are equally far apart.

    The n - 1 eigenvalues are then equal, and ‖K‖² is (tr K)² / (n - 1), its smallest value.
    """
    return _rounding_floor(k.diagonal(dim1=-2, dim2=-1).sum(-1), k.shape[-1])


def _rounding_floor(trace: Tensor, n: int) -> Tensor:
    return (n * _EPS * trace).square() / (n - 1)


def nan_if_not_above(value: Tensor, floor: Tensor) -> Tensor:
    """Replace values that are only rounding error, and so can't be compared, by NaN."""
    return torch.where(value > floor, value, torch.nan)


def cosine_distance(m: Tensor, whole: Tensor, complement: bool, floor: Tensor) -> Tensor:
    """Return 1 - CKA of a kernel matrix and itself minus a part, without cancellation.

    Matrices are vectors here, from `gram.to_vectors`. m (C, k) holds either the parts or, with
    `complement`, what remains of the whole (k,) without each: pass the smaller of the two, so that
    its component orthogonal to the whole keeps its digits. The distance is exactly 0 for m = 0, and
    NaN where the squared norm of the remainder is not above `floor`.
    Source: docs/metrics.md, "One original, many ablations".
    """
    ll = whole @ whole
    gamma = m @ whole / ll
    projection = gamma if complement else 1 - gamma  # of the remainder on the whole
    rr = squared_norm(torch.addr(m, gamma, whole, alpha=-1))
    kk = nan_if_not_above(projection.square() * ll + rr, floor)
    return (rr / kk) / (1 + projection * torch.sqrt(ll / kk))
