"""Comparisons of RDMs: many of them with a few models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import memory

# Elements of the RDMs that are compared together: 512 KiB of float64, which stays in a cache.
_CPU_BLOCK, _GPU_BLOCK = 2**16, memory.BLOCK
# Below twice this length, the pairs of a run are compared one by one; longer runs are halved.
_SHORT_RUN = 8


def compare_rdms(a: Tensor, b: Tensor, *, method: str) -> Tensor:
    shape = a.shape[:-1] + b.shape[:-1]
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    # What is computed once should belong to the smaller side.
    swap = len(a) < len(b)
    similarity = RdmComparer(a, method)(b).mT if swap else RdmComparer(b, method)(a)
    return similarity.reshape(shape)


class RdmComparer:
    """Compares RDMs with models; what depends on the models alone is computed once."""

    def __init__(self, models: Tensor, method: str) -> None:
        """``models`` are condensed RDMs (M, N); the methods are those of `compare_rdms`."""
        self._method = method
        self._n_models = len(models)
        models = models.double().contiguous()
        if method == "kendall":
            self._ranks = _rank_from_below(models)
        else:
            self._vectors, self._energies = _embed(models, method)

    def __call__(self, rdms: Tensor) -> Tensor:
        """Compare RDMs (B, N) with the models; return float64 (B, M).

        A similarity is NaN where it is undefined, or where a value is not finite.
        """
        n_rdms, n_pairs = rdms.shape
        out = memory.empty_buffer(rdms, n_rdms, self._n_models, dtype=torch.float64)
        rows = max(1, (_GPU_BLOCK if rdms.is_cuda else _CPU_BLOCK) // n_pairs)
        for block, similarities in zip(rdms.split(rows), out.split(rows), strict=True):
            compare = self._correlate_signs if self._method == "kendall" else self._correlate
            compare(block.double().contiguous(), similarities)
        return out

    def _correlate(self, rdms: Tensor, out: Tensor) -> None:
        """Write the cosines of the vectors that represent RDMs and models."""
        vectors, energies = _embed(rdms, self._method)
        torch.mm(vectors, self._vectors.mT, out=out)
        out.div_((energies[:, None] * self._energies).sqrt_()).clamp_(-1, 1)

    def _correlate_signs(self, rdms: Tensor, out: Tensor) -> None:
        """Write Kendall's τ-a."""
        n_pairs = rdms.shape[1]
        ranks = _rank_from_below(rdms)
        for i, model in enumerate(zip(*self._ranks, strict=True)):
            out[:, i] = _subtract_discordant(_Ranks(*model), ranks)
        out.div_(n_pairs * (n_pairs - 1) / 2)


def _embed(rdms: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Represent RDMs (B, N) by vectors whose cosines compare them; return these and their energies.

    The energies (B,) are squared norms, and NaN or 0 where no comparison is defined.
    """
    if method in ("spearman", "rho-a"):
        vectors, energies = _centre_ranks(rdms)
        if method == "rho-a":  # the energy of ranks without ties; NaN stays
            n = rdms.shape[1]
            energies = energies * 0 + n * (n**2 - 1) / 12
        return vectors, energies
    # Scaled, so that squares neither overflow nor underflow.
    if method == "pearson":
        low, high = rdms.aminmax(dim=1, keepdim=True)
        vectors = (rdms - low).div_(high - low)
        vectors -= vectors.mean(1, keepdim=True)
    else:
        vectors = rdms / rdms.abs().amax(1, keepdim=True)
        if method == "whitened":
            vectors = _centre_twice(vectors)
    return vectors, vectors.square().sum(1)


def _centre_twice(rdms: Tensor) -> Tensor:
    """Subtract the means of rows and columns of the matrices of RDMs; return them as (B, n²)."""
    n = round((1 + math.sqrt(1 + 8 * rdms.shape[1])) / 2)
    rows, columns = torch.triu_indices(n, n, 1, device=rdms.device)
    places = torch.full((n, n), rdms.shape[1], device=rdms.device)
    places[rows, columns] = places[columns, rows] = torch.arange(rdms.shape[1], device=rdms.device)
    padded = torch.nn.functional.pad(rdms, (0, 1))  # a zero for the diagonal
    matrices = padded.index_select(1, places.flatten()).view(-1, n, n)
    means = matrices.mean(1)
    matrices -= means[:, :, None]
    matrices -= means[:, None, :]
    matrices += means.mean(1)[:, None, None]
    return matrices.view(len(rdms), -1)


class _Sorted(NamedTuple):
    """The values of RDMs in ascending order."""

    order: Tensor  # (B, N) that sorts the values
    differs: Tensor  # (B, N - 1) whether a value differs from the one before it
    poison: Tensor  # (B,) NaN if a value of the RDM is not finite, otherwise 0


def _sort_values(rdms: Tensor) -> _Sorted:
    """Sort the values of each RDM (B, N)."""
    # NumPy sorts with vector instructions.
    order = rdms.argsort(1) if rdms.is_cuda else torch.from_numpy(rdms.numpy().argsort(1))
    values = rdms.gather(1, order)
    poison = (values[:, 0] + values[:, -1]) * 0  # NaN and infinity are sorted to the ends
    return _Sorted(order, values[:, 1:] != values[:, :-1], poison)


def _find_first(differs: Tensor) -> Tensor:
    """Return for each of N ascending values the position of the first one that it equals, (B, N).

    ``differs`` (B, N - 1) says whether a value differs from the one before it.
    """
    n_rows, n = len(differs), differs.shape[1] + 1
    positions = torch.arange(n, dtype=torch.int32, device=differs.device)
    starts = positions.new_zeros(n_rows, n)
    torch.mul(differs, positions[1:], out=starts[:, 1:])
    if starts.is_cuda:
        return starts.cummax(1).values
    return torch.from_numpy(np.maximum.accumulate(starts.numpy(), 1))


def _centre_ranks(rdms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred ranks of the values of RDMs, ties at the mean rank, and their energies."""
    order, differs, poison = _sort_values(rdms)
    n = rdms.shape[1]
    ascending = torch.arange(n, dtype=torch.float64, device=rdms.device).sub_((n - 1) / 2)
    ascending = ascending.repeat(len(rdms), 1)
    # On a GPU, to ask which rows have ties takes longer than to treat all as if they had.
    rows: Any = slice(None) if rdms.is_cuda else ~differs.all(1)
    tied = differs[rows]
    # Twice the rank is the first position in ascending order less that in descending order.
    ascending[rows] = (_find_first(tied) - _find_first(tied.flip(1)).flip(1)).double() / 2
    ranks = torch.empty_like(rdms).scatter_(1, order, ascending)
    return ranks, ranks.square().sum(1).add_(poison)


class _Ranks(NamedTuple):
    """Ranks of the values of RDMs, for Kendall's τ-a."""

    lowest: Tensor  # (B, N) integers: the number of smaller values
    n_tied: Tensor  # (B,) float64: pairs of equal values; NaN if a value is not finite


def _rank_from_below(rdms: Tensor) -> _Ranks:
    """Rank the values of RDMs (B, N) for Kendall's τ-a."""
    order, differs, poison = _sort_values(rdms)
    n, first = rdms.shape[1], _find_first(differs)
    n_tied = n * (n - 1) / 2 - first.sum(1, dtype=torch.float64)
    # Two ranks are packed into one key, and int32 is sorted twice as fast as int64.
    dtype = torch.int32 if _count_bits(n) * 2 < 31 else torch.int64
    lowest = torch.empty_like(rdms, dtype=dtype).scatter_(1, order, first.to(dtype))
    return _Ranks(lowest, n_tied + poison)


def _count_bits(n: int) -> int:
    """Return how many bits hold the ranks 0 … n - 1 and one more number, n."""
    return n.bit_length()


def _subtract_discordant(model: _Ranks, rdms: _Ranks) -> Tensor:
    """Return the number of concordant less that of discordant pairs of one model and B RDMs, (B,).

    Sorted by the ranks of the model, and where those tie by its own, an RDM has as many inversions
    as there are discordant pairs.
    """
    n = len(model.lowest)
    bits = _count_bits(n)
    keys = _sort_rows(torch.bitwise_left_shift(model.lowest, bits) | rdms.lowest)
    n_both = _count_equal(keys)
    discordant = _count_inversions(keys & (2**bits - 1))
    n_untied = n * (n - 1) / 2 - model.n_tied - rdms.n_tied + n_both
    return n_untied - 2 * discordant


def _sort_rows(keys: Tensor) -> Tensor:
    if keys.is_cuda:
        return keys.sort(1).values
    return torch.from_numpy(np.sort(keys.numpy(), 1))


def _count_equal(keys: Tensor) -> Tensor:
    """Return the number of pairs of equal entries of each ascending row, (B,) float64."""
    n = keys.shape[1]
    first = _find_first(keys[:, 1:] != keys[:, :-1])
    return n * (n - 1) / 2 - first.sum(1, dtype=torch.float64)


def _count_inversions(ranks: Tensor) -> Tensor:
    """Return the number of pairs of each row (B, N) where the earlier is larger, (B,) float64.

    Runs are compared with the next run of their length: sorted together, the sum of the positions
    of the second run's members gives the number of pairs in order (Mann and Whitney's statistic).
    """
    n_rows, n = ranks.shape
    n_halvings = max(0, (n // _SHORT_RUN).bit_length() - 1)
    length = -(-n // 2**n_halvings)
    # Padding behind the row is larger than all ranks, and so in order.
    ranks = torch.nn.functional.pad(ranks, (0, length * 2**n_halvings - n), value=n)
    inversions = _count_within_runs(ranks, length)
    positions = torch.arange(ranks.shape[1], dtype=torch.float64, device=ranks.device)
    while length < ranks.shape[1]:
        keys = (ranks * 2).view(n_rows, -1, 2, length)
        keys[:, :, 1] += 1
        keys = _sort_rows(keys.view(-1, 2 * length))
        in_order = (keys & 1).view(n_rows, -1).double() @ (positions % (2 * length))
        n_runs = ranks.shape[1] // (2 * length)
        inversions += n_runs * (length**2 + length * (length - 1) / 2) - in_order
        ranks, length = (keys >> 1).view(n_rows, -1), 2 * length
    return inversions


def _count_within_runs(ranks: Tensor, length: int) -> Tensor:
    """Return the inversions within runs of at most 16 values, (B,) float64, pair by pair."""
    columns = ranks.view(-1, length).mT.contiguous()
    count = torch.zeros_like(columns[0], dtype=torch.uint8)
    for i in range(length - 1):
        for later in columns[i + 1 :]:
            count += columns[i] > later
    return count.view(len(ranks), -1).sum(1).double()
