"""RDMs of many overlapping sets of neurons, such as the spheres of a searchlight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repsim_kernels._cell_sets import SparseCells
from repsim_kernels._noise import Noise
from repsim_kernels.kernels.torch import memory
from repsim_kernels.kernels.torch.distances import CLOSE
from repsim_kernels.kernels.torch.noise import make_whitener
from repsim_kernels.kernels.torch.rdm import average_rows
from repsim_kernels.kernels.torch.rdm_comparison import RdmComparer

# Elements of the patterns that are gathered together: 4 MiB of float64, which stay in a cache.
_CPU_BATCH, _GPU_BATCH = 2**19, 2**26


def searchlight(
    x: Tensor,
    *,
    neighbours: SparseCells,
    distance: str,
    groups: Any,
    noise: Noise | None,
    scale: float,
    models: Tensor | None,
    method: str,
    compute: Callable[..., Tensor],
) -> Tensor:
    """Return RDMs (C, N), float32, or their similarities to models, (C, M), float64.

    Patterns are multiplied by ``scale`` first.
    NaN where a distance or a comparison is undefined. ``compute`` is `searchlight_rdms` of the
    backend in use.
    """
    indices = torch.from_numpy(neighbours.indices).to(x.device, torch.int64)
    indptr = torch.from_numpy(neighbours.indptr).to(x.device)
    indptr = indptr - indptr[:1]
    neurons, positions = _find_neurons(indices, x.shape[1])
    slabs = _make_slabs(x, neurons, groups, distance)
    if scale != 1:
        slabs.mul_(scale)
    if noise is not None and noise.variances is not None:
        slabs.div_(noise.variances[neurons].sqrt()[:, None, None])
        noise = None
    if distance == "mahalanobis":
        distance = "euclidean"
    if noise is None:
        rdms = compute(slabs, indptr, positions[indices], distance=distance)
    else:
        rdms = _compute_rdms(slabs, indptr, positions[indices], distance, noise, indices)
    return rdms if models is None else RdmComparer(models, method)(rdms)


def searchlight_rdms(slabs: Tensor, indptr: Tensor, indices: Tensor, *, distance: str) -> Tensor:
    """Return the RDMs of spheres, (C, n(n - 1)/2) float32, in the order of SciPy's ``pdist``.

    ``slabs`` (p, K, n) has n patterns in K folds, float64; the neurons of sphere c are
    ``indices[indptr[c] : indptr[c + 1]]``. NaN for an empty sphere, and for the correlation or
    cosine distance of a pattern that has no direction there.
    """
    return _compute_rdms(slabs, indptr, indices, distance)


def _find_neurons(indices: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return which neurons there are among indices below p, sorted, and where each of p is."""
    used = torch.zeros(p, dtype=torch.bool, device=indices.device).index_fill_(0, indices, True)
    neurons = used.nonzero()[:, 0]
    return neurons, used.cumsum(0) - 1


def _make_slabs(x: Tensor, neurons: Tensor, groups: Any, distance: str) -> Tensor:
    """Return the patterns of some neurons of x (n, p), neuron-major (w, K, n_cond), float64.

    For distances that are made of differences, each fold is relative to the pattern with the median
    norm, so that a common offset costs no digits; integers stay integers.
    """
    patterns = _average(x.index_select(1, neurons), groups)
    n_folds, n_conditions, width = patterns.shape
    slabs = memory.empty_buffer(x, width, n_folds, n_conditions, dtype=torch.float64)
    slabs.flatten(1).copy_(patterns.reshape(n_folds * n_conditions, width).mT)
    if distance not in ("correlation", "cosine"):
        norms = torch.linalg.vector_norm(patterns, dim=2, dtype=torch.float64)
        folds = torch.arange(n_folds, device=x.device)
        slabs -= slabs[:, folds, norms.median(1).indices][:, :, None]
    return slabs


def _average(x: Tensor, groups: Any) -> Tensor:
    """Return the means (K, n_cond, p) of groups (K, n_cond, n) of the rows of x (n, p)."""
    if groups is None:
        return x[None]
    if (groups.sum(2) == 1).all():  # every pattern is one of the rows
        rows = torch.from_numpy(groups.argmax(2)).to(x.device)
        return x[rows]
    return average_rows(x, groups)


def _compute_rdms(
    slabs: Tensor,
    indptr: Tensor,
    indices: Tensor,
    distance: str,
    noise: Noise | None = None,
    neurons: Tensor | None = None,
) -> Tensor:
    """Compute `searchlight_rdms`, of patterns that are whitened by the noise of each sphere.

    ``neurons`` are the indices of the spheres' neurons in the noise, as ``indices`` are in slabs.
    """
    _, n_folds, n = slabs.shape
    out = slabs.new_empty(len(indptr) - 1, n * (n - 1) // 2, dtype=torch.float32)
    rows_per_neuron = n_folds * n
    if noise is not None and noise.residuals is not None:
        rows_per_neuron += noise.residuals.shape[0]
    # Sums over folds are gathered, which is faster than to add gathered folds.
    totals = slabs.sum(1) if distance == "crossnobis" and noise is None else None
    for spheres, size in _iter_batches(indptr, rows_per_neuron, noise is not None):
        if size == 0:
            out[spheres] = torch.nan
            continue
        where: Any
        if isinstance(spheres, slice):  # all spheres are of this size
            where = slice(spheres.start * size, spheres.stop * size)
        else:
            where = indptr[spheres][:, None] + torch.arange(size, device=slabs.device)
        rows = indices[where].flatten()
        patterns = _Patterns(
            slabs.flatten(1).index_select(0, rows).view(-1, size, n_folds, n),
            None if totals is None else totals.index_select(0, rows).view(-1, size, n),
            None
            if noise is None or neurons is None
            else noise.select(neurons[where].view(-1, size)),
        )
        out[spheres] = _compute_batch(patterns, distance).float()
    return out


def _iter_batches(
    indptr: Tensor, rows_per_neuron: int, is_whitened: bool
) -> Iterator[tuple[Tensor | slice, int]]:
    """Yield spheres of equal size, and that size, in batches that fit a cache."""
    capacity = _GPU_BATCH if indptr.is_cuda else _CPU_BATCH
    sizes, order = indptr.diff().sort(stable=True)
    values, counts = (t.tolist() for t in sizes.unique_consecutive(return_counts=True))
    for size, spheres in zip(values, order.split(counts), strict=True):
        elements = size * (rows_per_neuron + size * is_whitened)
        step = max(1, capacity // max(1, elements))
        for start in range(0, len(spheres), step):
            batch = slice(start, min(start + step, len(spheres)))
            yield batch if len(values) == 1 else spheres[batch], size


@dataclass(frozen=True)
class _Patterns:
    """Patterns of B spheres of k neurons, and the noise of each sphere."""

    z: Tensor  # (B, k, K, n)
    total: Tensor | None  # (B, k, n) their sum over K folds, if it is needed and there is no noise
    noise: Noise | None

    def multiply(self) -> tuple[Tensor, Tensor]:
        """Return the Grams (B, n, n) of whitened patterns: summed over folds, and of the sum."""
        white = self.z if self.noise is None else _whiten(self.z, self.noise)
        n_spheres, _, n_folds, n = white.shape
        gram = _multiply(white.reshape(n_spheres, -1, n))
        if n_folds == 1:
            return gram, gram
        return gram, _multiply(white.sum(2) if self.total is None else self.total)

    def subtract(self, spheres: Tensor, i: Tensor, j: Tensor, scale: Tensor | None) -> Tensor:
        """Return whitened differences (M, k, K) of patterns i and j (M,) of some spheres (M,).

        ``scale`` (B, n) multiplies the patterns first, if given. Equal ones leave exact zeros.
        """
        a, b = self.z[spheres, :, :, i], self.z[spheres, :, :, j]
        if scale is not None:
            a, b = (z * scale[spheres, rows][:, None, None] for z, rows in ((a, i), (b, j)))
        if self.noise is None:
            return a - b
        fields = self.noise._asdict()
        selected: dict[str, Any] = {
            name: v[spheres] for name, v in fields.items() if isinstance(v, Tensor)
        }
        return _whiten((a - b)[..., None], self.noise._replace(**selected))[..., 0]


def _whiten(z: Tensor, noise: Noise) -> Tensor:
    """Whiten patterns (B, k, K, n) by the noise of each sphere."""
    n_spheres, k, n_folds, n = z.shape
    white = make_whitener(noise)(z.reshape(n_spheres, k, -1).mT)
    return white.mT.reshape(n_spheres, k, n_folds, n)


def _compute_batch(patterns: _Patterns, distance: str) -> Tensor:
    """Return the RDMs (B, N) of spheres of equal size, float64."""
    _, k, n_folds, n = patterns.z.shape
    i, j = torch.triu_indices(n, n, 1, device=patterns.z.device)
    if distance in ("correlation", "cosine"):
        return _compute_angles(patterns, distance == "correlation", i, j)
    gram, products = patterns.multiply()
    energy = gram.diagonal(dim1=1, dim2=2)
    scale, is_crossed = energy, distance == "crossnobis"
    if is_crossed:
        scale = energy + products.diagonal(dim1=1, dim2=2)
        gram = products.sub_(gram)
        energy = gram.diagonal(dim1=1, dim2=2)
    d = _add_pairs(energy, i, j).sub_(_take_pairs(gram, i, j), alpha=2)
    for spheres, pairs in _iter_cancelled(d.abs() if is_crossed else d, scale, i, j, patterns.z):
        difference = patterns.subtract(spheres, i[pairs], j[pairs], None)
        squared = difference.square().sum((1, 2))
        if is_crossed:
            squared = difference.sum(2).square().sum(1) - squared
        d[spheres, pairs] = squared
    if is_crossed:
        return d.div_(n_folds * (n_folds - 1) * k)
    return d.sqrt_() if distance == "euclidean" else d


def _compute_angles(patterns: _Patterns, is_centred: bool, i: Tensor, j: Tensor) -> Tensor:
    """Return 1 - cosine of pairs i, j of patterns, whose own means are subtracted if centred."""
    z = patterns.z
    if is_centred:
        z = z - z[:, :1]  # what is left of a constant pattern is exactly zero
        z -= z.mean(1, keepdim=True)
        patterns = _Patterns(z, None, None)
    gram = _multiply(z[:, :, 0])
    inverse = gram.diagonal(dim1=1, dim2=2).rsqrt()
    d = _take_pairs(gram, i, j)
    d.mul_(_take(inverse, i)).mul_(_take(inverse, j)).neg_().add_(1)
    for spheres, pairs in _iter_close(d <= CLOSE, z):
        difference = patterns.subtract(spheres, i[pairs], j[pairs], inverse)
        d[spheres, pairs] = difference.square().sum((1, 2)) / 2
    return d


def _multiply(rows: Tensor) -> Tensor:
    """Return the Grams (B, n, n) of patterns (B, m, n)."""
    return torch.bmm(rows.mT, rows)


def _take_pairs(matrices: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return entries i, j of matrices (B, n, n), (B, N)."""
    return _take(matrices.flatten(1), i * matrices.shape[1] + j)


def _add_pairs(values: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return the sums of values i and j (B, n), (B, N)."""
    return _take(values, i).add_(_take(values, j))


def _take(values: Tensor, columns: Tensor) -> Tensor:
    """Return some columns of values (B, n), four times as fast as index_select."""
    return values.gather(1, columns.expand(len(values), -1))


def _iter_cancelled(
    d: Tensor, scale: Tensor, i: Tensor, j: Tensor, z: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what `_iter_close` does, of pairs whose distances d (B, N) lost most digits.

    ``scale`` (B, n) has the sizes of the patterns that cancel.
    """
    # A bound for all pairs of a sphere is rarely exceeded, and costs less than one for each.
    if bool((d.amin(1) <= 2 * CLOSE * scale.amax(1)).any()):
        energies = _add_pairs(scale, i, j)
        yield from _iter_close((d <= CLOSE * energies) & (energies > 0), z)


def _iter_close(close: Tensor, z: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the spheres and the pairs of close distances (B, N), in small batches."""
    if bool(close.any()):  # rarely, and faster than `nonzero`
        yield from (
            batch.unbind(1)
            for batch in close.nonzero().split(max(1, _CPU_BATCH // z[0, :, :, 0].numel()))
        )
