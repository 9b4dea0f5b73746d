"""A training step with a similarity as its loss, against autograd through plain PyTorch.

A step computes 1 - similarity of x, which requires grad, and y, which doesn't, and the gradient.
Plain PyTorch runs in float32, as users write it, and on the same features converted to float64.

Predicted before it was measured, on two cores with products at 134 GFLOP/s in float32 and 68 in
float64, with U = 2 n² p operations for a product of features:

* Linear CKA. This package multiplies 1.1 U in float32 for the value, and 1.1 U for both Grams and U
  for the gradient in float64: 0.51 s. Plain PyTorch multiplies 2 U forward and 2 U backward: 0.39 s
  in float32, 0.77 s in float64. Memory: the gradient and two blocks, 95 MB; plain, four copies of
  the features, 205 MB in float32 and, with both conversions, 510 MB in float64.
* Debiased CKA of few neurons. No Gram here: 8.6 G operations in float32 and 26 G in float64, 0.45 s
  and 170 MB. Plain, 274 G and about twenty passes over n² numbers: 2.5 s and 2 GB in float32.
* RBF CKA and RSA. The value is float64 too: 3.2 U, 0.40 s; plain, 4 U: 0.26 s and 0.51 s.
* Procrustes with more neurons than stimuli. n x n decompositions, about 0.35 s; plain, the singular
  value decomposition of a p x q matrix: more than ten times as long.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import repsim_kernels as rk
from bench.common import memory
from bench.common.machine import Json, describe_environment, format_seconds
from bench.common.records import describe_device
from bench.peers.tables import format_markdown_table

Similarity = Callable[[Tensor, Tensor], Tensor]
_REPEATS = 5  # timed steps of each method; the median counts


def compute_cka(
    x: Tensor, y: Tensor, *, debiased: bool = False, kernel: str = "linear", sigma: float = 1.0
) -> Tensor:
    """Return CKA as `rk.cka` defines it, in differentiable operations and the dtype of x."""
    k, m = (z @ z.T for z in (x - x.mean(0), y - y.mean(0)))
    if kernel == "rbf":
        k, m = (_compute_rbf(square_distances(g), sigma) for g in (k, m))
    inner = _compute_hsic1 if debiased else _compute_centred_product
    return inner(k, m) / (inner(k, k) * inner(m, m)).sqrt()


def square_distances(g: Tensor) -> Tensor:
    """Return the squared distances (n, n) of stimuli from their Gram matrix."""
    d = g.diagonal()
    return (d[:, None] + d - 2 * g).clamp(min=0)


def _compute_rbf(d2: Tensor, sigma: float) -> Tensor:
    n = len(d2)
    values = d2.flatten().sort().values
    median = (values[(n * n - 1) // 2] + values[n * n // 2]) / 2
    return torch.exp(-d2 / (2 * sigma**2 * median))


def _compute_centred_product(k: Tensor, m: Tensor) -> Tensor:
    k = k - k.mean(0)
    return ((k - k.mean(1, keepdim=True)) * m).sum()


def _compute_hsic1(k: Tensor, m: Tensor) -> Tensor:
    """Return n(n - 3) times HSIC₁ of Song et al. 2012."""
    n = len(k)
    k, m = (a - torch.diag(a.diagonal()) for a in (k, m))
    total = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (k * m).sum() + total - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()


def compute_procrustes(x: Tensor, y: Tensor) -> Tensor:
    """Return the similarity of `rk.procrustes`, from the p x q matrix of its definition."""
    x, y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.matrix_norm(x.T @ y, "nuc") / (x.norm() * y.norm())


def compute_rsa(
    x: Tensor, y: Tensor, *, distance: str = "euclidean", compare: str = "pearson"
) -> Tensor:
    """Return RSA as `rk.rsa` defines it, with distances from Gram matrices."""
    u, v = (_compute_distances(z, distance) for z in (x, y))
    if compare == "pearson":
        u, v = u - u.mean(), v - v.mean()
    return (u * v).sum() / (u.norm() * v.norm())


def _compute_distances(x: Tensor, distance: str) -> Tensor:
    """Return the distances of all pairs of stimuli (n(n - 1)/2,)."""
    i, j = torch.triu_indices(len(x), len(x), 1)
    if distance in ("correlation", "cosine"):
        x = x - x.mean(1, keepdim=True) if distance == "correlation" else x
        x = x / x.norm(dim=1, keepdim=True)
        return 1 - (x @ x.T)[i, j]
    x = x - x.mean(0)
    d2 = square_distances(x @ x.T)[i, j]
    return d2.sqrt() if distance == "euclidean" else d2


class Case(NamedTuple):
    """A similarity by both methods, and its sizes n and p = q, in full and for `quick`."""

    ours: Similarity
    plain: Similarity
    sizes: tuple[int, int]
    quick_sizes: tuple[int, int]


CASES = {
    "linear CKA": Case(rk.cka, compute_cka, (512, 25_088), (16, 64)),
    "debiased CKA, few neurons": Case(
        partial(rk.cka, debiased=True), partial(compute_cka, debiased=True), (8_192, 512), (64, 8)
    ),
    "RBF CKA": Case(
        partial(rk.cka, kernel="rbf"), partial(compute_cka, kernel="rbf"), (1_024, 4_096), (16, 64)
    ),
    "Procrustes": Case(rk.procrustes, compute_procrustes, (512, 2_048), (8, 16)),
    "RSA, euclidean, Pearson": Case(
        partial(rk.rsa, compare="pearson"), compute_rsa, (1_024, 4_096), (16, 64)
    ),
}
_METHODS = ("this package", "plain, float32", "plain, float64")


def measure_gradients(quick: bool = False) -> Json:
    """Return the record: seconds and peak bytes of a step, and the error of its gradient."""
    rows = [_measure(name, case, quick) for name, case in CASES.items()]
    return {"environment": describe_environment("cpu"), "rows": rows}


def _measure(name: str, case: Case, quick: bool) -> Json:
    """Measure the methods, which take turns; steps that are not timed come first."""
    n, p = case.quick_sizes if quick else case.sizes
    g = torch.Generator().manual_seed(0)
    y = torch.randn(n, p, generator=g)
    x = (y + torch.randn(n, p, generator=g)).requires_grad_()
    steps: list[Callable[[], Tensor]] = [
        partial(case.ours, x, y),
        partial(case.plain, x, y),
        lambda: case.plain(x.double(), y.double()),
    ]
    double = x.detach().double().requires_grad_()
    exact = _differentiate(lambda: case.plain(double, y.double()), double)
    peaks, errors = [], []
    for step in steps:
        _differentiate(step, x)  # loads what the step uses, such as threads
        before = memory.start_peak()
        gradient = _differentiate(step, x)
        peaks.append(memory.read_peak() - before)
        errors.append(float((gradient - exact).norm() / exact.norm()))
        del gradient
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(1 if quick else _REPEATS):
        for step, own in zip(steps, times, strict=True):
            start = time.perf_counter()
            _differentiate(step, x)
            own.append(time.perf_counter() - start)
    seconds = [statistics.median(own) for own in times]
    sizes: Json = {"name": name, "n": n, "p": p}
    return sizes | {"seconds": seconds, "bytes": peaks, "errors": errors}


def _differentiate(step: Callable[[], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of 1 - similarity with respect to x."""
    (gradient,) = torch.autograd.grad(1 - step(), x)
    return gradient


def describe_gradients(record: Json) -> str:
    """Return the record in words and a table, also for bench/README.md."""
    table = []
    for row in record["rows"]:
        cells = [f"{row['name']}, {row['n']:,} x {row['p']:,}"]
        cells += map(format_seconds, row["seconds"])
        cells += [f"{size / 1e6:,.0f} MB" for size in row["bytes"]]
        table.append([*cells, *(_format_error(error) for error in row["errors"])])
    head = ["loss", *_METHODS, *(f"memory, {method}" for method in _METHODS)]
    head += [f"error, {method}" for method in _METHODS]
    return f"""\
On {describe_device(record)}: one step, 1 - similarity and its gradient with respect to one side, \
for float32 features; medians of {_REPEATS} steps. The memory is the peak of a step, in addition \
to the features of both sides. The error is that of the gradient, which is float32, relative to \
the norm of the float64 gradient by plain PyTorch.

{format_markdown_table(head, table)}"""


def _format_error(error: Any) -> str:
    return f"{float(error):.0e}" if math.isfinite(error) else str(error)
