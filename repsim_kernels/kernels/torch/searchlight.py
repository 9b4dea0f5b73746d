"""RDMs of many overlapping sets of neurons, in batches of sets of equal size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from repsim_kernels._cell_sets import SparseCells
from repsim_kernels.kernels.torch import memory
from repsim_kernels.kernels.torch.distances import CLOSE

_BATCH = 2**20  # elements of patterns that are gathered together: 8 MiB


def searchlight(
    x: Tensor,
    *,
    neighbours: SparseCells,
    distance: str,
    averages: Tensor | None,
    compute: Callable[..., Tensor],
) -> Tensor:
    """Return the RDM of each sphere, float32 (C, n(n - 1)/2); NaN where it is not defined."""
    indices = torch.from_numpy(neighbours.indices).to(x.device, torch.int64)
    offsets = torch.from_numpy(neighbours.indptr)
    inside = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    inside.index_fill_(0, indices, True)
    neurons = inside.nonzero()[:, 0]
    position = torch.empty(x.shape[1], dtype=torch.int64, device=x.device)
    position[neurons] = torch.arange(len(neurons), device=x.device)
    slabs = make_slabs(x, neurons, averages, distance)
    _, n_folds, n = slabs.shape
    rows = memory.empty_buffer(x, len(neighbours), n * (n - 1) // 2, dtype=torch.float32)
    for ids, size in iter_batches(offsets, _BATCH // (n_folds * n)):
        if size == 0:
            rows[ids] = torch.nan
            continue
        members = (offsets[ids][:, None] + torch.arange(size)).to(x.device)
        rows[ids.to(x.device)] = compute(
            slabs, position[indices[members]], distance=distance
        ).float()
    return rows


def make_slabs(x: Tensor, neurons: Tensor, averages: Tensor | None, distance: str) -> Tensor:
    z = x.index_select(1, neurons)
    if averages is None:
        z = z.double()[None]
    else:
        n_folds, n_conditions, _ = averages.shape
        rows = averages.argmax(2).flatten()
        single = bool(((averages != 0).sum(2) == 1).all() and (averages.amax(2) == 1).all())
        if single:
            z = z.index_select(0, rows).view(n_folds, n_conditions, -1)
        else:
            z = averages @ z.double()
    n_folds, n, w = z.shape
    out = memory.empty_buffer(x, w, n_folds, n, dtype=torch.float64)
    out.view(w, -1).copy_(z.reshape(-1, w).mT)
    if distance not in ("correlation", "cosine"):
        norms = torch.linalg.vector_norm(z, dim=2, dtype=torch.float64)
        central = norms.median(1).indices
        out -= torch.stack([out[:, f, r] for f, r in enumerate(central.tolist())], 1)[:, :, None]
    return out


def iter_batches(offsets: Tensor, capacity: int) -> Iterator[tuple[Tensor, int]]:
    sizes, order = offsets.diff().sort(stable=True)
    values, counts = sizes.unique_consecutive(return_counts=True)
    for size, ids in zip(values.tolist(), order.split(counts.tolist()), strict=True):
        for batch in ids.split(max(1, capacity // max(size, 1))):
            yield batch, size


def searchlight_rdms(slabs: Tensor, neurons: Tensor, *, distance: str) -> Tensor:
    _, n_folds, n = slabs.shape
    b, k = neurons.shape
    z = slabs.view(len(slabs), -1).index_select(0, neurons.flatten())
    return compute_rdms(z.view(b, k, n_folds, n), distance)


def compute_rdms(z: Tensor, distance: str) -> Tensor:
    b, k, n_folds, n = z.shape
    i, j = torch.triu_indices(n, n, 1, device=z.device)
    if distance == "correlation":
        z = z - z[:, :1]
        z -= z.mean(1, keepdim=True)
    rows = z.view(b, -1, n)
    gram = torch.bmm(rows.mT, rows)
    energy = gram.diagonal(dim1=1, dim2=2)
    if distance == "crossnobis":
        total = z.sum(2)
        gram_sum = torch.bmm(total.mT, total)
        scale = energy + gram_sum.diagonal(dim1=1, dim2=2)
        gram = gram_sum.sub_(gram)
        energy = gram.diagonal(dim1=1, dim2=2)
    else:
        scale = energy
    d = gram.view(b, n * n).index_select(1, i * n + j)
    if distance in ("correlation", "cosine"):
        inverse = energy.rsqrt()
        d.mul_(inverse.index_select(1, i)).mul_(inverse.index_select(1, j)).neg_().add_(1)
        scale = torch.ones_like(energy) / 2
    else:
        sums = energy.index_select(1, i).add_(energy.index_select(1, j))
        d = torch.sub(sums, d, alpha=2)
    energies = scale.index_select(1, i).add_(scale.index_select(1, j))
    close = d.abs() <= energies.mul_(CLOSE)
    if bool(close.any()):
        pass
    if distance == "euclidean":
        d.sqrt_()
    elif distance == "crossnobis":
        d /= n_folds * (n_folds - 1) * k
    return d
