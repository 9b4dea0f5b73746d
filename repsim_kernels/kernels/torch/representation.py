"""A representation and its spectrum, in a basis of the complement of the vector of ones."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from repsim_kernels.kernels.torch import gram


def to_complement(a: Tensor) -> Tensor:
    """Return Qᵀa (…, n - 1, m) for a (…, n, m).

    Q is an orthonormal basis of the complement of the vector of ones.
    """
    n = a.shape[-2]
    first, rest = a[..., :1, :], a[..., 1:, :]
    # first / √n + Σ rest / (n + √n), times n + √n
    shift = torch.add(rest.sum(-2, keepdim=True), first, alpha=math.sqrt(n) + 1)
    return torch.sub(rest, shift, alpha=1 / (n + math.sqrt(n)))


def from_complement(a: Tensor) -> Tensor:
    """Return Q a (…, n, m), whose columns sum to zero, for a (…, n - 1, m)."""
    n = a.shape[-2] + 1
    total = a.sum(-2, keepdim=True)
    rest = torch.sub(a, total, alpha=1 / (n + math.sqrt(n)))
    return torch.cat([total * (-1 / math.sqrt(n)), rest], dim=-2)


def is_positive(w: Tensor, largest: Tensor, n: int) -> Tensor:
    """Return which eigenvalues (…, r) of a Gram of n stimuli count towards its rank.

    The largest are (…, 1).
    """
    return w > n * torch.finfo(torch.float64).eps * largest


def spectrum_of_gram(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors and eigenvalues of a Gram, as in `Representation.spectrum`."""
    # The rows and columns of g sum to zero, which reduces `to_complement` to one difference.
    shift = 1 / (1 + math.sqrt(g.shape[-1]))
    half = torch.sub(g[..., 1:, :], g[..., :1, :], alpha=shift)
    w, u = torch.linalg.eigh(torch.sub(half[..., 1:], half[..., :1], alpha=shift))
    return _zero_beyond_rank(u.flip(-1), w.flip(-1), g.shape[-1])


def _zero_beyond_rank(u: Tensor, w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Set descending eigenvalues w and eigenvectors u that do not count towards the rank to 0."""
    keep = is_positive(w, w[..., :1], n)
    return u * keep[..., None, :], w * keep


class Representation:
    """x (…, n, p) and the quantities that metrics derive from it, each computed once.

    `spectrum` and `factor` are in the n - 1 dimensions orthogonal to the vector of ones.
    """

    def __init__(self, x: Tensor, gram: Tensor | None = None) -> None:
        """``gram``: the Gram of x, if it has been computed already."""
        self.x, self._gram = x, gram

    @property
    def n(self) -> int:
        return self.x.shape[-2]

    @property
    def p(self) -> int:
        return self.x.shape[-1]

    @cached_property
    def centred(self) -> Tensor:
        return gram.centre(self.x)

    @cached_property
    def gram(self) -> Tensor:
        return gram.linear(self.x) if self._gram is None else self._gram

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (…, n - 1, r) and eigenvalues (…, r), descending; zero beyond the rank."""
        if self.p >= self.n:
            return spectrum_of_gram(self.gram)
        u, s, _ = torch.linalg.svd(to_complement(self.centred), full_matrices=False)
        return _zero_beyond_rank(u, s.square(), self.n)

    @cached_property
    def rank(self) -> Tensor:
        return (self.spectrum[1] > 0).sum(-1)

    @cached_property
    def trace(self) -> Tensor:
        return self.spectrum[1].sum(-1)

    @cached_property
    def factor(self) -> Tensor:
        """T (…, n - 1, min(p, n - 1)) such that T Tᵀ is the Gram."""
        if self.p < self.n:
            return to_complement(self.centred)
        u, w = self.spectrum
        return u * w.sqrt()[..., None, :]
