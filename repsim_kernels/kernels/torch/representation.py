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
    rest = a[..., 1:, :]
    shift = a[..., :1, :] / math.sqrt(n) + rest.sum(-2, keepdim=True) / (n + math.sqrt(n))
    return rest - shift


def from_complement(a: Tensor) -> Tensor:
    """Return Q a (…, n, m), whose columns sum to zero, for a (…, n - 1, m)."""
    n = a.shape[-2] + 1
    total = a.sum(-2, keepdim=True)
    return torch.cat([-total / math.sqrt(n), a - total / (n + math.sqrt(n))], dim=-2)


def is_positive(w: Tensor, n: int) -> Tensor:
    """Return which eigenvalues (…, r) of a Gram of n stimuli count towards its rank."""
    return w > n * torch.finfo(torch.float64).eps * w.amax(-1, keepdim=True)


def spectrum_of_gram(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors and eigenvalues of a Gram, as in `Representation.spectrum`."""
    w, u = torch.linalg.eigh(to_complement(to_complement(g).mT))
    return _zero_beyond_rank(u.flip(-1), w.flip(-1), g.shape[-1])


def _zero_beyond_rank(u: Tensor, w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    keep = is_positive(w, n)
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
