"""Centring, Gram matrices, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import columns, distances, memory, panels

# Elements of a batch of Grams that passes through the cache together, and of one on a GPU.
_BATCH, _LARGE_BATCH = 2**18, 2**24


def centre(x: Tensor) -> Tensor:
    """x (…, n, p) in float64 less its mean over stimuli; constant columns become exactly zero."""
    return centre_all([x])[0][0]


def centre_all(xs: Sequence[Tensor], for_products: bool = False) -> list[Tensor]:
    """As `centre`, those `shape_runs` in one tensor, (length, …, n, p).

    All in one memory: of several, malloc gives the system back what is freed. For what may be
    `for_products` see `_centre_inplace`.
    """
    # Of many features, the products of one by all cores are faster.
    most = panels.count_cores(xs[0]) if max(x.shape[-1] for x in xs) <= panels.COLUMNS else 1
    shapes = [(run.stop - run.start, *xs[run.start].shape) for run in panels.shape_runs(xs, most)]
    sizes = [math.prod(shape) for shape in shapes]
    room = memory.empty_buffer(xs[0], sum(sizes), dtype=torch.float64).split(sizes)
    found = [c.view(shape) for c, shape in zip(room, shapes, strict=True)]
    for x, own in zip(xs, (own for c in found for own in c), strict=True):
        own.copy_(x)
    for c in found:
        _centre_inplace(c, for_products and _below_float64(xs))
    return found


def _centre_inplace(c: Tensor, short: bool) -> Tensor:
    """Centre c (…, n, p) in place; returns its means (…, 1, p).

    short: whether c holds numbers of 24 bits or fewer, and is for inner products of centred
    matrices. Those of a constant column then add up to n of them exactly, and elsewhere what
    rounding leaves of a mean, 1e-16 of it, changes the products by its square. Else means are taken
    of the differences from the first stimulus, in one more pass.
    """
    n = c.shape[-2]
    first = None if short else c[..., :1, :].clone()
    if first is not None:
        c.sub_(first)
    by_rows = c.stride(-1) < c.stride(-2)
    mean = c.new_ones(1, n) @ c if by_rows else c.sum(-2, keepdim=True)
    mean.div_(mean.new_full((), n))  # by a number CUDA multiplies by its inverse
    c.sub_(mean)
    return mean if first is None else mean.add_(first)


def _below_float64(xs: Sequence[Tensor]) -> bool:
    return all(x.dtype != torch.float64 for x in xs)


def iter_batches(items: list[int], gram: Tensor) -> Iterator[list[int]]:
    """As many items at a time, each of a Gram's size, as a cache holds or a GPU is busy with."""
    size = max(1, (_BATCH if gram.device.type == "cpu" else _LARGE_BATCH) // gram.numel())
    for start in range(0, len(items), size):
        yield items[start : start + size]


def linear(x: Tensor) -> Tensor:
    """The Gram matrix of the centred x: (…, n, p) to (…, n, n), float64."""
    half = panels.empty_panels(x, x.shape[-2], *x.shape[:-2])
    gram_into(half, [x], panels.block_buffer([x]))
    return panels.unpack(half)


def gram_into(half: panels.Panels, xs: Sequence[Tensor], room: Tensor) -> None:
    """Put the Gram matrices of the centred xs, all (…, n, p), into a half, through `block_buffer`.

    A product of one matrix by each core takes a tenth less than all cores' of one.
    """
    lead, p = (len(xs), *xs[0].shape[:-1]), xs[0].shape[-1]
    if not p:
        for _, panel in half:
            panel.zero_()
    for block in panels.blocks(p, math.prod(lead)):
        shape = (*lead, block.stop - block.start)
        c = room[: math.prod(shape)].view(shape)
        for x, own in zip(xs, c, strict=True):
            own.copy_(x[..., block])
        _centre_inplace(c, _below_float64(xs))
        panels.add_product(half, c, first=block.start == 0)


def to_vectors(half: panels.Panels, u_centred: bool, room: Tensor | None = None) -> Tensor:
    """Vectors (B, m) whose inner products are half of those of the matrices (B, n, n) of a half.

    Or of them `u_centred`; in the first rows of a room (…, m), or in new memory.
    """
    sizes = [math.prod(panel.shape[-2:]) for _, panel in half]
    b = len(half[0][1])
    if room is None:
        room = memory.empty_buffer(half[0][1], b, sum(sizes), dtype=torch.float64)
    parts = zip(half, room[:b].split(sizes, 1), strict=True)
    own = [(which, part.view(panel.shape)) for (which, panel), part in parts]
    if u_centred:
        u_centre(half, out=own)
    else:
        for (_, panel), (_, part) in zip(half, own, strict=True):
            part.copy_(panel)
    panels.scale_for_inner(own)
    return room[:b]


def u_centre(half: panels.Panels, out: panels.Panels) -> Tensor:
    """U-centre Grams of centred stimuli, whose rows sum to zero, into a half; gives their traces.

    Frobenius products of what is left are n(n - 3) times HSIC₁.
    Source: Székely & Rizzo 2014 for the centring, Song et al. 2012 for HSIC₁.
    """
    d = panels.diagonal(half)
    n = d.shape[-1]
    trace = d.sum(-1)
    below = d / (n - 2)
    beside = below - trace[..., None] / ((n - 2) * (n - 1))
    for (own, panel), (_, to) in zip(half, out, strict=True):
        torch.add(panel, below[..., own.start :, None], out=to)
        to += beside[..., None, own]
        to.diagonal(dim1=-2, dim2=-1).zero_()
    return trace


def double_centre(k: Tensor) -> Tensor:
    """A kernel matrix (…, n, n) with the means of its rows and columns taken out."""
    k = k - k.mean(-1, keepdim=True)
    return k.sub_(k.mean(-2, keepdim=True))


def centre_gram(g: Tensor) -> Tensor:
    """The Gram of centred stimuli from that of stimuli relative to any one; as symmetric as g."""
    mean = g.mean(-1)
    return g - (mean[..., :, None] + mean[..., None, :] - mean.mean(-1)[..., None, None])


def centered_gram(x: Tensor, *, kernel: str, sigma: float | None) -> Tensor:
    if kernel == "linear":
        return linear(x)
    assert sigma is not None
    return double_centre(distances.rbf(x, sigma))


def cell_grams(x: Tensor, *, cells: np.ndarray, n_cells: int) -> Tensor:
    if cells.ndim == 2 and cells.dtype != np.bool_:
        return torch.stack([panels.unpack(cell_sums(x, labels, n_cells)[0]) for labels in cells])
    return panels.unpack(cell_sums(x, cells, n_cells)[0])


def cell_sums(
    x: Tensor, cells: np.ndarray, n_cells: int, shifts: bool = False
) -> tuple[panels.Panels, Tensor, Tensor]:
    """One pass over x (n, p): the cells' Grams, live neurons and, if asked for, shifts.

    Returns ``g``, a half of (C, n, n); ``live`` (C,), how many columns of a cell are not constant;
    ``shift`` (C, n), B_c μ_c with B_c the centred columns of a cell and μ_c their means, or zeros.
    """
    n = len(x)
    g = panels.empty_panels(x, n, n_cells, least=panels.TILE)
    empty = np.ones(n_cells, dtype=np.bool_)
    live = torch.zeros(n_cells, dtype=torch.int64, device=x.device)
    shift = torch.zeros(n_cells, n, 1, dtype=torch.float64, device=x.device)
    for run, shape, c in columns.iter_cell_blocks(x, cells, n_cells):
        mean = _centre_inplace(c, _below_float64([x]))
        dead = (c[0] == 0).nonzero()[:, 0]
        dead = dead[(c[:, dead] == 0).all(0)]
        live[run] += shape[1] - torch.bincount(dead // shape[1], minlength=shape[0])
        parts = c.unflatten(1, shape).transpose(0, 1)
        own, first = panels.select(g, run), bool(empty[run].all())
        if not first:
            _clear(own, empty[run])
        panels.add_product(own, parts, first)
        empty[run] = False
        if shifts:
            shift[run].baddbmm_(parts, mean.view(*shape, 1))
    _clear(g, empty)
    return g, live, shift[..., 0]


def _clear(half: panels.Panels, which: np.ndarray) -> None:
    """Set some of the matrices to zero."""
    if which.any():
        for _, panel in half:
            panel[torch.from_numpy(np.flatnonzero(which)).to(panel.device)] = 0
