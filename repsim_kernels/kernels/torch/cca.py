"""Canonical correlation: mean, singular-vector and projection-weighted."""

from __future__ import annotations

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram
from repsim_kernels.kernels.torch.representation import Representation, from_complement

# Directions and neurons of a block of products: the fastest sizes on two cores at n = 500.
_DIRECTIONS, _NEURONS = 1000, 2048


def cca(x: Tensor, y: Tensor, *, squared: bool, ridge: float, penalty: float) -> Tensor:
    return mean_cca(Representation(x), Representation(y), squared, ridge, penalty)


def svcca(x: Tensor, y: Tensor, *, variance: float) -> Tensor:
    return mean_svcca(Representation(x), Representation(y), variance)


def pwcca(x: Tensor, y: Tensor, *, ridge: float, penalty: float) -> Tensor:
    return weighted_cca(Representation(x), Representation(y), ridge, penalty)


def shrink(r: Representation, ridge: float, penalty: float) -> Tensor:
    """Return √(w / (w + κ)) for the eigenvalues w (…, r); 0 beyond the rank."""
    w = r.spectrum[1]
    kappa = penalty + ridge * r.trace[..., None] / r.n
    return torch.where(w > 0, (w / (w + kappa)).sqrt(), 0.0)


def _correlation(a: Representation, b: Representation, ridge: float, penalty: float) -> Tensor:
    """Return the matrix (…, r, s) whose singular values are the canonical correlations."""
    u = a.spectrum[0] * shrink(a, ridge, penalty)[..., None, :]
    v = b.spectrum[0] * shrink(b, ridge, penalty)[..., None, :]
    return u.mT @ v


def mean_cca(
    a: Representation, b: Representation, squared: bool, ridge: float, penalty: float
) -> Tensor:
    m = _correlation(a, b, ridge, penalty)
    total = m.square().sum((-2, -1)) if squared else torch.linalg.svdvals(m).sum(-1)
    if ridge or penalty:
        return (total / min(a.n - 1, a.p, b.p)).clamp(max=1)
    return (total / torch.minimum(a.rank, b.rank)).clamp(max=1)


def count_leading(w: Tensor, variance: float) -> Tensor:
    """Count the descending eigenvalues (…, r) needed for a share ``variance`` of their sum."""
    share = w.cumsum(-1) / w.sum(-1, keepdim=True)
    # Rounding may keep the share below 1 to the end; directions beyond the rank never count.
    count = (share < variance).sum(-1) + 1
    return torch.minimum(count, (w > 0).sum(-1))


def mean_svcca(a: Representation, b: Representation, variance: float) -> Tensor:
    (u, w), (v, z) = a.spectrum, b.spectrum
    k, m = count_leading(w, variance), count_leading(z, variance)
    u = u * (torch.arange(w.shape[-1], device=w.device) < k[..., None])[..., None, :]
    v = v * (torch.arange(z.shape[-1], device=z.device) < m[..., None])[..., None, :]
    u, v = u[..., : int(k.max())], v[..., : int(m.max())]
    return (torch.linalg.svdvals(u.mT @ v).sum(-1) / torch.minimum(k, m)).clamp(max=1)


def weighted_cca(a: Representation, b: Representation, ridge: float, penalty: float) -> Tensor:
    u, rho, _ = torch.linalg.svd(_correlation(a, b, ridge, penalty), full_matrices=False)
    directions = a.spectrum[0] @ (shrink(a, ridge, penalty)[..., None] * u)
    count = torch.minimum(a.rank, b.rank)[..., None]
    in_rank = torch.arange(rho.shape[-1], device=rho.device) < count
    alpha = variate_weights(from_complement(directions).mT, a.x) * in_rank
    return ((alpha * rho).sum(-1) / alpha.sum(-1)).clamp(max=1)


def variate_weights(h: Tensor, x: Tensor) -> Tensor:
    """Return Σⱼ |hᵢ · xⱼ| over the centred columns of x (…, n, p), for directions h (…, k, n).

    The result is (…, k). Products are in the precision of x, at least float32, and are summed in
    float64; only one block of the k x p matrix of products exists.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = h.to(dtype)
    total = torch.zeros(h.shape[:-1], dtype=torch.float64, device=h.device)
    for start in range(0, x.shape[-1], _NEURONS):
        c = gram.centre(x[..., start : start + _NEURONS])
        scale = c.abs().amax()
        if scale > 0:
            c = (c / scale).mT.to(dtype, memory_format=torch.contiguous_format)
            sums = [_absolute_sums(c, part) for part in torch.split(h, _DIRECTIONS, dim=-2)]
            total += torch.cat(sums, dim=-1).to(torch.float64) * scale
    return total


def _absolute_sums(c: Tensor, h: Tensor) -> Tensor:
    """Return Σⱼ |hᵢ · cⱼ| for neurons c (…, w, n) and directions h (…, k, n): (…, k)."""
    if c.ndim == h.ndim == 2 and c.device.type == "cpu" and c.dtype == torch.float32:
        # A 1 x 1 convolution is the product H Cᵀ, and oneDNN's is faster than MKL's on AMD.
        (k, n), w = h.shape, len(c)
        image = h.view(1, k, 1, n).permute(0, 3, 1, 2)
        products = torch.conv2d(image, c.view(w, n, 1, 1)).permute(0, 2, 3, 1).reshape(k, w)
    else:
        products = h @ c.mT
    # Summing contiguous rows is three times as fast as a norm, which is not vectorised.
    return products.abs_().sum(-1)
