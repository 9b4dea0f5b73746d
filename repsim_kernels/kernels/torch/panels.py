"""Symmetric matrix products, of which only the lower triangle is computed and stored.

The triangle is packed as panels: slices of consecutive columns, from their diagonal block down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory

# Least width of a panel, and the most panels per matrix. These save nearly half of a product; more
# panels would save little more, and narrower ones multiply more slowly. Panels wider than the least
# width are a multiple of TILE, the number of columns the BLAS processes together.
PANEL, _MAX_PANELS, TILE = 64, 10, 24
# Panels of products of features: their rows are the features of all representations.
_FEW_PANELS = 4
# A product with at most _FEW rows and at least _LONG columns per core is split over its columns.
_FEW, _LONG = 64, 2048
# float32 products are summed in float32 over at most this many terms, and then in float64.
SHORT = 8192
# Least number of neurons of a float32 block: with fewer, adding to float64 takes long.
_MIN_WIDTH = 2048
# Fewest columns of a block if each core centres its own matrix.
_COLUMNS = 512
# Scale of the diagonal blocks, whose entries count once in an inner product, those below twice.
_SQRT_HALF = math.sqrt(0.5)

Panels = list[tuple[slice, Tensor]]
"""Packed symmetric matrices (…, n, n): for each panel its columns, and the rows from its diagonal
block down, (…, n - columns.start, width). The diagonal block is stored in full."""


def unpack(packed: Panels) -> Tensor:
    """Return the full matrices (…, n, n), float64 and exactly symmetric."""
    first = packed[0][1]
    g = memory.empty_buffer(first, *first.shape[:-1], first.shape[-2], dtype=torch.float64)
    for columns, panel in packed:
        width = panel.shape[-1]
        block, below = panel[..., :width, :], panel[..., width:, :]
        g[..., columns, columns] = block.tril() + block.tril(-1).mT
        g[..., columns.stop :, columns] = below
        g[..., columns, columns.stop :] = below.mT
    return g


def panels_view(g: Tensor, like: Panels | None = None) -> Panels:
    """View symmetric matrices (…, n, n) as panels, without a copy.

    The columns are those of ``like``. By default they suit the device: on a GPU, starting a kernel
    for each panel would take longer than reading both triangles.
    """
    if like is not None:
        spans = [columns for columns, _ in like]
    else:
        spans = [slice(0, g.shape[-1])] if g.is_cuda else _spans(0, g.shape[-1], TILE)
    return [(columns, g[..., columns.start :, columns]) for columns in spans]


def _spans(start: int, stop: int, min_width: int = PANEL) -> list[slice]:
    width = max(min_width, -(-(stop - start) // (_MAX_PANELS * TILE)) * TILE)
    return [slice(left, min(left + width, stop)) for left in range(start, stop, width)]


def empty_panels(x: Tensor, n: int, *batch: int, min_width: int = PANEL) -> Panels:
    """Allocate uninitialised panels for float64 matrices (*batch, n, n) on the device of x.

    Each panel is contiguous.
    """
    return _allocate(x, _spans(0, n, min_width), n, batch)


def _allocate(x: Tensor, spans: list[slice], n: int, batch: Sequence[int]) -> Panels:
    shapes = [(*batch, n - columns.start, columns.stop - columns.start) for columns in spans]
    sizes = [math.prod(shape) for shape in shapes]
    buffers = memory.empty_buffer(x, sum(sizes), dtype=torch.float64).split(sizes)
    return [
        (columns, buffer.view(shape))
        for columns, buffer, shape in zip(spans, buffers, shapes, strict=True)
    ]


def empty_vectors(x: Tensor, n: int, *batch: int) -> tuple[Tensor, Panels]:
    """Allocate float64 matrices (*batch, n, n) as vectors (*batch, m), and as panels of these."""
    size = sum((n - columns.start) * (columns.stop - columns.start) for columns in _spans(0, n))
    vectors = memory.empty_buffer(x, *batch, size, dtype=torch.float64)
    return vectors, _view_vectors(vectors, n)


def _view_vectors(vectors: Tensor, n: int) -> Panels:
    """View vectors (…, m) as the panels of matrices (…, n, n)."""
    spans, batch = _spans(0, n), vectors.shape[:-1]
    shapes = [(n - columns.start, columns.stop - columns.start) for columns in spans]
    slots = zip(spans, vectors.split_with_sizes([*map(math.prod, shapes)], -1), shapes, strict=True)
    return [(columns, slot.view(*batch, *shape)) for columns, slot, shape in slots]


def unpack_vectors(vectors: Tensor, n: int) -> Tensor:
    """Return the matrices (…, n, n) whose vectors were scaled by `scale_for_inner`."""
    packed = _view_vectors(vectors, n)
    g = unpack(packed)
    for columns, _ in packed:
        g[..., columns, columns].div_(_SQRT_HALF)
    return g


def select(packed: Panels, index: int | slice | list[int]) -> Panels:
    """Index the first batch dimension of packed matrices."""
    return [(columns, panel[index]) for columns, panel in packed]


def to_index(rows: list[int]) -> slice | list[int]:
    """Return a slice, which makes a view, if ascending rows are consecutive."""
    first, end = rows[0], rows[-1] + 1
    return slice(first, end) if end - first == len(rows) else rows


def split_neurons(p: int, rows: int, dtype: torch.dtype = torch.float64) -> Iterator[slice]:
    """Split p neurons so that `rows` rows of a slice make a block for the cache."""
    return split(p, _block_width(rows, dtype))


def _block_width(rows: int, dtype: torch.dtype) -> int:
    """Return the width of a block of `BLOCK` elements, or more for float32."""
    return max(_min_width(dtype), memory.BLOCK // rows)


def _min_width(dtype: torch.dtype) -> int:
    return _MIN_WIDTH if dtype == torch.float32 else 1


def split(length: int, width: int) -> Iterator[slice]:
    """Split a length into slices of a width."""
    return (slice(start, min(start + width, length)) for start in range(0, length, width))


def count_cores(x: Tensor) -> int:
    """Return the number of CPU threads, or 1 on a GPU."""
    return 1 if x.is_cuda else torch.get_num_threads()


def shape_runs_per_core(xs: Sequence[Tensor]) -> Iterator[slice]:
    """Split xs into the `shape_runs` that are multiplied in one batched product.

    A run has one matrix per core if a block can hold `_COLUMNS` columns of each, and one otherwise.
    """
    cores = count_cores(xs[0])
    fits = cores * math.prod(xs[0].shape[:-1]) * _COLUMNS <= memory.BLOCK
    return shape_runs(xs, cores if fits else 1)


def shape_runs(xs: Sequence[Tensor], max_length: int) -> Iterator[slice]:
    """Split xs into runs of consecutive tensors with the same shape, up to a length."""
    start = 0
    while start < len(xs):
        stop = start + 1
        while stop < min(start + max_length, len(xs)) and xs[stop].shape == xs[start].shape:
            stop += 1
        yield slice(start, stop)
        start = stop


def block_buffer(xs: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Allocate a buffer that holds a block of any run of `shape_runs_per_core`.

    It is reused for all blocks, since allocating one costs as much as centring it.
    """
    size = 0
    for run in (xs[index] for index in shape_runs_per_core(xs)):
        rows = len(run) * math.prod(run[0].shape[:-1])
        size = max(size, min(rows * run[0].shape[-1], max(memory.BLOCK, rows * _min_width(dtype))))
    return memory.empty_buffer(xs[0], size, dtype=dtype)


def add_product(packed: Panels, c: Tensor, first: bool) -> None:
    """Add c cᵀ, for c (…, n, k), to packed matrices in place, or overwrite them if first.

    If c is float32, so are the products; they are summed in float64 after every `SHORT` of them.
    """
    n, k = c.shape[-2:]
    c = c.reshape(-1, n, k) if c.numel() > n * k else c.reshape(n, k)
    if c.dtype == torch.float32:
        _add_float32_product(packed, c, first)
        return
    beta = 0 if first else 1
    if c.ndim == 3:
        for columns, panel in packed:
            panel.flatten(0, -3).baddbmm_(c[:, columns.start :], c[:, columns].mT, beta=beta)
        return
    for columns, panel in packed:
        out, a, b = panel.view(panel.shape[-2:]), c[columns.start :], c[columns]
        if n > _FEW:
            out.addmm_(a, b.mT, beta=beta)
        elif first:
            out.copy_(multiply(a, b))
        else:
            out.add_(multiply(a, b))


def _add_float32_product(packed: Panels, c: Tensor, first: bool) -> None:
    for run in split(c.shape[-1], SHORT):
        short = c[..., run]
        for columns, panel in packed:
            product = (short[..., columns.start :, :] @ short[..., columns, :].mT).view(panel.shape)
            if first and run.start == 0:
                panel.copy_(product)
            else:
                panel.add_(product)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ for a (…, n, k) and b (…, m, k).

    If both have few but long rows, each core sums its own part of k.
    """
    k = a.shape[-1]
    parts = 1 if a.ndim > 2 else min(count_cores(a), k // _LONG)
    if parts < 2 or max(len(a), len(b)) > _FEW:
        return a @ b.mT
    end = k - k % parts
    u, v = (z[:, :end].unflatten(1, (parts, -1)).transpose(0, 1) for z in (a, b))
    return (u @ v.mT).sum(0).addmm_(a[:, end:], b[:, end:].mT)


def product(c: Tensor, starts: Sequence[int]) -> Panels:
    """Return c cᵀ (…, n, n), for c (…, n, k), packed and in the dtype of c.

    A panel begins at each of ``starts``. If c is float32, k is at most `SHORT`.
    """
    n = c.shape[-2]
    spans = [
        span
        for start, stop in zip(starts, [*starts[1:], n], strict=True)
        for span in _spans(start, stop, max(PANEL, -(-(stop - start) // _FEW_PANELS)))
    ]
    if c.dtype == torch.float32:
        return [(columns, c[..., columns.start :, :] @ c[..., columns, :].mT) for columns in spans]
    packed = _allocate(c, spans, n, c.shape[:-2])
    add_product(packed, c, first=True)
    return packed


def add(packed: Panels, more: Panels) -> Panels:
    """Return the sum of packed matrices in float64."""
    pairs = zip(packed, more, strict=True)
    return [(columns, panel.double().add_(other)) for (columns, panel), (_, other) in pairs]


def scale_for_inner(packed: Panels) -> None:
    """Scale the diagonal blocks by √½ in place.

    The products of all entries then sum to half of the inner product of the full matrices.
    """
    for _, panel in packed:
        panel[..., : panel.shape[-1], :].mul_(_SQRT_HALF)


def copy_for_inner(packed: Panels, out: Panels) -> None:
    """Copy packed matrices and scale the copies as `scale_for_inner` does."""
    for (_, panel), (_, target) in zip(packed, out, strict=True):
        width = panel.shape[-1]
        torch.mul(panel[..., :width, :], _SQRT_HALF, out=target[..., :width, :])
        if width < panel.shape[-2]:
            target[..., width:, :].copy_(panel[..., width:, :])


def sum_squares(a: Tensor) -> Tensor:
    """Return the sums of the squares of the rows of a (…, k), (…), float64, without a copy of a."""
    return torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64).square_()


def diagonal(packed: Panels) -> Tensor:
    """Return the diagonals (…, n)."""
    return torch.cat([panel.diagonal(dim1=-2, dim2=-1) for _, panel in packed], -1)


def traces(packed: Panels) -> Tensor:
    """Return the traces (…)."""
    first, *others = (panel.diagonal(dim1=-2, dim2=-1).sum(-1) for _, panel in packed)
    return sum(others, first)
