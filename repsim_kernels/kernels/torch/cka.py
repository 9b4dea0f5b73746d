"""Centred kernel alignment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.torch import distances, features, gram, panels

_EPS = torch.finfo(torch.float64).eps
# Most that a diagonal entry of a centred Gram may be, relative to the norm of the Gram that is
# compared, for float32 products: rounding moves a similarity by a few times float32's rounding.
MAX_ENTRY = 2.0


def cka(
    x: Tensor,
    y: Tensor,
    *,
    debiased: bool,
    kernel: str,
    sigma: float | None,
    precision: str,
    chance: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Return the similarity and, for ``chance``, its mean over permutations of the stimuli."""
    n, dtype = x.shape[-2], product_dtype([x, y], kernel, precision)
    comparison = None
    if kernel == "linear" and features.are_cheaper([x, y], comparisons=1):
        comparison = features.compare([x, y], debiased, dtype)
    if comparison is not None:
        products, traces = comparison
        xx, yy, xy = (products[..., i, j] for i, j in ((0, 0), (1, 1), (0, 1)))
        trace_x, trace_y = traces[..., 0], traces[..., 1]
    else:
        groups = [[x, y]] if x.shape[:-2] == y.shape[:-2] else [[x], [y]]
        # Factors of ½ and √½ cancel below.
        sides = [kernel_vectors(xs, debiased, kernel, sigma, dtype) for xs in groups]
        (hs, xxs, traces_x), (ks, yys, traces_y) = sides[0], sides[-1]
        h, xx, trace_x, k, yy, trace_y = hs[0], xxs[0], traces_x[0], ks[-1], yys[-1], traces_y[-1]
        xy = torch.linalg.vecdot(h, k).cpu().numpy()
    return finish(xy, xx, yy, trace_x * trace_y / (n - 1) if chance else None, x.device)


def product_dtype(xs: list[Tensor], kernel: str, precision: str) -> torch.dtype:
    """Return the dtype in which the features are multiplied."""
    is_single = kernel == "linear" and precision == "float32"
    return torch.float32 if is_single and gram.below_float64(xs) else torch.float64


def finish(
    xy: np.ndarray, xx: np.ndarray, yy: np.ndarray, traces: np.ndarray | None, device: torch.device
) -> Tensor | dict[str, Tensor]:
    """Return xy / √(xx yy), and traces / √(xx yy) if there are any, on a device.

    The similarity does not overflow, is at most 1, and is exactly 1 if all three are equal. All
    this is in NumPy, which computes a few numbers ten times as fast as PyTorch.
    """
    cosine = np.sign(xy) * np.sqrt((xy / xx) * (xy / yy))
    similarity = torch.as_tensor(np.minimum(np.maximum(cosine, -1.0), 1.0), device=device)
    if traces is None:
        return similarity
    chance = traces / np.sqrt(xx) / np.sqrt(yy)
    return {"similarity": similarity, "chance": torch.as_tensor(chance, device=device)}


def kernel_vectors(
    xs: list[Tensor], debiased: bool, kernel: str, sigma: float | None, dtype: torch.dtype
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return the centred kernel matrices of xs, each (…, n, p), as vectors (L, …, m).

    Their inner products are half of those of the matrices. Also returns their squared norms, NaN
    for a matrix that is only rounding error, and √½ of the matrices' traces, (L, …). ``dtype``
    is that of the products; matrices of which float32 keeps too few digits are computed again.
    """
    batch, n = xs[0].shape[:-2], xs[0].shape[-2]
    vectors, kernels = panels.empty_vectors(xs[0], n, len(xs), *batch)

    def write(run: slice, buffer: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Write vectors; return the diagonals and the sums of squares of the means."""
        packed = panels.select(kernels, run)
        if buffer is not None:
            means_squared = gram.gram_into(packed, xs[run], buffer)
        else:
            ks = xs[run] if sigma is None else [distances.rbf_kernel(x, sigma) for x in xs[run]]
            k = torch.stack([gram.double_centre(k) for k in ks])
            for columns, panel in packed:
                panel.copy_(k[..., columns.start :, columns])
            means_squared = None
        diagonal = panels.diagonal(packed)
        if debiased:
            gram.u_centre(packed, out=packed)
        panels.scale_for_inner(packed)
        return diagonal, means_squared

    buffer = panels.block_buffer(xs, dtype) if kernel == "linear" else None
    written = [write(run, buffer) for run in panels.shape_runs_per_core(xs)]
    d = torch.cat([diagonal for diagonal, _ in written]).cpu().numpy()
    halves = torch.linalg.vecdot(vectors, vectors).cpu().numpy()
    if dtype == torch.float32:
        parts = [part for _, part in written if part is not None]
        means_squared = torch.cat(parts).cpu().numpy()
        exact = features.keeps_digits(
            2 * halves, d.max(-1), MAX_ENTRY, means_squared, d.sum(-1) / n
        )
        for i in np.flatnonzero(~exact.reshape(len(xs), -1).all(-1)).tolist():
            d[i] = write(slice(i, i + 1), panels.block_buffer(xs[i : i + 1]))[0][0].cpu().numpy()
            halves[i] = torch.linalg.vecdot(vectors[i], vectors[i]).cpu().numpy()
    traces = d.sum(-1)
    floors = rounding_floor_of_trace(traces, n) / 2 if debiased else 0.0
    return vectors, np.where(halves > floors, halves, np.nan), traces * math.sqrt(0.5)


def rounding_floor(k: Tensor) -> Tensor:
    """Bound the rounding error in ‖U-centred K‖², which is 0 if all stimuli are equally far apart.

    The n - 1 eigenvalues are then equal, and ‖K‖² is (tr K)² / (n - 1), its smallest value.
    """
    return rounding_floor_of_trace(k.diagonal(dim1=-2, dim2=-1).sum(-1), k.shape[-1])


def rounding_floor_of_trace(trace: Any, n: int) -> Any:
    """Return `rounding_floor` of matrices (n, n) with these traces."""
    return (n * _EPS * trace) ** 2 / (n - 1)


def cosine_distance(
    m: Tensor,
    whole: Tensor,
    complement: bool,
    whole_floor: float | Tensor,
    floor: float | Tensor,
) -> Tensor:
    """Return 1 - CKA of a kernel matrix and itself minus a part, without cancellation.

    Matrices are vectors here, from `gram.to_vectors`. m (C, k) holds either the parts or, with
    `complement`, what remains of the whole (k,) without each: pass the smaller of the two, so that
    its component orthogonal to the whole keeps its digits. m is overwritten, since a copy for every
    batch would fragment the heap. The distance is exactly 0 for m = 0, and NaN if the norm of the
    whole or of the remainder is not above its floor.
    Source: docs/metrics.md, "One original, many ablations".
    """
    size = torch.linalg.vector_norm(whole)
    size.masked_fill_(size <= whole_floor, torch.nan)
    whole = whole / size
    along = m @ whole
    rejection = torch.linalg.vector_norm(m.addr_(along, whole, alpha=-1), dim=-1)
    projection = along if complement else size - along  # of the remainder on the whole
    norm = torch.hypot(projection, rejection)
    norm.masked_fill_(norm <= floor, torch.nan)
    return rejection.div_(norm).square_().div_(1 + projection / norm)
