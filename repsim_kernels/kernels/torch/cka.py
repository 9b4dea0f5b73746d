"""Centred kernel alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram

_EPS = torch.finfo(torch.float64).eps


def cka(x: Tensor, y: Tensor, *, debiased: bool, kernel: str, sigma: float | None) -> Tensor:
    if kernel == "linear" and on_features([x.shape[-1]], [y.shape[-1]], x.shape[-2]):
        a, b = gram.centre_all([x, y])
        xy, xx, yy = (feature_product(*pair, debiased) for pair in ((a, b), (a, a), (b, b)))
    else:
        room = gram.block_room(x, y)
        (a, floor_x), (b, floor_y) = (vector(z, debiased, kernel, sigma, room) for z in (x, y))
        xy, xx, yy = (torch.linalg.vecdot(u, v) for u, v in ((a, b), (a, a), (b, b)))
        xx, yy = beyond(xx, floor_x), beyond(yy, floor_y)
    return cosine(xy, xx, yy)


def cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / √(xx yy), of numbers whose products neither overflow nor vanish: exactly 1 of equals."""
    return xy.sign() * ((xy / xx) * (xy / yy)).sqrt()


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
    if a is b:
        v = gram.new_half(a, a.shape[-1])
        columns = gram.panels(v, a.shape[-1])
        gram.add_product(columns, a.mT, first=True)
        gram.weigh(columns)
        product = 2 * squared_norm(v)
    else:
        product = gram.product(a.mT, b.mT).square().sum((-2, -1))
    if not debiased:
        return product
    n = a.shape[-2]
    d, e = squared_norm(a), squared_norm(b)
    left = product - (d * e).sum(-1) * n / (n - 2) + d.sum(-1) * e.sum(-1) / ((n - 1) * (n - 2))
    return beyond(left, n * _EPS * product) if a is b else left


def vector(
    x: Tensor,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    room: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of the kernel matrix of x (…, n, p) a vector (…, m), such that cosines of them are CKA.

    And a floor (…): a square that is not beyond it is mere rounding. `room` is that of
    `gram.block_room`, to be used again.
    """
    n = x.shape[-2]
    v = gram.new_half(x, n) if out is None else out
    columns = gram.panels(v, n)
    if kernel == "linear":
        gram.fill(columns, x, room)
    else:
        assert sigma is not None
        k = gram.double_centre(gram.rbf(x, sigma))
        for own, panel in columns:
            panel.copy_(k[..., own.start :, own])
    floor = v.new_zeros(v.shape[:-1])
    if debiased:
        floor = _rounding(gram.u_centre_panels(columns), n) / 2
    gram.weigh(columns)
    return v, floor


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


def beyond(value: Tensor, floor: Tensor) -> Tensor:
    """NaN where a value is mere rounding: nothing is left to compare."""
    return torch.where(value > floor, value, torch.nan)


def cosine_distance(m: Tensor, whole: Tensor, complement: bool, floor: Tensor) -> Tensor:
    """1 - CKA of the kernel matrices `whole` and `whole` less a part, without cancellation.

    m (C, n, n) is the part, or what is left of the whole without it (`complement`): the smaller
    of the two, so that what the whole does not explain of it keeps its digits. Exactly 0 for m = 0;
    NaN where the squared norm of what is left of the whole is not above `floor`.
    Source: METRICS, "CKA without cancellation".
    """
    parts, full = m.flatten(1), whole.flatten()
    ll = full @ full
    gamma = parts @ full / ll
    left = gamma if complement else 1 - gamma
    rr = squared_norm(torch.addr(parts, gamma, full, alpha=-1))
    kk = beyond(left.square() * ll + rr, floor)
    return (rr / kk) / (1 + left * torch.sqrt(ll / kk))
