"""Riccati iterations on a GPU: a float64 product by cuBLAS and one kernel a step, several a call.

A step of kernels/torch/riccati.py for B matrices of m x m is P = O O, 2 B m³ operations, and what
the kernel does behind it: P and F read once, O written once, 24 B m² bytes. At 67 TFLOP/s of the
float64 tensor cores and 3.0 TB/s an H100 needs at least, in µs,

    B, m        product   kernel    step   4 steps
    16, 499          59       32      91       365
    64, 499         237      127     365     1,459
    100, 49         0.4      1.9     2.3         9

by arithmetic. The host, at some 7 µs for a product and 13 µs for a kernel, starts 4 steps in 80 µs:
of large matrices it is ahead of the GPU, for small ones the GPU would wait for it. Those are
replayed as a graph: 10 µs of the host's and 2 or 3 of the GPU's for each of 8 kernels, so that a
call of (100, 49) should take 25 µs instead of 80. What capturing costs, some 100 µs, two replays
repay, and there are up to 6, or more where the next batch gets the same memory.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch

# A look at the traces stops the GPU until the host has seen them, which costs as much as a step or
# two of small matrices; most ablations end in 8 to 24 steps.
STEPS = 4

_Buffers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Launch:
    block_m: int  # rows of a tile
    block_n: int  # columns
    num_warps: int
    captured: bool  # whether the steps are replayed as a graph


def choose(batch: int, m: int) -> Launch:
    return Launch(
        # Beside its elements a tile reads a sector for each of its places on the diagonal: 2.5 KB
        # of 18.5. Small matrices are more programs than multiprocessors, 4 each for m = 49.
        block_m=16,
        block_n=max(16, triton.next_power_of_2(min(m, 64))),
        # 8 elements a thread, whose loads are all under way at once.
        num_warps=4,
        # Bytes for 17 µs, where the host needs 20 for a step.
        captured=batch * m * m < 2**21,
    )


@triton.jit
def _riccati_step_kernel(
    p_ptr,
    f_ptr,
    diagonal_ptr,
    v_ptr,
    o_ptr,
    d_ptr,
    m,
    stride_pb,
    stride_pm,
    stride_pn,
    stride_fb,
    stride_fm,
    stride_fn,
    stride_ob,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_ptr += batch * stride_pb
    f_ptr += batch * stride_fb
    o_ptr += batch * stride_ob
    diagonal_ptr += batch * m

    step = stride_pm + stride_pn
    mu, g, v = _mu(p_ptr, diagonal_ptr, v_ptr, rows, m, step)  # (BLOCK_M,)
    other, _, _ = _mu(p_ptr, diagonal_ptr, v_ptr, columns, m, step)  # (BLOCK_N,)
    if tl.program_id(2) == 0:
        tl.store(d_ptr + batch * m + rows, g / (v + mu), mask=rows < m)

    i, j = rows[:, None], columns[None, :]
    inside = (i < m) & (j < m)  # (BLOCK_M, BLOCK_N)
    p = tl.load(p_ptr + i * stride_pm + j * stride_pn, mask=inside, other=0).to(tl.float64)
    f = tl.load(f_ptr + i * stride_fm + j * stride_fn, mask=inside, other=0).to(tl.float64)
    o = tl.where(i == j, 0, (f + p) / (mu[:, None] + other[None, :]))
    tl.store(o_ptr + i * stride_om + j * stride_on, o, mask=inside)


@triton.jit
def _mu(p_ptr, diagonal_ptr, v_ptr, at, m, step):
    """μ, g and v at some places of the diagonal; μ is NaN where there is no root."""
    inside = at < m
    v = tl.load(v_ptr + at, mask=inside, other=1)
    square = tl.load(p_ptr + at * step, mask=inside, other=0).to(tl.float64)
    g = tl.load(diagonal_ptr + at, mask=inside, other=0) + square
    return tl.sqrt(v * v - g), g, v


def step(
    p: Tensor,
    f: Tensor,
    diagonal: Tensor,
    v: Tensor,
    o: Tensor,
    d: Tensor,
    launch: Launch | None = None,
) -> None:
    """What follows the product p = O O (B, m, m): the next O into o, and its diagonal into d.

    o may not be p: programs still read p's diagonal when others write. diagonal (B, m), v (m,) and
    d (B, m) are float64 and contiguous; p, f and o have any strides.
    """
    batch, m = d.shape
    launch = launch or choose(batch, m)
    _launch.launch(
        _riccati_step_kernel,
        (batch, triton.cdiv(m, launch.block_m), triton.cdiv(m, launch.block_n)),
        *(p, f, diagonal, v, o, d, m, *p.stride(), *f.stride(), *o.stride()),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
    )


def _steps(o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor, d: Tensor) -> None:
    """STEPS steps, of which d (STEPS, B, m) keeps all diagonals.

    The next O goes where the old one was, which nothing reads any more once its product is there.
    """
    for after in d:
        torch.bmm(o, o, out=spare)
        step(spare, f, diagonal, v, o, after)


class Captured(threading.local):
    """The steps as a CUDA graph, for one set of buffers at a time: as `advance`.

    Of another set, the first call runs them one by one, which is also the warm-up that a capture
    wants, and the second captures them. A graph holds addresses and no memory, so that it serves
    whatever comes to lie at the same ones. The d it returns is overwritten by the next call.
    """

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.d = torch.empty(0)

    def __call__(
        self, o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        buffers = o, f, diagonal, v, spare
        key = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in buffers)
        if key != self.key:
            # The old graph goes first: PyTorch frees cuBLAS's workspace on its stream with it.
            self.key, self.graph = (), None
            self.d = v.new_empty(STEPS, *diagonal.shape)
            self._beside(buffers, None)
            self.key = key
            return o, spare, self.d
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            self._beside(buffers, graph)
            self.graph = graph
        self.graph.replay()
        return o, spare, self.d

    def _beside(self, buffers: _Buffers, graph: torch.cuda.CUDAGraph | None) -> None:
        """Run or capture the steps on a stream of their own, always the same.

        Not by `torch.cuda.graph`, which waits for the GPU and empties PyTorch's cache, so that a
        graph that allocates finds room; this one has its buffers.
        """
        device = buffers[0].device
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if graph is None:
                _steps(*buffers, self.d)
            else:
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    _steps(*buffers, self.d)
                finally:
                    graph.capture_end()
        current.wait_stream(self.stream)


_captured = Captured()


def advance(
    o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """STEPS steps, as kernels/torch/riccati.py's; d may be overwritten by the next call."""
    if o.is_cuda and choose(*diagonal.shape).captured:
        return _captured(o, f, diagonal, v, spare)
    d = v.new_empty(STEPS, *diagonal.shape)
    _steps(o, f, diagonal, v, spare, d)
    return o, spare, d


def _case(batch: int, m: int) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        p, f, o = (torch.empty(batch, m, m, dtype=torch.float64, device=device) for _ in range(3))
        diagonal, d = (p.new_empty(batch, m) for _ in range(2))
        step(p, f, diagonal, p.new_empty(m), o, d)

    elements = batch * m * m
    floor = _launch.Floor(24 * elements + 16 * batch * m + 8 * m, 3 * elements)
    return _launch.CompileCase(f"{batch} matrices of {m} x {m}, float64", call, floor)


AOT_CASES = (_case(16, 499), _case(64, 499), _case(100, 49))
