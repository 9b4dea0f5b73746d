"""Centred kernel alignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import distances, gram, panels

_EPS = torch.finfo(torch.float64).eps
_LOST = 1e-4  # share of a product over features that U-centring leaves, at least


def cka(
    x: Tensor,
    y: Tensor,
    *,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    chance: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The similarity and, for ``chance``, what it is on average when stimuli are permuted."""
    features = kernel == "linear" and on_features([x.shape[-1]], [y.shape[-1]], x.shape[-2])
    if features:
        runs = gram.centre_all([x, y], for_products=not debiased)
        a, b = (c for run in runs for c in run)
        xy = feature_product(a, b, debiased)
        xx, yy = (norm for run in runs for norm in feature_norm(run, debiased))
        traces = [feature_trace(c) for c in (a, b)] if chance else []
        features = not debiased or not bool((xx.isnan() | yy.isnan()).any())
    if not features:
        alike = [[x, y]] if x.shape[:-2] == y.shape[:-2] else [[x], [y]]
        (h, floor_x), (k, floor_y) = (
            (panels.select(found, i), floor)
            for found, floors in (packed_kernels(xs, debiased, kernel, sigma) for xs in alike)
            for i, floor in enumerate(floors)
        )
        xy, xx, yy = (panels.inner(u, v) for u, v in ((h, k), (h, h), (k, k)))
        xx, yy = nan_if_not_above(xx, floor_x), nan_if_not_above(yy, floor_y)
        # Diagonals are scaled by √½, as xx and yy are by ½.
        traces = [panels.diagonal(half).sum(-1) for half in (h, k)] if chance else []
    value = cosine(xy, xx, yy)
    if not chance:
        return value
    shares = (trace / norm.sqrt() for trace, norm in zip(traces, (xx, yy), strict=True))
    return {"similarity": value, "chance": math.prod(shares) / (x.shape[-2] - 1)}


def cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / √(xx yy) without overflow or underflow: at most 1, and exactly 1 for equal numbers."""
    return (xy.sign() * ((xy / xx) * (xy / yy)).sqrt()).clamp(-1, 1)


def on_features(p: list[int], q: list[int], n: int) -> bool:
    """Whether products over features cost less than Gram matrices, for all pairs of p and q.

    Operations by n: Σ p_i q_j and half of the squares of each side, against n Σ p_i / 2 for the
    Grams and n for the product of each pair.
    """
    features = sum(p) * sum(q) + (sum(k * k for k in p) + sum(k * k for k in q)) / 2
    return features < n * (sum(p) + sum(q)) / 2 + n * len(p) * len(q)


def feature_product(a: Tensor, b: Tensor, debiased: bool) -> Tensor:
    """⟨K, L⟩ of the Grams of centred features a (…, n, p) and b (…, n, q), without the Grams.

    Debiased, it is that of the U-centred Grams, n(n - 3) HSIC₁; the rows of the Grams sum to zero.
    """
    product = panels.product(a.mT, b.mT).square().sum((-2, -1))
    return product - _u_centring(a, b) if debiased else product


def feature_norm(a: Tensor, debiased: bool) -> Tensor:
    """`feature_product` of a (…, n, p) with itself.

    NaN where U-centring takes nearly all of it, as with one far stimulus: Grams keep more digits.
    """
    half = panels.empty_panels(a, a.shape[-1], *a.shape[:-2])
    panels.add_product(half, a.mT, first=True)
    panels.scale_for_inner(half)
    product = 2 * panels.inner(half, half)
    if not debiased:
        return product
    return nan_if_not_above(product - _u_centring(a, a), _LOST * product)


def feature_trace(a: Tensor) -> Tensor:
    """The trace of the Gram of centred features a (…, n, p)."""
    return squared_norm(a.flatten(-2))


def _u_centring(a: Tensor, b: Tensor) -> Tensor:
    """What U-centring takes from the inner product of two Grams."""
    n = a.shape[-2]
    d, e = squared_norm(a), squared_norm(b)
    return (d * e).sum(-1) * n / (n - 2) - d.sum(-1) * e.sum(-1) / ((n - 1) * (n - 2))


def packed_kernels(
    xs: list[Tensor], debiased: bool, kernel: str, sigma: float | None
) -> tuple[panels.Panels, Tensor]:
    """Of the kernel matrices of xs, each (…, n, p), halves whose cosines are CKA: (L, …, n, n).

    And floors (L, …): an inner product with itself that is not beyond it is mere rounding.
    """
    batch, n = xs[0].shape[:-2], xs[0].shape[-2]
    found = panels.empty_panels(xs[0], n, len(xs), *batch)
    floors = xs[0].new_zeros(len(xs), *batch, dtype=torch.float64)
    room = panels.block_buffer(xs) if kernel == "linear" else None
    for run in panels.shape_runs_per_core(xs):
        half = panels.select(found, run)
        if room is not None:
            gram.gram_into(half, xs[run], room)
        else:
            assert sigma is not None
            k = torch.stack([gram.double_centre(distances.rbf(x, sigma)) for x in xs[run]])
            for own, panel in half:
                panel.copy_(k[..., own.start :, own])
        if debiased:
            floors[run] = _rounding(gram.u_centre(half, out=half), n) / 2
        panels.scale_for_inner(half)
    return found, floors


def squared_norm(v: Tensor) -> Tensor:
    """Of each vector v (…, m), without a temporary of their size."""
    return torch.linalg.vector_norm(v, dim=-1).square()


def rounding(k: Tensor) -> Tensor:
    """What rounding may leave of ‖U-centred K‖² where all stimuli are equally far apart.

    There the n - 1 eigenvalues are equal, and (tr K)² / (n - 1) is ‖K‖², which else is more.
    """
    return _rounding(k.diagonal(dim1=-2, dim2=-1).sum(-1), k.shape[-1])


def _rounding(trace: Tensor, n: int) -> Tensor:
    return (n * _EPS * trace).square() / (n - 1)


def nan_if_not_above(value: Tensor, floor: Tensor) -> Tensor:
    """NaN where a value is mere rounding: nothing is left to compare."""
    return torch.where(value > floor, value, torch.nan)


def cosine_distance(m: Tensor, whole: Tensor, complement: bool, floor: Tensor) -> Tensor:
    """1 - CKA of the kernel matrices `whole` and `whole` less a part, without cancellation.

    Matrices are vectors here, from `gram.to_vectors`. m (C, k) holds either the parts or, with
    `complement`, what remains of the whole (k,) without each: pass the smaller of the two, so that
    its component orthogonal to the whole keeps its digits. The distance is exactly 0 for m = 0, and
    NaN where the squared norm of the remainder is not above `floor`.
    Source: METRICS, "CKA without cancellation".
    """
    ll = whole @ whole
    gamma = m @ whole / ll
    left = gamma if complement else 1 - gamma
    rr = squared_norm(torch.addr(m, gamma, whole, alpha=-1))
    kk = nan_if_not_above(left.square() * ll + rr, floor)
    return (rr / kk) / (1 + left * torch.sqrt(ll / kk))
