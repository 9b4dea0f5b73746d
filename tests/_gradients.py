"""Similarities that have gradients, the same in plain PyTorch, and how their gradients compare."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import repsim_kernels as rk
from bench.bench_gradients import compute_cka, compute_procrustes, compute_rsa

DISTANCES = ("euclidean", "sqeuclidean", "correlation", "cosine")
COMPARISONS = ("pearson", "cosine")
# The function and its options; the same in plain torch; the fewest stimuli and neurons.
CASES = {
    "cka": (rk.cka, compute_cka, {}, 2, 1),
    "cka debiased": (rk.cka, compute_cka, {"debiased": True}, 4, 1),
    "cka rbf": (rk.cka, compute_cka, {"kernel": "rbf"}, 3, 1),
    "cka rbf debiased": (
        rk.cka,
        compute_cka,
        {"kernel": "rbf", "debiased": True, "sigma": 0.5},
        4,
        1,
    ),
    "procrustes": (rk.procrustes, compute_procrustes, {}, 2, 1),
    **{
        f"rsa {distance} {compare}": (
            rk.rsa,
            compute_rsa,
            {"distance": distance, "compare": compare},
            3,
            3 if distance == "correlation" else 2,
        )
        for distance in DISTANCES
        for compare in COMPARISONS
    },
}
EACH_CASE = pytest.mark.parametrize("name", CASES)


def call(name: str, **more: object) -> partial[Tensor]:
    function, _, options, _, _ = CASES[name]
    return partial(function, **options, **more)


def plain(name: str) -> partial[Tensor]:
    _, function, options, _, _ = CASES[name]
    return partial(function, **options)


def offsets_matter(name: str) -> bool:
    """Whether the similarity changes if a constant is added to a neuron."""
    return CASES[name][2].get("distance") in ("correlation", "cosine")


def draw_pair(rng: np.random.Generator, n: int, p: int, q: int) -> tuple[Tensor, Tensor]:
    """Draw x (n, p) and y (n, q) that share some of their variance."""
    shared = rng.standard_normal((n, 1))
    x, y = (torch.from_numpy(rng.standard_normal((n, width)) + shared) for width in (p, q))
    return x.requires_grad_(), y.requires_grad_()


def differentiate(function: partial[Tensor], *xs: Tensor, upstream: float = 1.0) -> list[Tensor]:
    """Return the gradients with respect to copies of all xs, which keep their strides."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    (upstream * function(*leaves).sum()).backward()
    return [leaf.grad for leaf in leaves]


def assert_same_gradients(
    xs: list[Tensor], got: list[Tensor], want: list[Tensor], tolerance: float = 1e-9
) -> None:
    """Assert that gradients agree, relative to their norms or, at an optimum, to 1 / ‖x‖."""
    for x, a, b in zip(xs, got, want, strict=True):
        assert a.shape == b.shape == x.shape
        spread = float((x.detach() - x.detach().mean(0)).double().norm())
        scale = max(float(b.double().norm()), 1 / spread)
        torch.testing.assert_close(a.double() / scale, b.double() / scale, rtol=0, atol=tolerance)
