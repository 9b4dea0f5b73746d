"""Riccati iterations, with and without CUDA graphs, against NumPy, LAPACK and torch."""

from __future__ import annotations

import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from _draw import SEEDS
from _guard import pad_with_nan, spread_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.tolerances import Tol, assert_close
from repsim_kernels.kernels.torch import riccati as torch_riccati
from repsim_kernels.kernels.triton import riccati

few_examples = settings(max_examples=15)
SMALL = riccati.Launch(block_m=16, block_n=16, num_warps=4, use_graph=True)


@pytest.fixture(autouse=True)
def ignore_invalid_roots():
    """Roots of negative numbers are NaN on purpose; the interpreter's NumPy would warn."""
    with np.errstate(invalid="ignore"):
        yield


def draw_step(seed, batch, m, fail):
    """Draw v, diagonal, F and P; some g exceed v²."""
    rng = np.random.default_rng(seed)
    v = rng.uniform(0.5, 2, m)
    p, f = rng.standard_normal((2, batch, m, m))  # not symmetric: rows are not columns
    diagonal = v**2 * rng.uniform(-1, 0.9, (batch, m)) - np.diagonal(p, axis1=1, axis2=2)
    diagonal[rng.random((batch, m)) < fail] += 5
    return v, diagonal, f, p


def numpy_step(v, diagonal, f, p):
    g = diagonal + np.diagonal(p, axis1=1, axis2=2)
    mu = np.sqrt(v**2 - g)
    o = (f + p) / (mu[:, :, None] + mu[:, None, :])
    o[:, np.arange(len(v)), np.arange(len(v))] = 0
    return o, g / (v + mu)


def to_layout(a, layout, dtype, device):
    """Lay out matrices (B, m, m) by rows, by columns, or with gaps between elements."""
    a = torch.from_numpy(a).to(device, dtype)
    if layout == "columns":
        return a.mT.contiguous().mT
    if layout == "gaps":
        return a.repeat_interleave(2, 2)[:, :, ::2]
    return a


@few_examples
@given(st.data(), SEEDS, st.integers(1, 5), st.integers(1, 40))
def test_step(device, data, seed, batch, m):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    layouts = [data.draw(st.sampled_from(["rows", "columns", "gaps"])) for _ in range(3)]
    v, diagonal, f, p = draw_step(seed, batch, m, data.draw(st.sampled_from([0, 0.02])))
    matrices = zip((f, p, np.full_like(p, np.nan)), layouts, strict=True)
    f, p, o = (pad_with_nan(to_layout(*a, dtype, device)) for a in matrices)
    want = numpy_step(v, diagonal, *(a.cpu().double().numpy() for a in (f, p)))
    v, diagonal = (pad_with_nan(torch.from_numpy(a).to(device)) for a in (v, diagonal))
    d = pad_with_nan(torch.full_like(diagonal, torch.nan))
    before = p.clone()
    launch = data.draw(st.sampled_from([None, SMALL]))
    riccati.step(p, f, diagonal, v, o, d, launch=launch)
    assert_close(o, want[0], Tol(1e-14 if dtype == torch.float64 else 1e-6), nan=True)
    assert_close(d, want[1], Tol(1e-14), nan=True)
    assert torch.equal(p, before)  # every program reads its diagonal
    assert not o.diagonal(dim1=1, dim2=2).any()
    for written in (o, d):
        assert int(written._base.isfinite().sum()) == int(written.isfinite().sum())


@pytest.mark.parametrize("m", [1, 15, 16, 17, 63, 64, 65, 130])
def test_tile_edges(device, m):
    inputs = draw_step(m, 2, m, 0)
    v, diagonal, f, p = (torch.from_numpy(a).to(device) for a in inputs)
    o, d = torch.empty_like(p), torch.empty_like(diagonal)
    riccati.step(p, f, diagonal, v, o, d)
    want = numpy_step(*inputs)
    assert_close(o, want[0], Tol(1e-14))
    assert_close(d, want[1], Tol(1e-14))


@pytest.mark.parametrize("strides", [(2**30 + 1, 3, 1), (3, 2**30 + 1, 1), (3, 1, 2**30 + 1)])
def test_offsets_beyond_32_bits(device, strides):
    v, diagonal, f, p = draw_step(3, 4, 3, 0)
    f, p = (a.astype(np.float16) for a in (f, p))
    want = numpy_step(v, diagonal, f.astype(np.float64), p.astype(np.float64))
    values = torch.from_numpy(np.stack([f, p, np.full_like(p, np.nan)]))
    f, p, o = spread_in_memory(values.to(device), (100, *strides))
    v, diagonal = (torch.from_numpy(a).to(device) for a in (v, diagonal))
    d = torch.empty_like(diagonal)
    riccati.step(p, f, diagonal, v, o, d)
    assert_close(o, want[0], Tol(1e-3))
    assert_close(d, want[1], Tol(1e-14))


def draw_parts(seed, m, shares, device):
    """Draw v, and F of parts that hold the given shares of energy in their directions."""
    rng = np.random.default_rng(seed)
    v = np.sort(rng.uniform(0.01, 1, m))[::-1] ** 2 * 50
    root = np.sqrt(v)
    f = []
    for share in shares:
        a = rng.standard_normal((m, m + 5))
        w, u = np.linalg.eigh(a @ a.T)
        # The share is the largest eigenvalue in the metric of L.
        f.append(v[:, None] ** 0.5 * root[:, None] * (u * (share * w / w[-1])) @ u.T * root * root)
    return torch.from_numpy(v.copy()).to(device), torch.from_numpy(np.stack(f)).to(device)


def run_torch_steps(o, f, diagonal, v, spare):
    """Run the torch backend for as many steps as one call of the kernel makes."""
    diagonals = []
    for _ in range(riccati.STEPS):
        o, spare, d = torch_riccati.advance(o, f, diagonal, v, spare)
        diagonals.append(d)
    return o, spare, torch.cat(diagonals)


@few_examples
@given(SEEDS, st.integers(1, 20), st.lists(st.floats(0.001, 0.5), min_size=1, max_size=4))
def test_steps(device, seed, m, shares):
    v, f = draw_parts(seed, m, shares, device)
    diagonal = f.diagonal(dim1=1, dim2=2).clone()
    f.diagonal(dim1=1, dim2=2).zero_()
    first = torch.zeros_like(f), f, diagonal, v, torch.empty_like(f)
    o, spare, d = riccati.advance(*first)
    want = run_torch_steps(torch.zeros_like(f), f, diagonal, v, torch.empty_like(f))
    assert_close(o, want[0], Tol(1e-11, 1e-13))
    assert_close(d, want[2], Tol(1e-12))
    assert o.data_ptr() == first[0].data_ptr()
    assert spare.data_ptr() == first[4].data_ptr()


@few_examples
@given(SEEDS, st.integers(1, 30), st.lists(st.floats(0.001, 1.2), min_size=1, max_size=5))
def test_deficits(device, seed, m, shares):
    """Includes parts without a root, and slow convergence."""
    v, f = draw_parts(seed, m, shares, device)
    got, steps = torch_riccati.solve_deficit(v, f, riccati.advance)
    want, want_steps = torch_riccati.solve_deficit(v, f, run_torch_steps)
    assert_close(got, want, Tol(1e-12), nan=True)
    assert torch.equal(steps, want_steps)
    assert not bool((steps % riccati.STEPS).any())
    w = torch.linalg.eigvalsh(torch.diag(v * v) - f).cpu()
    known = got.isfinite().cpu()
    assert bool((w[known] > 0).all())
    exact = v.sum().cpu() - w[known].sqrt().sum(-1)
    assert_close(got[known.to(device)], exact, Tol(1e-9, 1e-12 * float(v.sum())))


def test_deficits_with_and_without_a_root(device):
    """The shares drawn in the tests above lead to both outcomes."""
    v, f = draw_parts(0, 12, [0.01, 0.3, 0.6, 1.2], device)
    got, _ = torch_riccati.solve_deficit(v, f, riccati.advance)
    assert got.isfinite().tolist() == [True, True, True, False]


def test_runs_are_bit_identical(device):
    v, f = draw_parts(1, 33, [0.1, 0.2], device)
    assert torch.equal(*(torch_riccati.solve_deficit(v, f, riccati.advance)[0] for _ in range(2)))


class FakeGraph:
    """A CUDA graph that contains only steps."""

    recording: ClassVar[FakeGraph | None] = None
    alive: ClassVar[weakref.WeakSet[FakeGraph]] = weakref.WeakSet()
    log: ClassVar[list[str]] = []

    def __init__(self):
        self.steps = []
        self.alive.add(self)

    def capture_begin(self, capture_error_mode):
        assert len(self.alive) == 1  # the previous graph is gone
        FakeGraph.recording = self

    def capture_end(self):
        FakeGraph.recording = None
        self.log.append("captured")

    def replay(self):
        self.log.append("replayed")
        for run in self.steps:
            run()


class FakeStream:
    device = torch.device("cpu")

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@pytest.fixture
def log(device, monkeypatch):
    """Events of the graphs; in the interpreter, fake graphs record the steps in Python."""
    FakeGraph.log.clear()
    FakeGraph.alive.clear()
    if device.type == "cuda":
        return FakeGraph.log
    steps = riccati._run_steps

    def run(*arguments):
        if FakeGraph.recording is not None:
            FakeGraph.recording.steps.append(lambda: steps(*arguments))
        else:
            FakeGraph.log.append("run")
            steps(*arguments)

    monkeypatch.setattr(riccati, "_run_steps", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return FakeGraph.log


# Four finish at once, one of them without a root, so the other two move to new buffers.
SHARES = [0.001, 0.002, 0.003, 0.9, 0.97, 3.0]


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("m", [7, 24])
def test_graphs_match_the_torch_backend(device, m):
    """Two batches in succession, each of which changes buffers during the iteration."""
    graph = riccati.StepGraph()
    for seed in range(2):
        v, f = draw_parts(seed, m, SHARES, device)
        got = torch_riccati.solve_deficit(v, f, graph)
        want = torch_riccati.solve_deficit(v, f, run_torch_steps)
        assert (want[1][[0, 1, 2, 5]] == riccati.STEPS).all()
        assert (want[1][[3, 4]] > riccati.STEPS).all()
        assert (want[1] > 2 * riccati.STEPS).any()
        assert torch.equal(got[1], want[1])
        assert_close(got[0], want[0], Tol(1e-12), nan=True)


def buffers(seed, device):
    v, f = draw_parts(seed, 9, [0.3, 0.5], device)
    diagonal = f.diagonal(dim1=1, dim2=2).clone()
    f.diagonal(dim1=1, dim2=2).zero_()
    return [torch.zeros_like(f), f, diagonal, v, torch.empty_like(f)]


@pytest.mark.usefixtures("log")
def test_graph_serves_new_tensors_at_its_addresses(device):
    graph = riccati.StepGraph()
    places = buffers(0, device)
    for seed in range(3):
        for place, values in zip(places, buffers(seed, device), strict=True):
            place.copy_(values)
        others = buffers(seed, device)
        for _ in range(3):
            got, want = graph(*places), run_torch_steps(*others)
            assert_close(got[0], want[0], Tol(1e-10, 1e-13))
            assert_close(got[2], want[2], Tol(1e-12))


def test_second_call_with_the_same_buffers_captures(device, log):
    if device.type == "cuda":
        pytest.skip("the log needs fake graphs")
    graph = riccati.StepGraph()
    first, second = buffers(0, device), buffers(1, device)
    for _ in range(4):
        graph(*first)
    assert log == ["run", "captured", "replayed", "replayed", "replayed"]
    log.clear()
    for tensors in (second, first, first, second):
        graph(*tensors)
    assert log == ["run", "run", "captured", "replayed", "run"]
    log.clear()
    fewer = [t[:1] for t in second[:3]] + [second[3], second[4][:1]]
    graph(*fewer)
    graph(*(t.mT if t.dim() == 3 else t for t in fewer))
    graph(*fewer)
    for t in fewer:
        t.zero_()  # zero in every dtype
    graph(*(t.view(torch.float32).as_strided(t.shape, t.stride()) for t in fewer))
    assert log == ["run"] * 4


def test_small_matrices_use_a_graph_on_a_gpu(device, launches):
    if device.type == "cpu":
        pytest.skip("no graph without a GPU")
    for other in (None, torch.cuda.Stream()):
        small = buffers(2, device)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            launches.clear()
            for _ in range(4):
                got = riccati.advance(*small)
            want = run_torch_steps(*buffers(2, device))
            for _ in range(3):
                want = run_torch_steps(want[0], *small[1:4], want[1])
        torch.cuda.synchronize()
        assert len(launches) == 2 * riccati.STEPS  # run, then captured
        assert_close(got[2], want[2], Tol(1e-12))
    large = [torch.ones(17, 499, 499, dtype=torch.float64, device=device) for _ in range(3)]
    launches.clear()
    for _ in range(3):
        riccati.advance(large[0], large[1], large[0][0].clone()[:17], large[0][0, 0], large[2])
    assert len(launches) == 3 * riccati.STEPS


def test_launch_settings():
    assert riccati.choose(100, 49).use_graph
    assert riccati.choose(400, 49).use_graph
    assert not riccati.choose(16, 499).use_graph
    assert [riccati.choose(1, m).block_n for m in (1, 17, 64, 499)] == [16, 32, 64, 64]
