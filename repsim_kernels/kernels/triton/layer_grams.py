"""The Gram matrices of all layers in one launch, and the inner products of all pairs in another.

Layers have different numbers of neurons, so a table lists pieces of their neurons. Each program
multiplies one piece for one tile of a Gram; the last to finish a tile adds the results of all of
its pieces in the neurons' order, so that runs are bit-identical.

Stimuli are taken relative to the first one as they are loaded, since operands.py would write a copy
for one product. A row of ``grams`` holds the lower triangle of these products G, row by row, and
then shifts such that G_ij + s_i + s_j is the centred or U-centred Gram. Both are sums over neurons.

Predictions for an H200, since this was not run on a GPU, for 53 layers of 50,000 float32 neurons:

    n      read     tf32x3    at least    20 x 53 products
    32    0.34 GB   2.8 Gop     79 µs     0.1 µs
    300   3.2 GB    239 Gop    1.8 ms     6 µs

The loop also subtracts, splits and converts: it is expected to take 6 to 8 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.torch import cka, features, panels
from repsim_kernels.kernels.triton import _launch
from repsim_kernels.kernels.triton._operand_kernels import count_pairs, find_tile
from repsim_kernels.kernels.triton.gram import Launch, count_tiles

# Rows and columns of a tile of products, and entries of a step. 8 warps then have 128 registers, so
# a multiprocessor holds two programs; tiles of 64 spill.
_BLOCK = 32
# `find_tile` counts entries up to the next row in 32 bits; with 64, `_products_kernel` spills.
MAX_STIMULI = 46_339
_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def choose(n: int, neurons: int) -> Launch:
    """Choose launch settings for n stimuli and all neurons together."""
    block_n = max(16, triton.next_power_of_2(min(n, 64)))
    # Two waves of programs on 132 multiprocessors, since the last program of a tile waits for the
    # memory once for each piece. The limit of 32 n keeps the results of all pieces at about a 64th
    # of the features.
    chunk = neurons * count_tiles(n, block_n) // (2 * 132) // 512 * 512
    return Launch(
        block_n=block_n,
        block_p=16,
        inner=512,  # as in gram.py, for the truncation of tensor cores
        chunk=min(max(chunk, 512), 32 * max(n, 256)),
        num_warps=4 if block_n < 32 else 8,  # 4 warps spill for 32 stimuli of 16 bits on 9.0
        num_stages=3,
    )


def floor_of_grams(n: int, p: int, layers: int, itemsize: int, precision: str) -> _launch.Floor:
    """Lower bound for p neurons in all layers: read them once, write the Grams once."""
    return _launch.Floor(
        n * p * itemsize + 4 * layers * n * (n + 3),
        n * (n + 1) * p,
        "tf32x3" if precision == "float32" else "ieee",
    )


def floor_of_products(n: int, rows: int, cols: int, itemsize: int) -> _launch.Floor:
    """Lower bound: read all Grams once; two operations for each pair and entry."""
    entries = n * (n + 1) // 2
    return _launch.Floor((rows + cols) * (entries + n) * itemsize, 2 * rows * cols * entries)


def unsupported(*arguments: Tensor | Sequence[Tensor]) -> str | None:
    """Return why tensors, or lists of these, can't be used, or None; float64 is allowed."""
    # Rows of the torch backend, for more stimuli, are longer than any of this one.
    sizes = [a.shape[1] if isinstance(a, Tensor) else _count_values(len(a[0])) for a in arguments]
    if max(sizes) > _count_values(MAX_STIMULI):
        return f"it takes at most {MAX_STIMULI:,} stimuli, whose entries it counts in 32 bits"
    tensors = [t for a in arguments for t in ([a] if isinstance(a, Tensor) else a)]
    singles = (t.new_empty(0, dtype=torch.float32) for t in tensors if t.dtype == torch.float64)
    return _launch.unsupported(*singles, *(t for t in tensors if t.dtype != torch.float64))


def _count_values(n: int) -> int:
    """Count the values in a row of Grams."""
    return n * (n + 3) // 2


@triton.jit
def _grams_kernel(
    pieces_ptr,  # (P, 6): see `_list_pieces`
    partial_ptr,  # (P, pairs of tiles, BLOCK_N, BLOCK_N)
    finished_ptr,  # (L, pairs of tiles), how many pieces are finished; 0 at the start
    grams_ptr,  # (L, size)
    sums_ptr,  # (L, tiles, n), the sums of the rows of G over the columns of each tile
    n, size, DTYPE: tl.constexpr, SUM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The tiles of one piece run concurrently: all but the first find its neurons in the L2 cache.
    pairs = count_pairs(n, BLOCK_N)
    piece = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    i, j = find_tile(pair)
    pieces_ptr += piece * 6
    x_ptr = tl.load(pieces_ptr).to(tl.pointer_type(DTYPE))
    stride_n = tl.load(pieces_ptr + 1)
    neurons = tl.load(pieces_ptr + 2).to(tl.int32)

    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=SUM)
    for start in range(0, neurons, INNER):
        part = tl.zeros((BLOCK_N, BLOCK_N), dtype=SUM)
        for step in range(start, tl.minimum(start + INNER, neurons), BLOCK_P):
            at = step + tl.arange(0, BLOCK_P)
            inside = at < neurons
            source = x_ptr + at
            origin = _widen(tl.load(source, mask=inside, other=0), SUM)  # (BLOCK_P,)
            a_mask = (rows < n)[:, None] & inside[None, :]
            a = tl.load(source[None, :] + (rows * stride_n)[:, None], mask=a_mask, other=0)
            a = tl.where(a_mask, _widen(a, SUM) - origin[None, :], 0)
            b_mask = inside[:, None] & (cols < n)[None, :]
            b = tl.load(source[:, None] + (cols * stride_n)[None, :], mask=b_mask, other=0)
            b = tl.where(b_mask, _widen(b, SUM) - origin[:, None], 0)
            part = tl.dot(a, b, part, input_precision=PRECISION, out_dtype=SUM)
        total += part

    square = tl.arange(0, BLOCK_N)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial_ptr + (piece * pairs + pair) * (BLOCK_N * BLOCK_N) + square, total)
    # Every thread has stored before one of them counts, and whoever reads the full count sees what
    # all programs stored before they counted. PyTorch's compiler joins programs in the same way.
    tl.debug_barrier()
    layer = tl.load(pieces_ptr + 3)
    first = tl.load(pieces_ptr + 4)
    last = tl.load(pieces_ptr + 5)
    finished = tl.atomic_add(finished_ptr + layer * pairs + pair, 1, sem="acq_rel")
    if first + finished + 1 == last:
        gram = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float64)
        for other in range(first, last):
            place = partial_ptr + (other * pairs + pair) * (BLOCK_N * BLOCK_N) + square
            # .cg reads from the L2 cache, which all multiprocessors share.
            gram += tl.load(place, cache_modifier=".cg").to(tl.float64)
        lower = rows[:, None] >= cols[None, :]
        gram = tl.where(lower, gram, tl.trans(gram))  # exactly symmetric, for its sums
        row, col = rows.to(tl.int64)[:, None], cols[None, :]
        grams_ptr += layer * size
        tl.store(grams_ptr + row * (row + 1) // 2 + col, gram, mask=(row < n) & lower)
        sums_ptr += layer * tl.cdiv(n, BLOCK_N) * n
        tl.store(sums_ptr + j * n + rows, tl.sum(gram, 1), mask=rows < n)
        if i != j:
            tl.store(sums_ptr + i * n + cols, tl.sum(gram, 0), mask=cols < n)


@triton.jit
def _widen(x, SUM: tl.constexpr):
    """Convert to the dtype of sums; Triton's interpreter computes bfloat16 wrongly."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(SUM)


@triton.jit
def _products_kernel(
    h_ptr,  # (R, size)
    k_ptr,  # (C, size)
    parts_ptr,  # (programs along x, R C + R + C) float64
    n_rows, n_cols, n, stride_h, stride_k, U_CENTRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    entries = n * (n + 1) // 2
    xy = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
    xx = tl.zeros((BLOCK,), dtype=tl.float64)
    yy = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(tl.program_id(0) * BLOCK, entries, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        i, j = find_tile(at)  # the entry's row and column
        # An entry below the diagonal counts twice; U-centring makes the diagonal 0.
        inside = (at < entries) & ((i != j) | (not U_CENTRE))
        weight = tl.where(i == j, 1.0, 2.0).to(tl.float64)[None, :]
        h = _load_centred(h_ptr, rows, n_rows, stride_h, at, i, j, inside, entries)
        k = _load_centred(k_ptr, cols, n_cols, stride_k, at, i, j, inside, entries)
        xy = tl.dot(h * weight, tl.trans(k), xy, input_precision="ieee", out_dtype=tl.float64)
        xx += tl.sum(h * h * weight, 1)
        yy += tl.sum(k * k * weight, 1)

    parts_ptr += tl.program_id(0).to(tl.int64) * (n_rows * n_cols + n_rows + n_cols)
    is_row, is_col = rows < n_rows, cols < n_cols
    places = rows[:, None] * n_cols + cols[None, :]
    tl.store(parts_ptr + places, xy, mask=is_row[:, None] & is_col[None, :])
    parts_ptr += n_rows * n_cols
    tl.store(parts_ptr + rows, xx, mask=is_row & (tl.program_id(2) == 0))
    tl.store(parts_ptr + n_rows + cols, yy, mask=is_col & (tl.program_id(1) == 0))


@triton.jit
def _load_centred(grams_ptr, layers, n_layers, stride, at, i, j, inside, entries):
    """Load entries (i, j) of the centred Grams of some layers, 0 outside; float64."""
    grams_ptr += layers.to(tl.int64)[:, None] * stride
    mask = (layers < n_layers)[:, None] & inside[None, :]
    gram = tl.load(grams_ptr + at[None, :], mask=mask, other=0).to(tl.float64)
    gram += tl.load(grams_ptr + (entries + i)[None, :], mask=mask, other=0).to(tl.float64)
    gram += tl.load(grams_ptr + (entries + j)[None, :], mask=mask, other=0).to(tl.float64)
    return gram


def layer_grams(
    xs: list[Tensor], *, debiased: bool, precision: str, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the torch backend's result with another format of the Grams, described above.

    ``precision="float32"`` multiplies by tf32x3. Layers of which this keeps too few digits are
    multiplied again in float64; to find these, the host waits for the first launch. The rule is the
    torch backend's, but for the diagonal of G, which is up to four times that of the centred Gram.
    """
    n = len(xs[0])
    grams = torch.empty(len(xs), _count_values(n), dtype=torch.float64, device=xs[0].device)
    sums = grams.new_empty(len(xs), n)  # of the rows of G
    _multiply(grams, sums, xs, list(range(len(xs))), precision, launch)
    if precision == "float32":
        squares, d = _square_norms(grams, sums, debiased)
        numbers = torch.stack([squares, d.amax(1), d.mean(1)]).cpu().numpy()
        keeps_digits = features.keeps_digits(numbers[0], numbers[1], cka.MAX_ENTRY, 0.0, numbers[2])
        is_double = np.array([x.dtype == torch.float64 for x in xs])
        to_repeat = np.flatnonzero(~(keeps_digits | is_double)).tolist()
        if to_repeat:
            _multiply(grams, sums, xs, to_repeat, "float64", launch)
    traces = _write_shifts(grams, sums, debiased)
    floors = cka.rounding_floor_of_trace(traces, n) if debiased else 0.0 * traces
    return grams, traces, floors


def _multiply(
    grams: Tensor,
    sums: Tensor,
    xs: list[Tensor],
    layers: list[int],
    precision: str,
    launch: Launch | None,
) -> None:
    """Write the products G of some layers, and the sums of their rows: one launch per dtype."""
    n, device = sums.shape[1], sums.device
    for dtype in dict.fromkeys(xs[i].dtype for i in layers):
        group = [i for i in layers if xs[i].dtype == dtype]
        is_double = precision == "float64" or dtype == torch.float64
        if is_double and dtype.itemsize == 2:  # which Triton 3.8 fails to compile
            dtype = torch.float32
        sources = [xs[i].to(dtype) for i in group]
        # Neighbouring threads read neighbouring neurons.
        sources = [x if x.stride(1) == 1 else x.contiguous() for x in sources]
        settings = launch or choose(n, sum(x.shape[1] for x in sources))
        pieces = _list_pieces(sources, group, settings.chunk)
        pairs, tiles = count_tiles(n, settings.block_n), triton.cdiv(n, settings.block_n)
        sum_dtype = torch.float64 if is_double else torch.float32
        shape = len(pieces), pairs, settings.block_n**2
        tile_sums = sums.new_empty(len(xs), tiles, n)
        _launch.launch(
            _grams_kernel,
            (len(pieces) * pairs,),
            torch.from_numpy(pieces).to(device),
            torch.empty(shape, dtype=sum_dtype, device=device),
            torch.zeros(len(xs), pairs, dtype=torch.int32, device=device),
            *(grams, tile_sums, n, grams.shape[1]),
            DTYPE=_DTYPES[dtype],
            SUM=_DTYPES[sum_dtype],
            BLOCK_N=settings.block_n,
            BLOCK_P=settings.block_p,
            INNER=settings.inner,
            PRECISION="ieee" if is_double else "tf32x3",
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
        )
        sums[group] = tile_sums[group].sum(1)


def _list_pieces(xs: list[Tensor], layers: list[int], chunk: int) -> np.ndarray:
    """Return a row for each piece of at most ``chunk`` neurons of each x.

    Its address, the stride of the stimuli, its neurons, its layer, and the layer's first piece and
    the one behind its last.
    """
    p = np.array([x.shape[1] for x in xs])
    counts = np.maximum(1, -(-p // chunk))
    stops = np.cumsum(counts)
    piece_layers = np.repeat(np.arange(len(xs)), counts)  # positions in xs
    first, last = (stops - counts)[piece_layers], stops[piece_layers]
    start = (np.arange(len(piece_layers)) - first) * chunk
    address = np.array([x.data_ptr() for x in xs])[piece_layers] + start * xs[0].itemsize
    stride = np.array([x.stride(0) for x in xs])[piece_layers]
    neurons = np.minimum(chunk, p[piece_layers] - start)
    return np.stack((address, stride, neurons, np.array(layers)[piece_layers], first, last), 1)


def _diagonal(grams: Tensor, n: int) -> Tensor:
    """Return the diagonals of G, (L, n)."""
    i = torch.arange(n, device=grams.device)
    return grams[:, i * (i + 3) // 2]


def _square_norms(grams: Tensor, sums: Tensor, debiased: bool) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the Grams after centring or U-centring, and the diagonals of G.

    Their last digits are lost if centring removes most of G.
    """
    n = sums.shape[1]
    d = _diagonal(grams, n)
    diagonal = panels.sum_squares(d)
    off_diagonal = 2 * (panels.sum_squares(grams[:, :-n]) - diagonal)
    if not debiased:
        removed = 2 / n * panels.sum_squares(sums) - (sums.sum(1) / n).square()
        return off_diagonal + diagonal - removed, d
    off = sums - d
    removed = 2 / (n - 2) * panels.sum_squares(off)
    removed -= off.sum(1).square() / ((n - 1) * (n - 2))
    return off_diagonal - removed, d


def _write_shifts(grams: Tensor, sums: Tensor, debiased: bool) -> Tensor:
    """Write the shifts, which centre or U-centre, and return the traces of the centred Grams."""
    n = sums.shape[1]
    d = _diagonal(grams, n)
    if debiased:
        off = sums - d  # U-centring depends on neither the diagonal nor the first stimulus
        shifts = off.sum(1, keepdim=True) / (2 * (n - 1) * (n - 2)) - off / (n - 2)
    else:
        shifts = sums.sum(1, keepdim=True) / (2 * n * n) - sums / n
    grams[:, -n:] = shifts
    return d.sum(1) - sums.sum(1) / n


def gram_products(h: Tensor, k: Tensor, *, n: int, debiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the torch backend's result from this backend's Grams; PyTorch sums its parts."""
    rows, cols = len(h), len(k)
    blocks = triton.cdiv(rows, _BLOCK), triton.cdiv(cols, _BLOCK)
    # One wave on 132 multiprocessors, which hold two programs each.
    parts = min(triton.cdiv(n * (n + 1) // 2, _BLOCK), triton.cdiv(264, blocks[0] * blocks[1]))
    sizes = [rows * cols, rows, cols]
    out = torch.empty(parts, sum(sizes), dtype=torch.float64, device=h.device)
    _launch.launch(
        _products_kernel,
        (parts, *blocks),
        *(h, k, out, rows, cols, n, h.stride(0), k.stride(0)),
        U_CENTRE=debiased,
        BLOCK=_BLOCK,
        num_warps=8,
        num_stages=1,
    )
    xy, xx, yy = out.sum(0).split(sizes)
    return xy.view(rows, cols), xx, yy


def _make_grams_case(
    n: int, layers: int, p: int, dtype: torch.dtype, precision: str
) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        xs = [torch.empty(n, p, dtype=dtype, device=device)] * layers
        grams = torch.empty(layers, _count_values(n), dtype=torch.float64, device=device)
        _multiply(grams, grams.new_empty(layers, n), xs, list(range(layers)), precision, None)

    return _launch.CompileCase(
        f"{layers} layers, n = {n}, p = {p:,}, {str(dtype)[6:]}, {precision}",
        call,
        floor_of_grams(n, layers * p, layers, dtype.itemsize, precision),
        products=precision == "float32",
    )


def _make_products_case(n: int, rows: int, cols: int, dtype: torch.dtype) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        h, k = (
            torch.empty(count, _count_values(n), dtype=dtype, device=device)
            for count in (rows, cols)
        )
        gram_products(h, k, n=n, debiased=True)

    return _launch.CompileCase(
        f"{rows} x {cols} layers, n = {n}, {str(dtype)[6:]}",
        call,
        floor_of_products(n, rows, cols, dtype.itemsize),
    )


AOT_CASES = (
    _make_grams_case(300, 53, 50_000, torch.float32, "float32"),
    _make_grams_case(300, 53, 50_000, torch.bfloat16, "float32"),
    _make_grams_case(300, 53, 50_000, torch.float32, "float64"),
    _make_grams_case(300, 53, 50_000, torch.float64, "float64"),
    _make_grams_case(32, 53, 50_000, torch.float32, "float32"),
    _make_grams_case(32, 53, 50_000, torch.bfloat16, "float32"),
    _make_grams_case(12, 53, 50_000, torch.float64, "float64"),
    _make_products_case(300, 20, 53, torch.float64),
    _make_products_case(50, 150, 150, torch.float32),
)
