"""Riccati iterations on a GPU: each step is a float64 product by cuBLAS and one kernel.

A step of kernels/torch/riccati.py for B matrices of m x m is P = O O, 2 B m³ operations, followed
by the kernel, which reads P and F once and writes O once, 24 B m² bytes. At 67 TFLOP/s (the peak
of the float64 tensor cores) and 4.3 TB/s, an H200 needs at least, in µs,

    B, m        product   kernel    step   4 steps
    16, 499          59       22      82       326
    64, 499         237       89     326     1,305
    100, 49         0.4      1.3     1.7         7

These are predictions, not measurements. The host needs about 7 µs to start a product and 13 µs for
a kernel, so 80 µs for 4 steps: it stays ahead of the GPU for large matrices, but the GPU would wait
for it on small ones, whose steps are therefore replayed as a CUDA graph: 10 µs on the host, and 2
or 3 µs on the GPU for each of 8 kernels, so a call for (100, 49) should take 25 µs instead of 80.
Capturing costs about 100 µs, which two replays repay; there are up to 6, or more if the next batch
is allocated at the same addresses.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repsim_kernels.kernels.triton import _launch

# Steps per call. Reading the traces on the host stalls the GPU for as long as one or two steps of
# small matrices take; most ablations need 8 to 24 steps.
STEPS = 4

_Buffers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Launch:
    block_m: int  # rows per tile
    block_n: int  # columns per tile
    num_warps: int
    use_graph: bool  # whether the steps are replayed as a CUDA graph


def choose(batch: int, m: int) -> Launch:
    """Choose launch settings for a batch of m x m matrices."""
    return Launch(
        # A tile reads its elements and one sector per diagonal element it needs: 2.5 KB of 18.5.
        # Small matrices have more programs than multiprocessors: 4 per matrix for m = 49.
        block_m=16,
        block_n=max(16, triton.next_power_of_2(min(m, 64))),
        # 8 elements per thread, with all their loads in flight.
        num_warps=4,
        # Below 50 MB of traffic, or 12 µs on an H200, since the host needs 20 µs to start a step.
        use_graph=batch * m * m < 2**21,
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
    mu, g, v = find_mu(p_ptr, diagonal_ptr, v_ptr, rows, m, step)  # (BLOCK_M,)
    other, _, _ = find_mu(p_ptr, diagonal_ptr, v_ptr, columns, m, step)  # (BLOCK_N,)
    if tl.program_id(2) == 0:
        tl.store(d_ptr + batch * m + rows, g / (v + mu), mask=rows < m)

    i, j = rows[:, None], columns[None, :]
    inside = (i < m) & (j < m)  # (BLOCK_M, BLOCK_N)
    p = tl.load(p_ptr + i * stride_pm + j * stride_pn, mask=inside, other=0).to(tl.float64)
    f = tl.load(f_ptr + i * stride_fm + j * stride_fn, mask=inside, other=0).to(tl.float64)
    o = tl.where(i == j, 0, (f + p) / (mu[:, None] + other[None, :]))
    tl.store(o_ptr + i * stride_om + j * stride_on, o, mask=inside)


@triton.jit
def find_mu(p_ptr, diagonal_ptr, v_ptr, at, m, step):
    """Return μ, g and v at the diagonal positions ``at`` of p, which are ``step`` apart.

    μ is NaN where it has no real root. Beyond m, it and v are 1 and g is 0.
    """
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
    """Finish a step from p = O O (B, m, m): write the next O into o and its diagonal into d.

    o must not be p, since some programs still read p's diagonal while others write. diagonal
    (B, m), v (m,) and d (B, m) are float64 and contiguous; p, f and o may have any strides.
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


def _run_steps(o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor, d: Tensor) -> None:
    """Run STEPS steps and write their diagonals into d (STEPS, B, m).

    Each step overwrites O, which nothing reads after its product.
    """
    for after in d:
        torch.bmm(o, o, out=spare)
        step(spare, f, diagonal, v, o, after)


class StepGraph(threading.local):
    """The steps as a CUDA graph for the current set of buffers; called like `advance`.

    For a new set of buffers, the first call runs the steps without a graph, which is also the
    warm-up that capturing requires; the second call captures them. A graph refers to addresses, not
    tensors, so it also serves later tensors at the same addresses. The next call overwrites the d
    that it returns.
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
            # Drop the old graph first: PyTorch then frees cuBLAS's workspace on its stream.
            self.key, self.graph = (), None
            self.d = v.new_empty(STEPS, *diagonal.shape)
            self._run_on_stream(buffers, None)
            self.key = key
            return o, spare, self.d
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            self._run_on_stream(buffers, graph)
            self.graph = graph
        self.graph.replay()
        return o, spare, self.d

    def _run_on_stream(self, buffers: _Buffers, graph: torch.cuda.CUDAGraph | None) -> None:
        """Run the steps, or capture them into a graph, on this object's own stream.

        `torch.cuda.graph` would wait for the GPU and empty PyTorch's cache to make space for
        allocations during capture; these steps make none.
        """
        device = buffers[0].device
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if graph is None:
                _run_steps(*buffers, self.d)
            else:
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    _run_steps(*buffers, self.d)
                finally:
                    graph.capture_end()
        current.wait_stream(self.stream)


_step_graph = StepGraph()


def advance(
    o: Tensor, f: Tensor, diagonal: Tensor, v: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run STEPS steps, as `kernels.torch.riccati.advance` does; the next call may overwrite d."""
    if o.is_cuda and choose(*diagonal.shape).use_graph:
        return _step_graph(o, f, diagonal, v, spare)
    d = v.new_empty(STEPS, *diagonal.shape)
    _run_steps(o, f, diagonal, v, spare, d)
    return o, spare, d


def _make_case(batch: int, m: int) -> _launch.CompileCase:
    def call(device: torch.device) -> None:
        p, f, o = (torch.empty(batch, m, m, dtype=torch.float64, device=device) for _ in range(3))
        diagonal, d = (p.new_empty(batch, m) for _ in range(2))
        step(p, f, diagonal, p.new_empty(m), o, d)

    elements = batch * m * m
    floor = _launch.Floor(24 * elements + 16 * batch * m + 8 * m, 3 * elements)
    return _launch.CompileCase(f"{batch} matrices of {m} x {m}, float64", call, floor)


AOT_CASES = (_make_case(16, 499), _make_case(64, 499), _make_case(100, 49))
