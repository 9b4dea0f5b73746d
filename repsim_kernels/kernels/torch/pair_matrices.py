"""Matrices of pairs of stimuli, of norm 1, whose inner products are similarities."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import cka, panels, rsa

# Elements of the matrices of several representations that are made together.
_TOGETHER = 2**21


def iter_kernels(
    xs: list[Tensor], debiased: bool, kernel: str, sigma: float | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield the centred kernel matrix (n, n) of each x; NaN for one that is only rounding.

    ``dtype`` is that of linear products.
    """
    n = len(xs[0])
    for run in panels.split(len(xs), max(1, _TOGETHER // n**2)):
        vectors, halves, _ = cka.kernel_vectors(xs[run], debiased, kernel, sigma, dtype)
        for vector, half in zip(vectors, halves.tolist(), strict=True):
            yield panels.unpack_vectors(vector, n).div_(math.sqrt(2 * half))


def iter_distances(xs: list[Tensor], distance: str, compare: str) -> Iterator[Tensor]:
    """Yield a matrix (n, n) of what `rsa` compares of each x: distances or ranks, centred.

    NaN where the comparison is undefined; the diagonal is zero.
    """
    n = len(xs[0])
    upper = torch.triu_indices(n, n, 1, device=xs[0].device)
    for run in panels.split(len(xs), max(1, _TOGETHER // n**2)):
        for unit in rsa.all_dissimilarities(xs[run], distance, compare):
            g = unit.new_zeros(n, n)
            g[upper[0], upper[1]] = unit * math.sqrt(0.5)
            yield g.add_(g.mT.clone())
