"""PWCCA's weights: sums of a product's absolute values, without storing the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch


@dataclass(frozen=True)
class Launch:
    block_k: int  # directions per tile
    block_p: int  # neurons per tile
    block_n: int  # stimuli per step
    chunk: int  # neurons per program
    num_warps: int
    num_stages: int


def choose(
    k: int, p: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]
) -> Launch:
    """Choose launch settings for k directions and p neurons."""
    # The product is the cost, so take the largest tile that does not spill. Operands are in
    # registers before 9.0, with "ieee", and while 16 bits are widened to 32; on 10.0 "tf32" has
    # 128 registers.
    block_k = 64 if precision == "ieee" else 128
    wide = capability >= (9, 0) and (precision == "tf32x3" or capability < (10, 0))
    wide = wide and precision != "ieee" and dtype == torch.float32
    # Four waves on 132 multiprocessors, of at least one tile each.
    chunk = p * -(-k // block_k) // (4 * 132) // 128 * 128
    return Launch(
        block_k=block_k,
        block_p=128 if wide else 64,
        # Two tensor-core steps; each stage is 16 KiB.
        block_n=16,
        chunk=min(max(chunk, 128), 4096),
        num_warps=8,
        num_stages=4 if capability < (10, 0) else 3,
    )


def floor(k: int, n: int, p: int, itemsize: int, precision: str) -> _launch.Floor:
    """Lower bound: read x and the directions once; 2 k n p operations."""
    return _launch.Floor(n * p * itemsize + 4 * k * n, 2 * k * n * p, precision)


@triton.jit
def _variate_weights_kernel(
    h_ptr,
    x_ptr,
    scale_ptr,
    out_ptr,
    k,
    n,
    p,
    chunk,
    stride_n,
    stride_p,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    piece = tl.program_id(1).to(tl.int64)
    direction = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr)
    total = tl.zeros((BLOCK_K,), dtype=tl.float64)
    for start in range(piece * chunk, tl.minimum((piece + 1) * chunk, p), BLOCK_P):
        neuron = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = neuron < p
        source = x_ptr + neuron * stride_p
        origin = tl.load(source, mask=inside, other=0).to(tl.float32) * scale  # (BLOCK_P,)
        product = tl.zeros((BLOCK_K, BLOCK_P), dtype=tl.float32)
        for step in range(0, n, BLOCK_N):
            stimulus = step + tl.arange(0, BLOCK_N)
            h = tl.load(
                h_ptr + direction.to(tl.int64)[:, None] * n + stimulus[None, :],
                mask=(direction < k)[:, None] & (stimulus < n)[None, :],
                other=0,
            )  # (BLOCK_K, BLOCK_N)
            mask = (stimulus < n)[:, None] & inside[None, :]
            x = tl.load(
                source[None, :] + stimulus.to(tl.int64)[:, None] * stride_n, mask=mask, other=0
            )
            x = tl.where(mask, x.to(tl.float32) * scale - origin[None, :], 0)
            product = tl.dot(h, x, product, input_precision=PRECISION)
        total += tl.sum(tl.abs(product), 1).to(tl.float64)
    tl.store(out_ptr + piece * k + direction, total, mask=direction < k)


def variate_weights(
    h: Tensor, x: Tensor, *, precision: str = "tf32x3", launch: Launch | None = None
) -> Tensor:
    """Return Σⱼ |hᵢ · xⱼ| over the centred columns of x (n, p) for directions h (k, n).

    The result is (k,) float64. The directions are centred instead of x, which is equivalent.
    """
    (k, n), p = h.shape, x.shape[1]
    launch = launch or choose(k, p, x.dtype, precision, _launch.capability(x.device))
    h = h.to(torch.float64)
    h = (h - h.mean(1, keepdim=True)).to(torch.float32).contiguous()
    pieces = -(-p // launch.chunk)
    out = torch.empty(pieces, k, dtype=torch.float64, device=x.device)
    scale = _launch.find_scale(x)
    _launch.launch(
        _variate_weights_kernel,
        (triton.cdiv(k, launch.block_k), pieces),
        *(h, x, scale, out, k, n, p, launch.chunk, *x.stride()),
        BLOCK_K=launch.block_k,
        BLOCK_P=launch.block_p,
        BLOCK_N=launch.block_n,
        PRECISION=precision,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out.sum(0) / scale.to(torch.float64)


def _make_case(
    k: int, n: int, p: int, dtype: torch.dtype, precision: str, rows: bool
) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        shape = (n, p) if rows else (p, n)
        x = torch.empty(shape, dtype=dtype, device=device)
        h = torch.empty(k, n, device=device)
        variate_weights(h, x if rows else x.mT, precision=precision)

    order = "stimuli" if rows else "neurons"
    return _launch.CompileCase(
        f"{k:,} directions, n = {n}, p = {p:,}, {str(dtype)[6:]}, {precision}, by {order}",
        call,
        floor(k, n, p, dtype.itemsize, precision),
        products=precision != "ieee",
    )


AOT_CASES = (
    _make_case(16 * 499, 500, 100_352, torch.float32, "tf32x3", False),
    _make_case(16 * 499, 500, 100_352, torch.float32, "tf32x3", True),
    _make_case(16 * 499, 500, 100_352, torch.float32, "tf32", False),
    _make_case(16 * 499, 500, 100_352, torch.float32, "ieee", False),
    _make_case(16 * 499, 500, 100_352, torch.bfloat16, "tf32x3", False),
    _make_case(16 * 49, 50, 193_600, torch.float32, "tf32x3", False),
)
