"""1x1 convolutions and linear layers of an activation with the neurons of one cell set to zero.

Cells are masked while a tile of the activation enters the product, so the masked copies are never
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton.masked_copies import apply_activation


@dataclass(frozen=True)
class Launch:
    cells: int  # copies per program, from one read of the activation; a power of 2 up to 8
    rows: int  # pixels per program
    outs: int  # outputs per program
    depth: int  # channels per step
    inner: int  # channels summed in one accumulator of the tensor cores, which truncate
    num_warps: int
    num_stages: int


def choose(
    outs: int, cells: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]
) -> Launch:
    """Choose launch settings for a number of outputs and cells."""
    copies = min(4, triton.next_power_of_2(cells))
    ieee = dtype == torch.float32 and precision == "ieee"
    return Launch(
        # Four cells of 32 pixels: a quarter of the reads, still in segments of 128 bytes, and 128
        # rows for the tensor cores. Without tensor cores, 8 warps may use 128 registers per thread.
        cells=copies,
        rows=(64 if ieee else 128) // copies,
        # A tile of 64 outputs would be mostly empty for layers of 24.
        outs=32 if ieee or outs <= 32 else 64,
        # 64 bytes per pixel. The two parts of tf32x3's operands spill at 32 channels on 8.0; on
        # 10.0, which keeps sums in tensor memory, they spill at 16, where the compiler aims for
        # 80 registers.
        depth=16 if dtype == torch.float32 and capability < (10, 0) else 32,
        # 64 steps of 8 channels: truncation stays near float32's rounding.
        inner=512,
        # With 4 warps tf32x3 needs more than 200 registers per thread.
        num_warps=8,
        num_stages=3,
    )


def floor(
    rows: int, channels: int, outs: int, cells: int, dtype: torch.dtype, precision: str
) -> _launch.Floor:
    """Lower bound: read activation and weights, write the outputs; one product per cell."""
    numbers = rows * channels + channels * outs + cells * rows * outs
    return _launch.Floor(numbers * dtype.itemsize, 2 * cells * rows * channels * outs, precision)


def unsupported(activation: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Return why the kernel can't run this layer, or None if it can."""
    parameters = [weight] if bias is None else [weight, bias]
    if any(t.dtype != activation.dtype for t in parameters):
        return "it takes only weights of the activation's dtype"
    if weight.ndim != 2 and (weight.ndim != activation.ndim or prod(weight.shape[2:]) != 1):
        return "it takes linear layers and 1x1 convolutions"
    return _launch.unsupported(activation, *parameters)


@triton.jit
def _masked_pointwise_kernel(
    x_ptr, bits_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr,
    rows, pixels, channels, outs, cells, out_tiles, cell_tiles,
    x_image, x_pixel, x_channel, bits_pixel, bits_channel,
    out_copy, out_image, out_pixel, out_channel,
    CHANNELS_LAST: tl.constexpr, ACTIVATE: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    DEPTH: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Programs that read the same pixels run concurrently: all outputs and cells of a tile of rows.
    block = tl.program_id(0)
    o = block % out_tiles * OUTS + tl.arange(0, OUTS)  # (OUTS,)
    cell = block // out_tiles % cell_tiles * CELLS
    bits_ptr += (cell // 8).to(tl.int64) * (pixels * channels)
    bit = cell % 8 + tl.arange(0, CELLS)  # (CELLS,)
    row = (block // out_tiles // cell_tiles).to(tl.int64) * ROWS
    r = row + tl.arange(0, ROWS)  # (ROWS,)
    x_row = r // pixels * x_image + r % pixels * x_pixel
    bits_row = (r % pixels).to(tl.int32) * bits_pixel

    total = tl.zeros((CELLS * ROWS, OUTS), tl.float32)
    for start in range(0, channels, INNER):
        part = tl.zeros((CELLS * ROWS, OUTS), tl.float32)
        for step in range(start, tl.minimum(start + INNER, channels), DEPTH):
            k = step + tl.arange(0, DEPTH)  # (DEPTH,)
            if CHANNELS_LAST:
                x_offsets = x_row[:, None] + k[None, :] * x_channel  # (ROWS, DEPTH)
                bits_offsets = bits_row[:, None] + k[None, :] * bits_channel
                mask = (r < rows)[:, None] & (k < channels)[None, :]
            else:  # consecutive lanes read consecutive pixels, as in memory
                x_offsets = k[:, None] * x_channel + x_row[None, :]  # (DEPTH, ROWS)
                bits_offsets = k[:, None] * bits_channel + bits_row[None, :]
                mask = (k < channels)[:, None] & (r < rows)[None, :]
            x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
            bits = tl.load(bits_ptr + bits_offsets, mask=mask, other=0).to(tl.int32)
            hit = (bits[None, :, :] >> bit[:, None, None]) & 1
            x = tl.where(hit != 0, 0.0, x[None, :, :])
            if not CHANNELS_LAST:
                x = tl.permute(x, (0, 2, 1))
            x = tl.reshape(x, (CELLS * ROWS, DEPTH)).to(PRODUCT)
            w_mask = (k < channels)[:, None] & (o < outs)[None, :]
            w = tl.load(weight_ptr + k[:, None] + o[None, :] * channels, mask=w_mask, other=0.0)
            w = w.to(tl.float32).to(PRODUCT)  # (DEPTH, OUTS)
            part = tl.dot(x, w, part, input_precision=PRECISION)  # (CELLS * ROWS, OUTS)
        total += part

    if scale_ptr is not None:
        total *= tl.load(scale_ptr + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
    total = apply_activation(total, ACTIVATE).to(out_ptr.dtype.element_ty)
    q = tl.arange(0, CELLS * ROWS)  # (CELLS * ROWS,)
    c = cell + q // ROWS
    r = row + q % ROWS
    target = c.to(tl.int64) * out_copy + r // pixels * out_image + r % pixels * out_pixel
    inside = (c < cells) & (r < rows)
    if CHANNELS_LAST:
        mask = inside[:, None] & (o < outs)[None, :]
        tl.store(out_ptr + target[:, None] + o[None, :] * out_channel, total, mask=mask)
    else:
        mask = (o < outs)[:, None] & inside[None, :]
        tl.store(out_ptr + o[:, None] * out_channel + target[None, :], tl.trans(total), mask=mask)


def masked_pointwise(
    activation: Tensor,
    cells: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    activate: str = "none",
    precision: str = "tf32x3",
    launch: Launch | None = None,
) -> Tensor:
    """Apply ``activate(weight @ masked * scale + bias)`` to the activation masked for each cell.

    The product runs over dimension 1 for the weight of a 1x1 convolution (outs, channels, 1, 1),
    and over the last dimension for that of a linear layer (outs, channels). ``cells`` are labels
    (p,) or memberships (C, p) of one stimulus's p neurons in C order, and ``ids`` (int64) selects
    cells. All are on the activation's device. Returns (len(ids) n, outs, …), channels-last in
    memory if the activation is.
    """
    n, n_ids, (outs, channels) = len(activation), len(ids), weight.shape[:2]
    table = _pack_bits(cells[ids] if cells.dtype == torch.bool else cells == ids[:, None])
    convolution = weight.ndim > 2
    sizes = activation.shape[2:] if convolution else activation.shape[1:-1]
    pixels = prod(sizes)
    if convolution:
        x = activation.reshape(n, channels, pixels).mT  # (n, pixels, channels)
        table = table.view(-1, channels, pixels).mT
    else:
        x = activation.reshape(n, pixels, channels)
        table = table.view(-1, pixels, channels)
    last = x.stride(2) == 1
    table = table.contiguous() if last else table.mT.contiguous().mT

    if convolution and (not last or activation.is_contiguous()):
        result = activation.new_empty(n_ids * n, outs, *sizes)
        out = result.view(-1, outs, pixels).mT  # (n_ids n, pixels, outs)
    else:
        result = activation.new_empty(n_ids * n, *sizes, outs)
        out = result.view(-1, pixels, outs)
        result = result.movedim(-1, 1) if convolution else result
    if result.numel() == 0:
        return result

    rows = n * pixels
    dtype, capability = activation.dtype, _launch.capability(activation.device)
    conf = launch or choose(outs, n_ids, dtype, precision, capability)
    out_tiles, cell_tiles = -(-outs // conf.outs), -(-n_ids // conf.cells)
    _launch.launch(
        _masked_pointwise_kernel, (-(-rows // conf.rows) * out_tiles * cell_tiles,),
        x, table, weight.reshape(outs, channels).contiguous(), scale, bias, out,
        rows, pixels, channels, outs, n_ids, out_tiles, cell_tiles,
        *x.stride(), *table.stride()[1:], n * out.stride(0), *out.stride(),
        CHANNELS_LAST=last, ACTIVATE=activate,
        PRODUCT=product_dtype(dtype), PRECISION=precision,
        CELLS=conf.cells, ROWS=conf.rows, OUTS=conf.outs, DEPTH=conf.depth, INNER=conf.inner,
        num_warps=conf.num_warps, num_stages=conf.num_stages,
    )  # fmt: skip
    return result


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which tiles of a dtype are multiplied."""
    if dtype == torch.bfloat16:  # the interpreter multiplies bfloat16 wrongly
        return tl.float32 if _launch.is_interpreted() else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _pack_bits(masks: Tensor) -> Tensor:
    """Pack masks (cells, p) into (cells / 8, p) uint8, eight masks per byte."""
    masks = torch.nn.functional.pad(masks, (0, 0, 0, -len(masks) % 8))
    place = torch.arange(8, dtype=torch.uint8, device=masks.device)[:, None]
    return (masks.view(-1, 8, masks.shape[1]).to(torch.uint8) << place).sum(1, dtype=torch.uint8)


def _make_case(
    name: str, shape: tuple[int, ...], outs: int, dtype: torch.dtype, last: bool = False
) -> _launch.CompileCase:
    n, cells = 50, 16

    def call(device: torch.device) -> Tensor:
        x = torch.empty(n, *shape, dtype=dtype, device=device)
        kernel = (1,) * (len(shape) - 1)
        return masked_pointwise(
            x.to(memory_format=torch.channels_last) if last else x,
            torch.zeros(prod(shape), dtype=torch.int64, device=device),
            torch.zeros(cells, dtype=torch.int64, device=device),
            torch.empty(outs, shape[0], *kernel, dtype=dtype, device=device),
            torch.empty(outs, dtype=dtype, device=device),
            activate="relu6",
        )

    rows = n * prod(shape[1:])
    label = f"{name}, {str(dtype)[6:]}{', channels last' * last}"
    precision = "tf32x3" if dtype == torch.float32 else "bfloat16"
    bound = floor(rows, shape[0], outs, cells, dtype, precision)
    return _launch.CompileCase(label, call, bound, products=True)


AOT_CASES: tuple[_launch.CompileCase, ...] = tuple(
    _make_case(name, shape, outs, dtype, last)
    for name, shape, outs, last in (
        ("mobilenet 96 to 24", (96, 112, 112), 24, False),
        ("mobilenet 96 to 24", (96, 112, 112), 24, True),
        ("resnet 2048 to 512", (2048, 7, 7), 512, False),
        ("resnet 2048 to 512", (2048, 7, 7), 512, True),
        ("linear 9216 to 4096", (9216,), 4096, False),
    )
    for dtype in (torch.float32, torch.bfloat16)
)
