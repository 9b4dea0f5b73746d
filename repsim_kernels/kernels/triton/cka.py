"""CKA of the ablations of one original, from kernel matrices packed as vectors, in one kernel.

PyTorch needs 16 operations, each of which is expected to take longer to start than to run. One
program reads a cell's vector twice, and the whole's three times from the cache: 1 MB each for 500
stimuli. Not run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch import cka
from repsim_kernels.kernels.triton import _launch

_BLOCK = 2048


@triton.jit
def _join(mantissa, exponent):
    """Return a float64 from what `math.frexp` made of it."""
    power = ((tl.zeros((), tl.int64) + exponent + 1023) << 52).to(tl.float64, bitcast=True)
    return mantissa * power


@triton.jit(do_not_specialize=["whole_exponent", "exponent"])
def _cosine_distance_kernel(
    m_ptr,  # (C, k)
    whole_ptr,  # (k,)
    out_ptr,  # (C,)
    # The floors by `math.frexp`: a number passed to a kernel is float32, whose range is too small.
    whole_mantissa, whole_exponent, mantissa, exponent, k, stride_m, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(whole_ptr + at, mask=at < k, other=0)
        squares += w * w
    size = tl.sqrt(tl.sum(squares, 0))

    along = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = tl.load(m_ptr + cell * stride_m + at, mask=at < k, other=0)
        along += m * (tl.load(whole_ptr + at, mask=at < k, other=0) / size)
    along = tl.sum(along, 0)

    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = tl.load(m_ptr + cell * stride_m + at, mask=at < k, other=0)
        rest = m - along * (tl.load(whole_ptr + at, mask=at < k, other=0) / size)
        squares += rest * rest
    rejection = tl.sqrt(tl.sum(squares, 0))

    projection = size - along
    norm = tl.sqrt(projection * projection + rejection * rejection)
    sine = rejection / norm
    distance = sine * sine / (1 + projection / norm)
    is_known = (size > _join(whole_mantissa, whole_exponent)) & (norm > _join(mantissa, exponent))
    tl.store(out_ptr + cell, tl.where(is_known, distance, float("nan")))


def cosine_distance(
    m: Tensor,
    whole: Tensor,
    complement: bool,
    whole_floor: float | Tensor,
    floor: float | Tensor,
) -> Tensor:
    """Compute what the torch backend's `cosine_distance` does; PyTorch where a floor is a tensor.

    Those floors, and ``complement``, are for a cell that is most of the whole and comes alone.
    """
    if complement or isinstance(whole_floor, Tensor) or isinstance(floor, Tensor):
        return cka.cosine_distance(m, whole, complement, whole_floor, floor)
    out = m.new_empty(len(m))
    _launch.launch(
        _cosine_distance_kernel,
        (len(m),),
        *(m, whole, out, *math.frexp(whole_floor), *math.frexp(floor), len(whole), m.stride(0)),
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return out


def _make_case(cells: int, n: int) -> _launch.CompileCase:
    k = n * (n + 1) // 2

    def call(device: torch.device) -> None:
        m = torch.empty(cells, k, dtype=torch.float64, device=device)
        cosine_distance(m, m[0], False, 0.5, 0.5)

    floor = _launch.Floor(8 * (cells + 1) * k, 6 * cells * k)
    return _launch.CompileCase(f"{cells} cells, n = {n}", call, floor)


AOT_CASES = (_make_case(16, 500), _make_case(100, 50))
