"""Centring, Gram matrices, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import columns, memory

# Elements of a batch of Grams that passes through the cache together, and of one on a GPU.
_BATCH, _LARGE_BATCH = 2**18, 2**24
# Columns of a panel of a symmetric matrix, at least, and how many panels there are at most: more
# would save little beyond nearly half of a product, and fewer columns multiply more slowly. More
# than that are a multiple of what the BLAS takes at once.
_PANEL, _PANELS, _TILE = 64, 10, 24
# Rows that are few, and columns that are many for a core, where the columns are shared out.
_FEW, _LONG = 64, 2048
# Columns of a block at least, where each core has one matrix, and features at most.
_COLUMNS = 512
# Weight of the entries of a half of a matrix that stand for one, beside those that stand for two.
_ONCE = math.sqrt(0.5)

Half = list[tuple[slice, Tensor]]
"""A half of symmetric matrices, in panels: columns, and what these hold from the diagonal down."""


def centre(x: Tensor) -> Tensor:
    """x (…, n, p) in float64 less its mean over stimuli; constant columns become exactly zero."""
    return centre_all([x])[0][0]


def centre_all(xs: Sequence[Tensor]) -> list[Tensor]:
    """As `centre`, those `alike` in one tensor, (length, …, n, p).

    All in one memory: of several, malloc gives the system back what is freed.
    """
    # Of many features, the products of one by all cores are faster.
    most = _cores(xs[0]) if max(x.shape[-1] for x in xs) <= _COLUMNS else 1
    shapes = [(run.stop - run.start, *xs[run.start].shape) for run in alike(xs, most)]
    sizes = [math.prod(shape) for shape in shapes]
    room = memory.scratch(xs[0], sum(sizes), dtype=torch.float64).split(sizes)
    found = [c.view(shape) for c, shape in zip(room, shapes, strict=True)]
    for x, own in zip(xs, (own for c in found for own in c), strict=True):
        own.copy_(x)
    for c in found:
        _centre_(c)
    return found


def _centre_(c: Tensor) -> tuple[Tensor, Tensor]:
    """Centre c (…, n, p) in place; returns (…, 1, p) the first stimulus and the rest of the means.

    A column whose mean has no rest is constant, or its first value is its mean.
    """
    n = c.shape[-2]
    first = c[..., :1, :].clone()
    c.sub_(first)
    if c.stride(-1) < c.stride(-2):
        rest = (c.new_ones(1, n) @ c).div_(n)
    else:
        rest = c.mean(-2, keepdim=True)
    c.sub_(rest)
    return first, rest


def blocks(p: int, rows: int) -> Iterator[slice]:
    """Slices of p neurons that make float64 blocks of `BLOCK` elements with `rows` rows each."""
    width = max(1, memory.BLOCK // rows)
    return (slice(start, min(start + width, p)) for start in range(0, p, width))


def batches(items: list[int], gram: Tensor) -> Iterator[list[int]]:
    """As many items at a time, each of a Gram's size, as a cache holds or a GPU is busy with."""
    size = max(1, (_BATCH if gram.device.type == "cpu" else _LARGE_BATCH) // gram.numel())
    for start in range(0, len(items), size):
        yield items[start : start + size]


def linear(x: Tensor) -> Tensor:
    """The Gram matrix of the centred x: (…, n, p) to (…, n, n), float64."""
    n = x.shape[-2]
    g = memory.scratch(x, *x.shape[:-1], n, dtype=torch.float64)
    half = new_half(x, n, *x.shape[:-2])
    fill(half, [x], block_room([x]))
    for own, panel in half:
        width = panel.shape[-1]
        block, below = panel[..., :width, :], panel[..., width:, :]
        g[..., own, own] = block.tril() + block.tril(-1).mT
        g[..., own.stop :, own] = below
        g[..., own, own.stop :] = below.mT
    return g


def new_half(x: Tensor, n: int, *batch: int) -> Half:
    """Room for halves of n x n matrices (*batch, n, n), on x's device; a panel is contiguous."""
    width = max(_PANEL, -(-n // (_PANELS * _TILE)) * _TILE)
    spans = [slice(start, min(start + width, n)) for start in range(0, n, width)]
    shapes = [(*batch, n - own.start, own.stop - own.start) for own in spans]
    sizes = [math.prod(shape) for shape in shapes]
    room = memory.scratch(x, sum(sizes), dtype=torch.float64).split(sizes)
    return [(own, part.view(shape)) for own, part, shape in zip(spans, room, shapes, strict=True)]


def some(half: Half, which: int | slice) -> Half:
    """The halves of some of the matrices."""
    return [(own, panel[which]) for own, panel in half]


def _cores(x: Tensor) -> int:
    return 1 if x.is_cuda else torch.get_num_threads()


def together(xs: Sequence[Tensor]) -> Iterator[slice]:
    """Those `alike` whose blocks are made together: if cores are few, as many as these."""
    cores = _cores(xs[0])
    return alike(xs, cores if cores * math.prod(xs[0].shape[:-1]) * _COLUMNS <= memory.BLOCK else 1)


def alike(xs: Sequence[Tensor], most: int) -> Iterator[slice]:
    """Runs of xs that are of one shape, of a length up to `most`."""
    start = 0
    while start < len(xs):
        stop = start + 1
        while stop < min(start + most, len(xs)) and xs[stop].shape == xs[start].shape:
            stop += 1
        yield slice(start, stop)
        start = stop


def fill(half: Half, xs: Sequence[Tensor], room: Tensor) -> None:
    """Put the Gram matrices of the centred xs, all (…, n, p), into a half, by way of `block_room`.

    A product of one matrix by each core takes a tenth less than all cores' of one.
    """
    lead, p = (len(xs), *xs[0].shape[:-1]), xs[0].shape[-1]
    if not p:
        for _, panel in half:
            panel.zero_()
    for block in blocks(p, math.prod(lead)):
        shape = (*lead, block.stop - block.start)
        c = room[: math.prod(shape)].view(shape)
        for x, own in zip(xs, c, strict=True):
            own.copy_(x[..., block])
        _centre_(c)
        add_product(half, c, first=block.start == 0)


def block_room(xs: Sequence[Tensor]) -> Tensor:
    """Memory for a float64 block of what is `together`: fresh it costs what centring does."""
    size = max(
        min(run[0].numel() * len(run), max(memory.BLOCK, math.prod(run[0].shape[:-1])))
        for run in (xs[which] for which in together(xs))
    )
    return memory.scratch(xs[0], size, dtype=torch.float64)


def add_product(half: Half, c: Tensor, first: bool) -> None:
    """Add c cᵀ of c (…, n, k) to its half, or put it there if it is the first."""
    n, k = c.shape[-2:]
    beta = 0 if first else 1
    if c.numel() > n * k:
        c = c.reshape(-1, n, k)
        for own, panel in half:
            panel.flatten(0, -3).baddbmm_(c[:, own.start :], c[:, own].mT, beta=beta)
        return
    c = c.reshape(n, k)
    for own, panel in half:
        out, a, b = panel.view(panel.shape[-2:]), c[own.start :], c[own]
        if n > _FEW:
            out.addmm_(a, b.mT, beta=beta)
        elif first:
            out.copy_(product(a, b))
        else:
            out.add_(product(a, b))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of a (…, n, k) and b (…, m, k). Of few rows that are long each core sums a part."""
    k = a.shape[-1]
    parts = 1 if a.ndim > 2 else min(_cores(a), k // _LONG)
    if parts < 2 or max(len(a), len(b)) > _FEW:
        return a @ b.mT
    end = k - k % parts
    u, v = (z[:, :end].unflatten(1, (parts, -1)).transpose(0, 1) for z in (a, b))
    return (u @ v.mT).sum(0).addmm_(a[:, end:], b[:, end:].mT)


def weigh(half: Half) -> None:
    """Scale in place such that `inner` products are half of the matrices'."""
    for _, panel in half:
        panel[..., : panel.shape[-1], :].mul_(_ONCE)


def inner(a: Half, b: Half) -> Tensor:
    """The inner product of each matrix (…, n, n) of a half with the one of another, (…)."""
    pairs = ((u.flatten(-2), v.flatten(-2)) for (_, u), (_, v) in zip(a, b, strict=True))
    return torch.stack([torch.linalg.vecdot(u, v) for u, v in pairs]).sum(0)


def inner_of_all(a: Half, b: Half) -> Tensor:
    """As `inner`, of each matrix (L, n, n) of a half with all (M, n, n) of another: (L, M)."""
    pairs = ((u.flatten(1), v.flatten(1)) for (_, u), (_, v) in zip(a, b, strict=True))
    return torch.stack([product(u, v) for u, v in pairs]).sum(0)


def u_centre_half(half: Half) -> Tensor:
    """As `u_centre`, in place; returns the traces that there were."""
    diagonals = [panel.diagonal(dim1=-2, dim2=-1) for _, panel in half]
    diagonal = torch.cat(diagonals, -1)
    below, beside = _u_shifts(diagonal)
    for (own, panel), zero in zip(half, diagonals, strict=True):
        panel += below[..., own.start :, None]
        panel += beside[..., None, own]
        zero.zero_()
    return diagonal.sum(-1)


def squared_distances(g: Tensor) -> Tensor:
    """Squared Euclidean distances between stimuli from a Gram matrix, (…, n, n)."""
    d = g.diagonal(dim1=-2, dim2=-1)
    out = (d[..., :, None] + d[..., None, :] - 2 * g).clamp_(min=0)
    out.diagonal(dim1=-2, dim2=-1).zero_()
    return out


def rbf(x: Tensor, sigma: float) -> Tensor:
    """The RBF kernel of x (…, n, p): (…, n, n)."""
    return rbf_kernel(linear(x), sigma)


def rbf_kernel(g: Tensor, sigma: float) -> Tensor:
    """The RBF kernel from a Gram matrix, centred or not: (…, n, n).

    The squared bandwidth is sigma² times the median of all n² squared distances, zeros included.
    """
    d = squared_distances(g)
    values = d.flatten(-2)
    middle = values.shape[-1]
    low, high = (values.kthvalue(k, dim=-1).values for k in ((middle + 1) // 2, middle // 2 + 1))
    return torch.exp(-d / ((low + high)[..., None, None] * sigma**2))


def double_centre(k: Tensor) -> Tensor:
    """A kernel matrix (…, n, n) with the means of its rows and columns taken out."""
    k = k - k.mean(-1, keepdim=True)
    return k.sub_(k.mean(-2, keepdim=True))


def centre_relative(g: Tensor) -> Tensor:
    """The Gram of centred stimuli from that of stimuli relative to any one; as symmetric as g."""
    mean = g.mean(-1)
    return g - (mean[..., :, None] + mean[..., None, :] - mean.mean(-1)[..., None, None])


def u_centre(g: Tensor) -> Tensor:
    """U-centred Grams (…, n, n) of centred stimuli, whose rows sum to zero.

    Their Frobenius products are n(n - 3) times HSIC₁.
    Source: Székely & Rizzo 2014 for the centring, Song et al. 2012 for HSIC₁.
    """
    rows, columns = _u_shifts(g.diagonal(dim1=-2, dim2=-1))
    u = g + rows[..., None]
    u += columns[..., None, :]
    u.diagonal(dim1=-2, dim2=-1).zero_()
    return u


def _u_shifts(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """What U-centring adds to each row and to each column of such a Gram."""
    n = diagonal.shape[-1]
    rows = diagonal / (n - 2)
    return rows, rows - rows.sum(-1, keepdim=True) / (n - 1)


def centered_gram(x: Tensor, *, kernel: str, sigma: float | None) -> Tensor:
    if kernel == "linear":
        return linear(x)
    assert sigma is not None
    return double_centre(rbf(x, sigma))


def cell_grams(x: Tensor, *, cells: np.ndarray, n_cells: int) -> Tensor:
    if cells.ndim == 2 and cells.dtype != np.bool_:
        return torch.stack([cell_sums(x, labels, n_cells)[0] for labels in cells])
    return cell_sums(x, cells, n_cells)[0]


def cell_sums(
    x: Tensor, cells: np.ndarray, n_cells: int, shifts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over x (n, p): the cells' Grams, live neurons and, if asked for, shifts.

    Returns ``g`` (C, n, n); ``live`` (C,), how many columns of a cell are not constant; ``shift``
    (C, n), B_c μ_c with B_c the centred columns of a cell and μ_c their means, or zeros.
    """
    n = len(x)
    g = memory.scratch(x, n_cells, n, n, dtype=torch.float64).zero_()
    live = torch.zeros(n_cells, dtype=torch.int64, device=x.device)
    shift = torch.zeros(n_cells, n, 1, dtype=torch.float64, device=x.device)
    for run, shape, c in columns.of_cells(x, cells, n_cells):
        first, rest = _centre_(c)
        live[run] += _alive(c, rest[0]).view(shape).sum(1)
        parts = c.unflatten(1, shape).transpose(0, 1)
        g[run].baddbmm_(parts, parts.mT)
        if shifts:
            shift[run].baddbmm_(parts, (first + rest).view(*shape, 1))
    return g, live, shift[..., 0]


def _alive(c: Tensor, rest: Tensor) -> Tensor:
    """Which columns of c (n, k) are not zero, given the rest (k,) of their means by `_centre_`."""
    alive = rest != 0
    still = (~alive).nonzero()[:, 0]
    alive[still] = (c[:, still] != 0).any(0)
    return alive
