"""Centring, Gram matrices, and the vectors and traces taken from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from repsim_kernels._cell_sets import Cells, SparseCells, are_partitions
from repsim_kernels.kernels.torch import columns, distances, memory, panels

# Elements of a batch of Grams: on a CPU it fits the cache, on a GPU it fills the device.
_BATCH, _LARGE_BATCH = 2**18, 2**24
# Elements of x that a GPU looks at together.
_GPU_BLOCK = 2**27


def centre(x: Tensor) -> Tensor:
    """Subtract the mean over stimuli from x (…, n, p), in float64.

    Constant columns become exactly zero.
    """
    c = memory.empty_buffer(x, *x.shape, dtype=torch.float64)
    centre_into([c], [x], c, for_products=False)
    return c


def centre_into(
    targets: Sequence[Tensor], xs: Sequence[Tensor], buffer: Tensor, for_products: bool
) -> None:
    """Centre every x (…, n, p_i) into its target, all of them parts of a float64 buffer.

    ``for_products`` allows the faster centring of `_centre_inplace`.
    """
    for x, target in zip(xs, targets, strict=True):
        target.copy_(x)
    _centre_inplace(buffer, for_products and below_float64(xs))


def _centre_float32(x: Tensor, out: Tensor) -> Tensor:
    """Subtract the mean over stimuli from x (…, n, p), in float32, into ``out``.

    Returns the means (…, 1, p). Their rounding enters inner products of centred Grams squared,
    which matters only if they are far larger than the spread of the features.
    """
    x = x.float()
    mean = x.mean(-2, keepdim=True)
    torch.sub(x, mean, out=out)
    return mean


def _centre_inplace(c: Tensor, for_products: bool) -> Tensor:
    """Centre c (…, n, p) in place and return its means (…, 1, p).

    ``for_products`` skips a pass over c. It requires values of at most 24 significant bits, and
    that only inner products of the centred matrix are used: the sum of a constant column is then
    exact, and elsewhere the rounding of the mean, 1e-16 of it, enters the products squared.
    Otherwise means are taken of the differences from the first stimulus.
    """
    first = None if for_products else c[..., :1, :].clone()
    if first is not None:
        c.sub_(first)
    n = c.shape[-2]
    row_major = c.stride(-1) < c.stride(-2)
    mean = c.new_ones(1, n) @ c if row_major else c.sum(-2, keepdim=True)
    mean.div_(mean.new_full((), n))  # CUDA would turn division by a number into multiplication
    c.sub_(mean)
    return mean if first is None else mean.add_(first)


def below_float64(xs: Sequence[Tensor]) -> bool:
    """Return whether no tensor is float64."""
    return all(x.dtype != torch.float64 for x in xs)


def iter_batches(items: list[int], gram: Tensor) -> Iterator[list[int]]:
    """Split items into batches whose Grams, each the size of ``gram``, suit the device."""
    size = max(1, (_BATCH if gram.device.type == "cpu" else _LARGE_BATCH) // gram.numel())
    for start in range(0, len(items), size):
        yield items[start : start + size]


def linear(x: Tensor) -> Tensor:
    """Return the Gram matrix of the centred x: (…, n, p) to (…, n, n), float64."""
    packed = panels.empty_panels(x, x.shape[-2], *x.shape[:-2])
    gram_into(packed, [x], panels.block_buffer([x]))
    return panels.unpack(packed)


def gram_into(packed: panels.Panels, xs: Sequence[Tensor], buffer: Tensor) -> Tensor | None:
    """Write the Gram matrices of the centred xs, all (…, n, p), into packed matrices.

    ``buffer`` comes from `panels.block_buffer`; its dtype is that of the products. Multiplying one
    matrix on each core takes a tenth less time than multiplying one after the other on all cores.
    Returns the sums of squares of the means, (L, …), for a float32 buffer.
    """
    lead, p = (len(xs), *xs[0].shape[:-1]), xs[0].shape[-1]
    means = []
    if not p:
        for _, panel in packed:
            panel.zero_()
    for run in panels.split_neurons(p, math.prod(lead), buffer.dtype):
        c = buffer[: math.prod(lead) * (run.stop - run.start)].view(*lead, -1)
        blocks = [x[..., run] for x in xs]
        if c.dtype == torch.float32:
            pairs = zip(blocks, c, strict=True)
            means.append(torch.stack([_centre_float32(block, target) for block, target in pairs]))
        else:
            centre_into(list(c), blocks, c, for_products=True)
        panels.add_product(packed, c, first=run.start == 0)
    return panels.sum_squares(torch.cat(means, -1)[..., 0, :]) if means else None


def to_vectors(packed: panels.Panels, u_centred: bool, buffer: Tensor | None = None) -> Tensor:
    """Flatten packed matrices (B, n, n) to vectors (B, m) with half their inner products.

    ``u_centred`` applies `u_centre` first. The vectors are written to the first rows of ``buffer``
    (…, m) if there is one.
    """
    sizes = [math.prod(panel.shape[-2:]) for _, panel in packed]
    b = len(packed[0][1])
    if buffer is None:
        buffer = memory.empty_buffer(packed[0][1], b, sum(sizes), dtype=torch.float64)
    slots = zip(packed, buffer[:b].split(sizes, 1), strict=True)
    out = [(span, slot.view(panel.shape)) for (span, panel), slot in slots]
    if u_centred:
        u_centre(packed, out=out)
        panels.scale_for_inner(out)
    else:
        panels.copy_for_inner(packed, out)
    return buffer[:b]


def u_centre(packed: panels.Panels, out: panels.Panels) -> Tensor:
    """U-centre the packed Grams of centred stimuli into ``out``, and return their traces.

    The rows of these Grams must sum to zero. The inner product of two U-centred Grams is n(n - 3)
    times HSIC₁.
    Source: Székely & Rizzo 2014 for the centring, Song et al. 2012 for HSIC₁.
    """
    d = panels.diagonal(packed)
    n = d.shape[-1]
    trace = d.sum(-1)
    row_shift = d / (n - 2)
    column_shift = row_shift - trace[..., None] / ((n - 2) * (n - 1))
    for (span, panel), (_, target) in zip(packed, out, strict=True):
        torch.add(panel, row_shift[..., span.start :, None], out=target)
        target += column_shift[..., None, span]
        target.diagonal(dim1=-2, dim2=-1).zero_()
    return trace


def double_centre(k: Tensor) -> Tensor:
    """Subtract the means of the rows and the columns of a kernel matrix (…, n, n)."""
    k = k - k.mean(-1, keepdim=True)
    return k.sub_(k.mean(-2, keepdim=True))


def centre_gram(g: Tensor) -> Tensor:
    """Return the Gram of centred stimuli from the Gram of stimuli relative to any one of them.

    The result is as symmetric as g (…, n, n).
    """
    mean = g.mean(-1)
    return g - (mean[..., :, None] + mean[..., None, :] - mean.mean(-1)[..., None, None])


def centered_gram(x: Tensor, *, kernel: str, sigma: float | None) -> Tensor:
    if kernel == "linear":
        return linear(x)
    assert sigma is not None
    return double_centre(distances.rbf_kernel(x, sigma))


def cell_grams(x: Tensor, *, cells: Cells, n_cells: int) -> Tensor:
    if are_partitions(cells):
        return torch.stack(
            [panels.unpack(cell_statistics(x, labels, n_cells)[0]) for labels in cells]
        )
    return panels.unpack(cell_statistics(x, cells, n_cells)[0])


def cell_statistics(
    x: Tensor, cells: Cells, n_cells: int, shifts: bool = False
) -> tuple[panels.Panels, Tensor, Tensor]:
    """Return each cell's Gram, number of varying neurons and shift, from one pass over x (n, p).

    The Grams (C, n, n) are packed. The counts (C,) leave out neurons that are constant over the
    stimuli. The shifts (C, n) are B_c μ_c, where B_c are the centred columns of a cell and μ_c
    their means, or zeros unless ``shifts``.
    """
    n = len(x)
    g = panels.empty_panels(x, n, n_cells, min_width=panels.TILE)
    unwritten = np.ones(n_cells, dtype=np.bool_)
    n_varying = torch.zeros(n_cells, dtype=torch.int64, device=x.device)
    shift = torch.zeros(n_cells, n, 1, dtype=torch.float64, device=x.device)
    for run, shape, c in columns.iter_cell_blocks(x, cells, n_cells):
        mean = _centre_inplace(c, below_float64([x]))
        constant = (c[0] == 0).nonzero()[:, 0]
        constant = constant[(c[:, constant] == 0).all(0)]
        n_varying[run] += shape[1] - torch.bincount(constant // shape[1], minlength=shape[0])
        by_cell = c.unflatten(1, shape).transpose(0, 1)
        target, first = panels.select(g, run), bool(unwritten[run].all())
        if not first:
            _zero(target, unwritten[run])
        panels.add_product(target, by_cell, first)
        unwritten[run] = False
        if shifts:
            shift[run].baddbmm_(by_cell, mean.view(*shape, 1))
    _zero(g, unwritten)
    return g, n_varying, shift[..., 0]


def count_varying(x: Tensor) -> Tensor:
    """Return the number of neurons of x (n, p) that vary over the stimuli."""
    n = len(x)
    # On a GPU a block for the cache would take longer to start than to read.
    width = _GPU_BLOCK // n if x.is_cuda else memory.BLOCK // n
    blocks = x.split(max(1, width), 1)
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    return sum(((block != block[:1]).any(0).sum() for block in blocks), zero)


def cell_counts_and_shifts(
    x: Tensor, cells: Cells, n_cells: int, shifts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `cell_statistics` returns next to the Grams, without computing these.

    These are the number of varying neurons of each cell (…, C) and of x, and the shifts (…, C, n),
    where … is T for partitions (T, p).
    """
    n, p = x.shape
    if isinstance(cells, SparseCells):
        return _sparse_counts_and_shifts(x, cells, shifts)
    labels = torch.from_numpy(cells).to(x.device)
    every_cell = torch.arange(n_cells, device=x.device)
    partitions = labels.shape[:-1] if cells.dtype != np.bool_ else ()
    n_varying = torch.zeros(*partitions, n_cells, dtype=torch.int64, device=x.device)
    n_total = torch.zeros((), dtype=torch.int64, device=x.device)
    shift = torch.zeros(*partitions, n_cells, n, dtype=torch.float64, device=x.device)
    rows = max(n, math.prod(n_varying.shape))  # of the largest matrix per neuron
    for block in panels.split_neurons(p, rows):
        member = labels[..., block]
        if cells.dtype != np.bool_:
            member = member[..., None, :] == every_cell[:, None]  # (…, C, neurons)
        varies = (x[:, block] != x[:1, block]).any(0)
        n_varying += (member & varies).sum(-1)
        n_total += varies.sum()
        if shifts:
            c = x[:, block].to(torch.float64, copy=True)
            mean = _centre_inplace(c, below_float64([x]))
            shift += member.to(torch.float64) @ c.mul_(mean).mT
    return n_varying, n_total, shift


def _sparse_counts_and_shifts(
    x: Tensor, cells: SparseCells, shifts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of `cell_counts_and_shifts` for sparse cells."""
    varies = (x != x[:1]).any(0)
    cell_of_each = np.repeat(np.arange(len(cells)), np.diff(cells.indptr))
    n_varying = torch.zeros(len(cells), dtype=torch.int64, device=x.device)
    n_varying.index_add_(
        0,
        torch.from_numpy(cell_of_each).to(x.device),
        varies[torch.from_numpy(cells.indices).to(x.device)].to(torch.int64),
    )
    shift = torch.zeros(len(cells), len(x), 1, dtype=torch.float64, device=x.device)
    if shifts:
        for run, shape, c in columns.iter_cell_blocks(x, cells, len(cells)):
            mean = _centre_inplace(c, below_float64([x]))
            shift[run].baddbmm_(c.unflatten(1, shape).transpose(0, 1), mean.view(*shape, 1))
    return n_varying, varies.sum(), shift[..., 0]


def _zero(packed: panels.Panels, mask: np.ndarray) -> None:
    """Set the masked matrices to zero in place."""
    if mask.any():
        for _, panel in packed:
            panel[torch.from_numpy(np.flatnonzero(mask)).to(panel.device)] = 0
