"""Products of matrices with themselves: symmetric, so that a half of each is computed and kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory

# Columns of a panel of a symmetric matrix, at least, and how many panels there are at most: more
# would save little beyond nearly half of a product, and fewer columns multiply more slowly. More
# than that are a multiple of what the BLAS takes at once.
_PANEL, _PANELS, TILE = 64, 10, 24
# Rows that are few, and columns that are many for a core, where the columns are shared out.
_FEW, _LONG = 64, 2048
# Columns of a block at least, where each core has one matrix, and features at most.
COLUMNS = 512
# Weight of the entries of a half of a matrix that stand for one, beside those that stand for two.
_ONCE = math.sqrt(0.5)

Panels = list[tuple[slice, Tensor]]
"""A half of symmetric matrices, in panels: columns, and what these hold from the diagonal down."""


def unpack(half: Panels) -> Tensor:
    """The matrices (…, n, n), symmetric to the bit."""
    first = half[0][1]
    g = memory.empty_buffer(first, *first.shape[:-1], first.shape[-2], dtype=torch.float64)
    for own, panel in half:
        width = panel.shape[-1]
        block, below = panel[..., :width, :], panel[..., width:, :]
        g[..., own, own] = block.tril() + block.tril(-1).mT
        g[..., own.stop :, own] = below
        g[..., own, own.stop :] = below.mT
    return g


def panels_view(g: Tensor) -> Panels:
    """A half of symmetric matrices (…, n, n), without a copy, in the panels of `cell_sums`."""
    return [(own, g[..., own.start :, own]) for own in _spans(g.shape[-1], TILE)]


def _spans(n: int, least: int) -> list[slice]:
    width = max(least, -(-n // (_PANELS * TILE)) * TILE)
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


def empty_panels(x: Tensor, n: int, *batch: int, least: int = _PANEL) -> Panels:
    """Room for halves of n x n matrices (*batch, n, n), on x's device; a panel is contiguous.

    A panel has `least` columns or more.
    """
    spans = _spans(n, least)
    shapes = [(*batch, n - own.start, own.stop - own.start) for own in spans]
    sizes = [math.prod(shape) for shape in shapes]
    room = memory.empty_buffer(x, sum(sizes), dtype=torch.float64).split(sizes)
    return [(own, part.view(shape)) for own, part, shape in zip(spans, room, shapes, strict=True)]


def select(half: Panels, which: int | slice | list[int]) -> Panels:
    """The halves of some of the matrices."""
    return [(own, panel[which]) for own, panel in half]


def blocks(p: int, rows: int) -> Iterator[slice]:
    """Slices of p neurons that make float64 blocks of `BLOCK` elements with `rows` rows each."""
    width = max(1, memory.BLOCK // rows)
    return (slice(start, min(start + width, p)) for start in range(0, p, width))


def count_cores(x: Tensor) -> int:
    return 1 if x.is_cuda else torch.get_num_threads()


def shape_runs_per_core(xs: Sequence[Tensor]) -> Iterator[slice]:
    """Those `shape_runs` whose blocks are made together: if cores are few, as many as these."""
    cores = count_cores(xs[0])
    return shape_runs(
        xs, cores if cores * math.prod(xs[0].shape[:-1]) * COLUMNS <= memory.BLOCK else 1
    )


def shape_runs(xs: Sequence[Tensor], most: int) -> Iterator[slice]:
    """Runs of xs that are of one shape, of a length up to `most`."""
    start = 0
    while start < len(xs):
        stop = start + 1
        while stop < min(start + most, len(xs)) and xs[stop].shape == xs[start].shape:
            stop += 1
        yield slice(start, stop)
        start = stop


def block_buffer(xs: Sequence[Tensor]) -> Tensor:
    """A buffer for the float64 blocks of any run; a fresh one costs as much as centring."""
    size = max(
        min(run[0].numel() * len(run), max(memory.BLOCK, math.prod(run[0].shape[:-1])))
        for run in (xs[which] for which in shape_runs_per_core(xs))
    )
    return memory.empty_buffer(xs[0], size, dtype=torch.float64)


def add_product(half: Panels, c: Tensor, first: bool) -> None:
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
    parts = 1 if a.ndim > 2 else min(count_cores(a), k // _LONG)
    if parts < 2 or max(len(a), len(b)) > _FEW:
        return a @ b.mT
    end = k - k % parts
    u, v = (z[:, :end].unflatten(1, (parts, -1)).transpose(0, 1) for z in (a, b))
    return (u @ v.mT).sum(0).addmm_(a[:, end:], b[:, end:].mT)


def scale_for_inner(half: Panels) -> None:
    """Scale in place such that `inner` products are half of the matrices'."""
    for _, panel in half:
        panel[..., : panel.shape[-1], :].mul_(_ONCE)


def inner(a: Panels, b: Panels) -> Tensor:
    """The inner product of each matrix (…, n, n) of a half with the one of another, (…)."""
    pairs = ((u.flatten(-2), v.flatten(-2)) for (_, u), (_, v) in zip(a, b, strict=True))
    return torch.stack([torch.linalg.vecdot(u, v) for u, v in pairs]).sum(0)


def inner_of_all(a: Panels, b: Panels) -> Tensor:
    """As `inner`, of each matrix (L, n, n) of a half with all (M, n, n) of another: (L, M)."""
    pairs = ((u.flatten(1), v.flatten(1)) for (_, u), (_, v) in zip(a, b, strict=True))
    return torch.stack([product(u, v) for u, v in pairs]).sum(0)


def diagonal(half: Panels) -> Tensor:
    """The diagonals (…, n)."""
    return torch.cat([panel.diagonal(dim1=-2, dim2=-1) for _, panel in half], -1)
