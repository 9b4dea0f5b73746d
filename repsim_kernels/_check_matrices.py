"""Checks of matrices that public functions take in place of representations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from repsim_kernels import _arrays, _options
from repsim_kernels._arrays import Source
from repsim_kernels._check import (
    MAX_MAGNITUDE,
    check_finite,
    check_same_source,
    has_constant,
    to_float,
)
from repsim_kernels.errors import ConstantError, ShapeError

MAX_GRAM = MAX_MAGNITUDE**2
MAX_ASYMMETRY = 1e-5  # relative to the largest entry; float32 products leave less


def check_matrices(a: Any, name: str, *, symmetric: bool) -> tuple[Tensor, Source]:
    """Check a batch of finite real matrices (…, m, n), symmetric (…, n, n) if so required."""
    a, source = _arrays.convert(a, name)
    return _check_matrices(a, name, symmetric, MAX_MAGNITUDE), source


def _check_matrices(a: Tensor, name: str, symmetric: bool, limit: float) -> Tensor:
    """Check matrices that are already tensors."""
    square = a.ndim >= 2 and a.shape[-2] == a.shape[-1]
    if a.ndim < 2 or 0 in a.shape or (symmetric and not square):
        expected = "(…, n, n)" if symmetric else "(…, m, n)"
        raise ShapeError(f"{name}: shape {tuple(a.shape)}; expected {expected}, none of them empty")
    a = to_float(a)
    check_finite(a, name, limit)
    if symmetric:
        asymmetry, size = (t.abs().amax((-2, -1)) for t in (a - a.mT, a))
        wrong = asymmetry > size * MAX_ASYMMETRY
        if bool(wrong.any()):
            raise ShapeError(
                f"{name}: {int(wrong.sum())} matrices differ from their transposes by more than "
                f"{MAX_ASYMMETRY:g} of their largest entry; expected symmetric ones"
            )
    return a


def check_gram_and_parts(gram: Any, parts: Any, min_stimuli: int) -> tuple[Tensor, Tensor, Source]:
    """Check a Gram matrix (n, n) and those of its parts (C, n, n)."""
    gram, source = _arrays.convert(gram, "gram")
    gram = _check_matrices(gram, "gram", symmetric=True, limit=MAX_GRAM)
    n = gram.shape[-1]
    if gram.ndim != 2 or n < min_stimuli:
        raise ShapeError(
            f"gram: shape {tuple(gram.shape)}; expected (n, n) with at least {min_stimuli} stimuli"
        )
    parts, parts_source = _arrays.convert(parts, "parts")
    if parts.ndim != 3 or tuple(parts.shape[1:]) != (n, n):
        raise ShapeError(f"parts: shape {tuple(parts.shape)}; expected (C, {n}, {n}), like gram")
    check_same_source(source, parts_source, "gram", "parts")
    if len(parts):
        parts = _check_matrices(parts, "parts", symmetric=True, limit=MAX_GRAM)
    if has_constant(gram):
        raise ConstantError(
            "gram: the same for every stimulus; expected a Gram matrix that is not constant, "
            "since a centred one would be zero, and has no similarity to anything"
        )
    return gram, parts, source


def check_kernel_matrix(
    k: Any,
    name: str,
    *,
    debiased: bool,
    batched: Any = False,
    allow_batch: bool = True,
    accept_grad: bool = False,
) -> tuple[Tensor, Source]:
    """Check one kernel matrix (n, n), not yet centred; return it in float64, exactly symmetric.

    `debiased`, `batched`, `allow_batch` and `accept_grad` are as in `check_representation`.
    """
    batched = _options.check_flag(batched, "batched")
    k, source = _arrays.convert(k, name, accept_grad=accept_grad)
    shape = tuple(k.shape)
    if k.ndim < 2 or shape[-2] != shape[-1] or (k.ndim > 2 and not batched):
        hint = ", or batched=True for a batch of them" if k.ndim > 2 and allow_batch else ""
        raise ShapeError(f"{name}: shape {shape}; expected a kernel matrix (n, n){hint}")
    min_stimuli = 4 if debiased else 2
    if shape[-1] < min_stimuli:
        raise ShapeError(
            f"{name}: {shape[-1]} stimuli in shape {shape}; expected at least {min_stimuli}"
        )
    k = _check_matrices(k, name, symmetric=True, limit=MAX_GRAM).double()
    k = (k + k.mT) / 2
    if _is_zero_centred(k, debiased):
        raise ConstantError(
            f"{name}: the kernel matrix is zero after centring; expected stimuli that differ"
        )
    return k, source


def _is_zero_centred(k: Tensor, debiased: bool) -> bool:
    """Whether centring (U-centring if debiased) leaves only rounding errors of any k (…, n, n)."""
    n = k.shape[-1]
    c = k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1)) if debiased else k
    means = c.sum(-1) / (n - 2 if debiased else n)
    c = c - means[..., None] - means[..., None, :]
    c += (means.sum(-1) / (n - 1 if debiased else n))[..., None, None]
    if debiased:
        c.diagonal(dim1=-2, dim2=-1).zero_()
    left, size = (torch.linalg.matrix_norm(a) for a in (c, k))
    return bool((left <= n * torch.finfo(torch.float64).eps * size).any())


def check_rdms(a: Any, name: str) -> tuple[Tensor, Source]:
    """Check one condensed RDM (N,) or several (A, N) of at least 3 conditions."""
    a, source = _arrays.convert(a, name)
    shape = tuple(a.shape)
    n_pairs = shape[-1] if shape else 0
    n = round((1 + math.sqrt(1 + 8 * n_pairs)) / 2)
    is_square = len(shape) == 2 and shape[0] == shape[1] > 2
    # A matrix of 6 conditions would otherwise pass as 6 RDMs of 4 conditions.
    is_matrix = is_square and torch.equal(a, a.T) and not bool(a.diagonal().any())
    fits = n >= 3 and n * (n - 1) == 2 * n_pairs and 0 not in shape
    if is_matrix or not fits or len(shape) not in (1, 2):
        hint = f": pass {name}[numpy.triu_indices({shape[0]}, 1)]" if is_square else ""
        raise ShapeError(
            f"{name}: shape {shape}; expected condensed RDMs (N,) or (A, N), where N = n(n - 1)/2 "
            f"for n >= 3 conditions{hint}"
        )
    a = to_float(a)
    check_finite(a, name, MAX_GRAM)
    return a, source


def raise_if_undefined(rdms: Tensor, name: str, method: str) -> None:
    """Raise an error for the first RDM (…, N) that `method` can't compare with any other."""
    if method in ("kendall", "rho-a"):
        return
    if method in ("spearman", "pearson"):
        undefined, what, expected = (rdms == rdms[..., :1]).all(-1), "equal", "that differ"
    else:
        undefined, what, expected = (rdms == 0).all(-1), "0", "other than 0"
    if bool(undefined.any()):
        row = f"[{int(undefined.byte().argmax())}]" if undefined.ndim else ""
        raise ConstantError(
            f"{name}{row}: all its values are {what}; expected values {expected}, since "
            f"{method!r} is not defined otherwise"
        )
