"""Gradients of similarities with respect to the features, in closed form and in float64.

Each function takes x (n, p), y (n, q) and ``upstream`` (1, 1), the derivative of a loss with
respect to their similarity. It returns the gradient of the loss with respect to each of ``sides``
(0 is x, 1 is y), in the dtype of that side. A gradient is a matrix (n, n) times the features, which
are converted to float64 block by block; linear CKA and Procrustes of few neurons need no such
matrix.
Source: docs/compare.md, "A similarity as a loss".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import cka, distances, features, gram, memory, panels
from repsim_kernels.kernels.torch.representation import Representation, from_complement

_EPS = torch.finfo(torch.float64).eps


def cka_gradients(
    x: Tensor,
    y: Tensor,
    upstream: Tensor,
    *,
    sides: tuple[int, ...],
    debiased: bool,
    kernel: str,
    sigma: float | None,
) -> tuple[Tensor, ...]:
    if kernel == "linear" and features.are_cheaper([x, y], comparisons=1):
        gradients = _differentiate_features(x, y, upstream, sides, debiased)
        if gradients is not None:
            return gradients
    if kernel == "linear":
        kernels = [_centre_kernel(z, debiased, "linear") for z in (x, y)]
        ws = _differentiate_cosine(kernels, upstream, sides)
        return tuple(_multiply(w.mul_(2), (x, y)[side]) for side, w in ws)
    if kernel == "precomputed":
        kernels = [_centre_kernel((k.double() + k.mT) / 2, debiased) for k in (x, y)]
        ws = _differentiate_cosine(kernels, upstream, sides)
        return tuple(w.to((x, y)[side].dtype) for side, w in ws)
    assert sigma is not None
    squared = [_square_distances(z, "euclidean")[0] for z in (x, y)]
    kernels = [_centre_kernel(distances.rbf(d2, sigma), debiased) for d2 in squared]
    return tuple(
        _multiply(_laplacian(_differentiate_rbf(w, squared[side], sigma)), (x, y)[side])
        for side, w in _differentiate_cosine(kernels, upstream, sides)
    )


def procrustes_gradients(
    x: Tensor, y: Tensor, upstream: Tensor, *, sides: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The singular vectors of no singular value are left out, where it is not differentiable.

    The result is then the subgradient of the nuclear norm that is the smallest.
    """
    both = [Representation(x), Representation(y)]
    f, g = (a.factor for a in both)
    u, s, vh = torch.linalg.svd(f.mT @ g, full_matrices=False)
    size = torch.linalg.matrix_norm(f) * torch.linalg.matrix_norm(g)
    rotation = (u * (s > len(x) * _EPS * size)) @ vh
    rotated = (g @ rotation.mT, f @ rotation)
    return tuple(
        _differentiate_procrustes(both[side], rotated[side] / size, s.sum() / size, upstream)
        for side in sides
    )


def rsa_gradients(
    x: Tensor,
    y: Tensor,
    upstream: Tensor,
    *,
    sides: tuple[int, ...],
    distance: str,
    compare: str,
) -> tuple[Tensor, ...]:
    parts = [_square_distances(z, distance) for z in (x, y)]
    vectors = [_centre_distances(d2, distance, compare) for d2, _, _ in parts]
    gradients = []
    for side, w in _differentiate_cosine(vectors, upstream, sides):
        d2, offsets, length = parts[side]
        if distance == "euclidean":  # the subgradient at 0 is 0
            w.div_(d2.sqrt().mul_(2)).masked_fill_(d2 == 0, 0.0)
        if distance in ("euclidean", "sqeuclidean"):
            gradients.append(_multiply(_laplacian(w), (x, y)[side]))
            continue
        # Rows of unit length move within the sphere: what is along them is removed.
        along = 4 * (w * (1 - d2 / 2)).sum(1)
        m = w.mul_(-4)
        m.diagonal().copy_(along)
        m.div_(length[:, None]).div_(length)
        gradients.append(_multiply(m, (x, y)[side], offsets))
    return tuple(gradients)


def _differentiate_cosine(
    both: list[Tensor], upstream: Tensor, sides: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each side with the gradient of upstream ⟨u, v⟩ / (‖u‖ ‖v‖) with respect to it.

    ``both`` are u and v (n, n), which are overwritten.
    """
    norms = [torch.linalg.matrix_norm(a) for a in both]
    units = [a.div_(norm) for a, norm in zip(both, norms, strict=True)]
    similarity = torch.dot(*(unit.flatten() for unit in units))
    for side in sides:
        w = torch.addcmul(units[1 - side], units[side], -similarity)
        yield side, w.mul_(upstream / norms[side])


def _differentiate_features(
    x: Tensor, y: Tensor, upstream: Tensor, sides: tuple[int, ...], debiased: bool
) -> tuple[Tensor, ...] | None:
    """Return the gradients of linear CKA without Grams; None if U-centring cancels too much."""
    comparison = features.compare([x, y], debiased, torch.float64)
    if comparison is None:
        return None
    products = comparison[0]
    norms = math.sqrt(products[0, 0]), math.sqrt(products[1, 1])
    similarity = float(products[0, 1]) / norms[0] / norms[1]
    centred = gram.centre(x), gram.centre(y)
    gradients = []
    for side in sides:
        a, b = centred[side], centred[1 - side]
        g = _multiply_gram(b, a, debiased) / norms[1 - side]
        g -= _multiply_gram(a, a, debiased) * (similarity / norms[side])
        gradients.append(g.mul_(2 * upstream / norms[side]).to((x, y)[side].dtype))
    return tuple(gradients)


def _multiply_gram(b: Tensor, a: Tensor, debiased: bool) -> Tensor:
    """Return the Gram of b (n, q), U-centred if debiased, times a (n, p), both of them centred."""
    product = b @ (b.mT @ a)
    if debiased:
        n, d = len(b), b.square().sum(1)
        shift = d / (n - 2)  # of each row and column, as in `gram.u_centre`
        product += shift @ a
        product -= (d + 2 * shift - d.sum() / ((n - 1) * (n - 2)))[:, None] * a
    return product


def _centre_kernel(x: Tensor, debiased: bool, kernel: str = "precomputed") -> Tensor:
    """Return the centred, if debiased U-centred, kernel matrix (n, n) of x."""
    vectors, _, _ = cka.kernel_vectors([x], debiased, kernel, None, torch.float64)
    return panels.unpack_vectors(vectors[0], len(x))


def _differentiate_rbf(w: Tensor, d2: Tensor, sigma: float) -> Tensor:
    """Return the gradient with respect to d2 (n, n) from that with respect to their RBF kernel.

    The bandwidth moves with the median of d2; equal distances at the median share its part. w is
    overwritten.
    """
    low, high = distances.middle_distances(d2)
    scale = (low + high) * sigma**2
    w = w.mul_(distances.rbf(d2, sigma)).div_(-scale)
    part = (w * d2).sum() * (-(sigma**2) / scale)
    for value in (low, high):
        at = (d2 == value).double()
        w.addcmul_(at, part / at.sum())
    return w


def _square_distances(x: Tensor, distance: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return squared distances (n, n) between rows as in `PairDistances`, offsets and lengths.

    The offsets (n, 1) are what "correlation" and "cosine" subtract from the rows before they scale
    them to unit length, and the lengths (n,) are those before. Otherwise the offsets are None.
    """
    offsets = None
    if distance == "correlation":
        offsets = distances.row_means(x)
    elif distance == "cosine":
        offsets = x.new_zeros(len(x), 1, dtype=torch.float64)
    origin = distances.central_row(x, distances.row_norms(x)) if offsets is None else offsets
    packed, _, length = distances.squared_distances(x, origin, unit=offsets is not None)
    d2 = panels.unpack(packed)
    d2.diagonal().zero_()
    return d2, offsets, length


def _centre_distances(d2: Tensor, distance: str, compare: str) -> Tensor:
    """Return the distances (n, n) that `compare` takes the cosine of; zeros on the diagonal."""
    u, n = d2.sqrt() if distance == "euclidean" else d2.clone(), len(d2)
    if compare == "pearson":
        u.sub_(u.sum() / (n * (n - 1))).diagonal().zero_()
    return u


def _laplacian(w: Tensor) -> Tensor:
    """Return the matrix that, times x, is the gradient with respect to x.

    w (n, n), symmetric, is that with respect to the squared distances between the rows of x. It is
    overwritten.
    """
    m = w.mul_(-4)
    m.diagonal().zero_()
    m.diagonal().copy_(-m.sum(1))
    return m


def _differentiate_procrustes(
    a: Representation, rotated: Tensor, similarity: Tensor, upstream: Tensor
) -> Tensor:
    """Return the gradient with respect to a.x.

    ``rotated`` is the gradient of the nuclear norm with respect to the factor of a, and relative to
    the product of both norms.
    """
    shrink = similarity / a.factor.square().sum()
    if a.p < a.n:
        gradient = from_complement(rotated - a.factor * shrink)
        return gradient.mul_(upstream).to(a.x.dtype)
    vectors, w = a.spectrum
    m = (rotated * torch.where(w > 0, w.rsqrt(), 0.0)) @ vectors.mT
    m.diagonal().sub_(shrink)
    m = from_complement(from_complement(m).mT).mT
    return _multiply(m * upstream, a.x)


def _multiply(m: Tensor, x: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return m (n, n) times x (n, p), in the dtype of x.

    First x is centred or, with offsets (n, 1), these are subtracted from its rows.
    """
    n, p = x.shape
    out = memory.empty_buffer(x, n, p)
    buffers = panels.block_buffer([x]), panels.block_buffer([x])
    for block in panels.split_neurons(p, n):
        z, product = (b[: n * (block.stop - block.start)].view(n, -1) for b in buffers)
        if offsets is None:
            gram.centre_into([z], [x[:, block]], z, for_products=False)
        else:
            z.copy_(x[:, block]).sub_(offsets)
        out[:, block] = torch.mm(m, z, out=product)
    return out
